"""Optimizing W = g v / ‖v‖ by its magnitudes g and its directions v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._base.calls import check_shapes
from lorenza_optax._base.checks import check_transformation, value_at
from lorenza_optax._base.mesh import in_auto_mode, mesh_axes, placed
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._linalg.decompositions import matmul, total
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.fit import check_same_tree
from lorenza_optax._low_rank.in_update import given_or_taken_gradient
from lorenza_optax._low_rank.state import is_placeholder
from lorenza_optax._plan.plan import ProjectionPlan
from lorenza_optax._weight_norm.weight_norm import columns, initial_lengths, moved, slopes

__all__ = ["WeightNormalizedState", "weight_normalized"]

Arrays = dict[str, jax.Array]


class WeightNormalizedState(NamedTuple):
    """State of :func:`methods.gradnormlorp`. Dicts are keyed by the path of a projected leaf.

    Attributes:
      lengths: ‖v‖ of each column ([b,] n), with the sign of g.
      magnitudes: State of Adam on g; moments ([b,] n).
      gradient_transform: State of ``gradient_transform``, else empty.
      low_rank: The :class:`LowRankState` of v and of the leaves that are not projected.
    """

    lengths: Any
    magnitudes: Any
    gradient_transform: Any
    low_rank: Any


def weight_normalized(
    of_direction: optax.GradientTransformationExtraArgs,
    of_magnitude: optax.GradientTransformation,
    learning_rate: Any,
    gradient_transform: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """Updates of W from those of v and g: (W - W') / γ, for the γ that comes behind.

    A gradient that is not finite gives a zero update and leaves the state as it is, but for the
    counts of ``of_direction``.

    Args:
      of_direction: A low-rank transformation with factored updates, which sees the gradient of v
        in the place of that of W. It says which leaves are taken apart: those it projects.
      of_magnitude: Sees the gradients of g ([b,] n) by path.
      learning_rate: γ, a number or a schedule.
      gradient_transform: Applied to the gradient of W; None for none.

    Returns:
      A transformation with state :class:`WeightNormalizedState`.
    """
    check_transformation("gradient_transform", gradient_transform)
    stage = optax.with_extra_args_support(gradient_transform or optax.identity())
    update_direction: Callable[..., Any] = of_direction.update
    config: LowRankConfig = update_direction.config  # pyright: ignore[reportFunctionMemberAccess]

    def init(params: Any) -> WeightNormalizedState:
        low_rank = of_direction.init(params)
        if is_placeholder(params):
            return WeightNormalizedState(0, 0, stage.init(params), low_rank)
        plan, leaves = config.plan(params), leaves_by_path(params)
        weights = {path: leaves[path] for path in plan.projected}
        lengths = in_auto_mode(
            lambda weights: {p: initial_lengths(w) for p, w in _matrices(plan, weights).items()},
            weights,
            like=lambda: _like_lengths(plan, weights),
        )
        magnitudes = of_magnitude.init(lengths)
        return WeightNormalizedState(lengths, magnitudes, stage.init(params), low_rank)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, WeightNormalizedState]:
        before = state.low_rank
        gradients, ascent = given_or_taken_gradient(
            config.ascent, updates, before, params, value_fn, extra_args
        )
        plan = config.plan(params)
        check_same_tree(config, plan, before)
        check_shapes(plan.leaves, gradients)
        gradients, stage_state = stage.update(
            gradients, state.gradient_transform, params, **extra_args
        )
        given, leaves = leaves_by_path(gradients), leaves_by_path(params)
        weights = {path: leaves[path] for path in plan.projected}
        slopes_of_w = {path: given[path] for path in plan.projected}

        of_v, of_g = in_auto_mode(
            lambda *args: _apart(plan, *args),
            weights,
            slopes_of_w,
            state.lengths,
            like=(slopes_of_w, state.lengths),
        )
        rebuild = jax.tree.structure(gradients).unflatten
        steps, low_rank = update_direction(
            rebuild([{**given, **of_v}[path] for path in given]),
            before._replace(ascent=ascent),
            params,
            **extra_args,
        )
        of_g, magnitudes = of_magnitude.update(of_g, state.magnitudes)
        steps = leaves_by_path(steps)
        factors = {path: (steps[path].left, steps[path].right) for path in plan.projected}
        rate = jnp.asarray(value_at(learning_rate, before.count))
        usable = low_rank.skipped == before.skipped
        moves, lengths = in_auto_mode(
            lambda *args: _together(plan, *args),
            weights, slopes_of_w, state.lengths, factors, of_g, rate, usable,
            like=(weights, state.lengths),
        )  # fmt: skip
        changed: Any = (lengths, magnitudes, stage_state)
        new_updates = rebuild([{**steps, **moves}[path] for path in given])
        kept = lambda new, old: jnp.where(usable, new, old)  # noqa: E731
        lengths, magnitudes, stage_state = jax.tree.map(kept, changed, state[:3])
        return new_updates, WeightNormalizedState(lengths, magnitudes, stage_state, low_rank)

    return optax.GradientTransformationExtraArgs(init, update)


def _matrices(plan: ProjectionPlan, leaves: Arrays) -> Arrays:
    """([b,] m, n) of projected leaves, as they compute."""
    return {
        path: leaf.matrix.matrix(leaves[path].astype(leaf.compute_dtype))
        for path, leaf in plan.projected.items()
    }


def _like_lengths(plan: ProjectionPlan, weights: Arrays) -> Arrays:
    """Arrays ([b,] n) sharded as columns are."""
    found = {}
    for path, leaf in plan.projected.items():
        batch, _, column_axes = leaf.matrix.mesh_axes(mesh_axes(weights[path]))
        zeros = jnp.zeros((*leaf.matrix.batch, leaf.matrix.n), leaf.compute_dtype)
        found[path] = placed(zeros, (*batch, column_axes), weights[path])
    return found


def _apart(
    plan: ProjectionPlan, weights: Arrays, gradients: Arrays, lengths: Arrays
) -> tuple[Arrays, Arrays]:
    """The gradients of v, as leaves, and of g."""
    matrices, wide = _matrices(plan, weights), _matrices(plan, gradients)
    of_v, of_g = {}, {}
    finite = jnp.isfinite(total(jnp.sum(jnp.square(one)) for one in wide.values()))
    for path, w in matrices.items():
        parts = columns(w, lengths[path], wide[path])
        v, of_g[path] = slopes(parts, wide[path])
        # Of a column with g = 0 nothing else may tell.
        of_v[path] = plan.leaves[path].matrix.leaf(jnp.where(finite, v, jnp.nan))
    return of_v, of_g


def _together(
    plan: ProjectionPlan,
    weights: Arrays,
    gradients: Arrays,
    lengths: Arrays,
    factors: dict[str, tuple[jax.Array, jax.Array]],
    of_g: Arrays,
    rate: jax.Array,
    usable: jax.Array,
) -> tuple[Arrays, Arrays]:
    """The updates of W, as leaves, and the new lengths."""
    matrices, wide = _matrices(plan, weights), _matrices(plan, gradients)
    moves, new = {}, {}
    for path, w in matrices.items():
        parts = columns(w, lengths[path], wide[path])
        move, new[path] = moved(parts, matmul(*factors[path]), of_g[path], rate)
        leaf = plan.leaves[path]
        moves[path] = leaf.matrix.leaf(jnp.where(usable, move, 0)).astype(leaf.dtype)
    return moves, new
