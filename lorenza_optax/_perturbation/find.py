"""Finding this library's states in an optimizer's state, whatever is round them."""

from __future__ import annotations

from typing import Any

import jax
import optax
import optax.contrib

from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._perturbation.zo_sam import ZoSamState

__all__ = ["find_states", "refuse_wrapped", "stages_in_front", "unboxed"]

# Their updates are made of gradients like the parameters.
_WRAPPED = (
    optax.MultiStepsState,
    optax.ApplyIfFiniteState,
    optax.MaskedState,
    optax.transforms.PartitionState,
    optax.contrib.MechanicState,
)


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
            "opt_state holds no state of lorenza, adazo_sam, zo_sam_perturbation, methods.sam or"
            f" methods.asam (found a {type(opt_state).__name__}): pass the state of the"
            " optimizer that the gradients go to, such as TrainState.opt_state."
        )
    return states


def stages_in_front(opt_state: Any) -> bool:
    """Whether an ``optax.chain`` has stages in front of the first state of this library."""
    is_ours = lambda node: isinstance(node, (LowRankState, ZoSamState))  # noqa: E731
    for path, node in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_ours):
        if is_ours(node):
            return any(getattr(key, "idx", 0) > 0 for key in path)
    return False


def refuse_wrapped(
    opt_state: Any, why: str = "Low-rank gradients are not like the parameters."
) -> None:
    """Raises if a low-rank state sits in a wrapper that expects gradients like the parameters."""
    is_wrapped = lambda node: isinstance(node, _WRAPPED)  # noqa: E731
    is_ours = lambda node: isinstance(node, LowRankState)  # noqa: E731
    for node in filter(is_wrapped, jax.tree.leaves(opt_state, is_leaf=is_wrapped)):
        if any(map(is_ours, jax.tree.leaves(node, is_leaf=is_ours))):
            raise ValueError(
                f"{why} The wrapper whose state is a {type(node).__name__} expects gradients like"
                " the parameters: take them with lorenza_optax.perturbed_value_and_grad instead, or"
                " take the wrapper away (zeroth-order methods, which use no gradient, go without)."
            )


def unboxed(state: Any) -> Any:
    """A state with its arrays taken out of the boxes that NNX may keep them in."""
    return jax.tree.map(_array, state, is_leaf=_is_box)


def _is_box(node: Any) -> bool:
    # As in `leaves_by_path`: None and classes of the user's own are no boxes.
    if isinstance(node, (tuple, list, dict)):
        return False
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(node)]
    return paths == [(jax.tree_util.GetAttrKey("value"),)]


def _array(leaf: Any) -> jax.Array:
    return jax.tree.leaves(leaf)[0]
