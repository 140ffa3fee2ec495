"""Finding this library's states in an optimizer's state, whatever is round them."""

from __future__ import annotations

from typing import Any

import jax

from lorenza_optax._state import LowRankState
from lorenza_optax._zo_sam import ZoSamState

__all__ = ["find_states", "unboxed"]


def find_states(opt_state: Any) -> dict[str, Any]:
    """The states of lorenza and its like by their place in ``opt_state``; raises for none."""
    is_ours = lambda node: isinstance(node, (LowRankState, ZoSamState))  # noqa: E731
    found = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_ours)
    states = {
        jax.tree_util.keystr(path, simple=True, separator="/"): unboxed(state)
        for path, state in found
        if is_ours(state)
    }
    if not states:
        raise ValueError(
            "opt_state holds no state of lorenza, adazo_sam or zo_sam_perturbation (found a"
            f" {type(opt_state).__name__}): pass the state of the optimizer that the gradients"
            " go to, such as TrainState.opt_state."
        )
    return states


def unboxed(state: Any) -> Any:
    """A state with its arrays taken out of the boxes that NNX may keep them in."""
    return jax.tree.map(_array, state, is_leaf=_is_box)


def _is_box(node: Any) -> bool:
    return not isinstance(node, (tuple, dict)) and not jax.tree_util.all_leaves([node])


def _array(leaf: Any) -> jax.Array:
    return jax.tree.leaves(leaf)[0]
