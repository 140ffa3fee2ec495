"""Whether a state fits its parameters and arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._base.paths import shape_differences
from lorenza_optax._inner.inner import check_stored, store_moments
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.state import (
    LowRankState,
    examples,
    initial_subspaces,
    of_displacement,
    zeros_of,
)
from lorenza_optax._plan.plan import ProjectionPlan

__all__ = ["OTHERWISE_MADE", "check_same_tree", "said"]

# Fields whose leaves and shapes follow from the parameters and the arguments.
_SHAPED = ("q", "r", "singular_values", "residual", "displacement", "projected", "others")
OTHERWISE_MADE = (
    "made by init for other parameters or with other arguments, such as rank, proj_type, rho,"
    " ascent or base_optimizer. Build the optimizer with the arguments that the state was saved"
    " with, or begin with a new state, tx.init(params)"
)


def check_same_tree(config: LowRankConfig, plan: ProjectionPlan, state: LowRankState) -> None:
    """Raises where a state was made for other leaves or with other arguments."""
    if not all(hasattr(state, field) for field in _SHAPED):
        raise TypeError(
            f"update needs the state that init made, and got a {type(state).__name__}: restore a"
            " checkpoint into the structure of jax.eval_shape(tx.init, params)."
        )
    for inner in (state.projected, state.others):
        check_stored(inner, config.stored_moment_dtype())
    needed = jax.eval_shape(lambda: _shaped_fields(config, plan))
    different = shape_differences(needed, {field: getattr(state, field) for field in _SHAPED})
    different.sort(key=lambda one: (_SHAPED.index(one[0].partition("/")[0]), one[0]))
    for name, now, then in different[:1]:
        field, _, path = name.partition("/")
        what = f"factor {field} of leaf {path!r}" if field in ("q", "r") else repr(name)
        more = f" ({len(different) - 1} more arrays differ)" if different[1:] else ""
        raise ValueError(
            f"The state holds {said(then)} as {what}, where these parameters and arguments"
            f" need {said(now)}{more}: it was {OTHERWISE_MADE}."
        )


def said(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(shape)


def _shaped_fields(config: LowRankConfig, plan: ProjectionPlan) -> dict[str, Any]:
    leaves = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in plan.leaves.items()}
    low, others = examples(plan, leaves)
    dtype = config.stored_moment_dtype()
    rules = (config.residual.memory(plan), of_displacement(config, plan))
    inners = (config.inner.init(low), config.others_inner.init(others))
    parts = (
        *initial_subspaces(config, plan),
        *(zeros_of(rule, plan, leaves) for rule in rules),
        *(store_moments(inner, dtype, None) for inner in inners),
    )
    return dict(zip(_SHAPED, parts, strict=True))
