"""The gradient for an ``update`` that was given ``value_fn``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._ascent.ascent import AscentConfig
from lorenza_optax._ascent.gradient import (
    SKETCH,
    SubspaceGradients,
    after_ascent,
    ascend,
    full_gradient,
    like_params,
    low_rank_gradient,
    step_key,
    varying,
    with_finite_value,
    without_ascent,
)
from lorenza_optax._ascent.surroundings import (
    Surroundings,
    bound_loss,
    chosen_ascent,
    full_paths,
    of_state,
)
from lorenza_optax._base.calls import check_call, is_given
from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._factored.landscape import Displacement, Landscape, landscape
from lorenza_optax._linalg.decompositions import total
from lorenza_optax._linalg.stacks import stacked
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.renewal import NewSubspaces, renewed, unchanged
from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._low_rank.step import Prepared, prepare, prepare_low
from lorenza_optax._plan.plan import LeafPlan, ProjectionPlan
from lorenza_optax._subspace.refresh import is_due
from lorenza_optax._subspace.sketch import WARM_UP, energy_of, factors_from, sketch_rows
from lorenza_optax._subspace.subspace import RANDOM, Factors

__all__ = [
    "full_gradient_in_update",
    "given_or_taken_gradient",
    "perturbed_landscape",
    "sketched_subspaces",
    "subspace_gradient",
    "subspace_gradient_in_update",
    "surroundings_of",
]

Loss = Callable[[Any], Any]


def surroundings_of(
    config: LowRankConfig, plan: ProjectionPlan, state: LowRankState
) -> Surroundings:
    views = {path: leaf.matrix for path, leaf in plan.projected.items()}
    return of_state(config.ascent, views, state)


def perturbed_landscape(
    config: AscentConfig,
    around: Surroundings,
    count: jax.Array,
    params: Any,
    loss: Loss,
    ascent_loss: Loss | None,
    has_aux: bool = False,
) -> tuple[Landscape, Displacement, jax.Array, jax.Array]:
    """The loss near θ, the move ε of this update, ‖A‖, and whether it is perturbed."""
    arrays = leaves_by_path(params)
    params = varying(params, config)
    full = full_paths(config, around, arrays)

    def near(loss: Loss, has_aux: bool) -> Landscape:
        return landscape(
            loss,
            params,
            around.subspaces,
            full_paths=full,
            keep_factored=config.factored,
            has_aux=has_aux,
        )

    here = near(loss, has_aux)
    there = here if ascent_loss is None else near(ascent_loss, False)
    ascent = chosen_ascent(there, config, around, arrays, count)
    move, norm, perturbed = ascend(ascent, config, count=count, ready=around.ready)
    return here, move, norm, perturbed


def losses(
    config: AscentConfig, value_fn: Callable[..., Any], extra_args: Mapping[str, Any]
) -> tuple[Loss, Loss | None]:
    ascent_fn = config.ascent_fn
    ascent_loss = None if ascent_fn is None else bound_loss(ascent_fn, extra_args)
    return bound_loss(value_fn, extra_args), ascent_loss


def full_gradient_in_update(
    config: AscentConfig,
    around: Surroundings,
    state: Any,
    params: Any,
    value_fn: Callable[..., Any],
    extra_args: Mapping[str, Any],
) -> tuple[Any, Any]:
    """The whole gradient at θ + ε, and the ascent's state."""
    near, move, norm, perturbed = perturbed_landscape(
        config, around, state.count, params, *losses(config, value_fn, extra_args)
    )
    value, gradient = full_gradient(near, move, config)
    near.warn()
    return like_params(gradient, params), after_ascent(state.ascent, value, norm, perturbed)


def given_or_taken_gradient(
    config: AscentConfig,
    updates: Any,
    state: Any,
    params: Any,
    value_fn: Callable[..., Any] | None,
    extra_args: Mapping[str, Any],
) -> tuple[Any, Any]:
    """The whole gradient, or that at θ taken here if none is given; and the ascent's state.

    For methods that change gradients before a low-rank transformation sees them.
    """
    if is_given(updates, params):
        value_fn = None
    check_call(updates, params, value_fn)
    if params is None or isinstance(updates, SubspaceGradients):
        raise ValueError(
            "This optimizer needs params and gradients like them, call update(gradients, state,"
            f" params): got {type(updates).__name__} for params of {type(params).__name__}."
        )
    if value_fn is None:
        return updates, without_ascent(state.ascent)
    around = of_state(config, {}, state)
    gradient, ascent = full_gradient_in_update(config, around, state, params, value_fn, extra_args)
    return gradient, with_finite_value(ascent, state.ascent)


def subspace_gradient_in_update(
    config: LowRankConfig,
    plan: ProjectionPlan,
    state: LowRankState,
    params: Any,
    value_fn: Callable[..., Any],
    extra_args: Mapping[str, Any],
) -> tuple[Prepared, NewSubspaces | None, Any]:
    """The gradient at θ + ε in the subspaces, with a refresh if one is due; the ascent's state.

    Between refreshes, and where refreshes are from sketches also at them, no gradient of the
    size of a projected leaf is formed.
    """
    around = surroundings_of(config, plan, state)
    near, move, norm, perturbed = perturbed_landscape(
        config.ascent, around, state.count, params, *losses(config.ascent, value_fn, extra_args)
    )
    value, prepared, new = subspace_gradient(config, plan, state, around, near, move)
    near.warn()
    return prepared, new, after_ascent(state.ascent, value, norm, perturbed)


def subspace_gradient(
    config: LowRankConfig,
    plan: ProjectionPlan,
    state: LowRankState,
    around: Surroundings,
    near: Landscape,
    move: Displacement,
) -> tuple[jax.Array, Prepared, NewSubspaces | None]:
    """One backward pass: (value, the gradient in the subspaces, subspaces from sketches)."""

    def in_old(columns: Any = None) -> Any:
        return low_rank_gradient(near, around.subspaces, move, config.ascent, columns)

    def prepared_low(low: Any, others: Any) -> Prepared:
        return prepare_low(config, plan, low, others, state)

    if not plan.projected or config.subspace in RANDOM:  # those are renewed before
        value, gradient = in_old()
        return value, prepared_low(gradient.low, gradient.others), None
    warm_up = WARM_UP if config.sketches else 1
    due = is_due(state.count, state.last_refresh, config.update_proj_gap, warm_up, state.skipped)
    if not config.sketches:

        def only_low() -> Any:
            value, gradient = in_old()
            prepared = prepared_low(gradient.low, gradient.others)
            if config.moment_transport != "keep":
                prepared = prepared._replace(overlaps=unchanged(plan, state).overlaps)
            return value, prepared

        def refreshed() -> Any:
            value, gradient = full_gradient(near, move, config.ascent)
            prepared = in_auto_mode(
                lambda *args: prepare(config, plan, *args)[0],
                gradient,
                state,
                like=lambda: jax.eval_shape(only_low)[1],
            )
            return value, prepared

        return *jax.lax.cond(due, refreshed, only_low), None

    projectors = around.subspaces.projectors

    def columns() -> Any:
        key = step_key(state.ascent.seed, state.count, SKETCH)
        return sketch_rows(around.rows, projectors, key)

    def sketched() -> Any:
        value, gradient = in_old(columns())
        return value, gradient, energy_of(gradient.low, gradient.sketches)

    def plain() -> Any:
        value, gradient = in_old()
        zeros = {
            path: jnp.zeros((*projectors[path].shape[:-1], rows.shape[-2]), rows.dtype)
            for path, rows in jax.eval_shape(columns).items()
        }
        return value, gradient._replace(sketches=zeros), energy_of(gradient.low, zeros)

    value, gradient, energy = jax.lax.cond(due, sketched, plain)
    prepared = prepared_low(gradient.low, gradient.others)
    new, share = in_auto_mode(
        lambda *args: sketched_subspaces(config, plan, *args),
        gradient.low,
        gradient.sketches,
        energy,
        state,
        due & prepared.usable,
        like=lambda: (unchanged(plan, state), state.captured_energy),
    )
    return value, prepared._replace(captured_energy=share), new


def sketched_subspaces(
    config: LowRankConfig,
    plan: ProjectionPlan,
    low: Any,
    sketches: Any,
    energy: jax.Array,
    state: LowRankState,
    active: jax.typing.ArrayLike,
) -> tuple[NewSubspaces, jax.Array]:
    """New subspaces from sketches, and the share of the gradient that the old ones held."""
    held = total(jnp.sum(g * g) for g in low.values())
    share = jnp.minimum(held / jnp.where(energy > 0, energy, 1), 1)
    active &= jnp.isfinite(share)

    def find(leaf: LeafPlan, known: Any, old: Any) -> Factors:
        del old
        batches = [g.shape[:-2] for g in known[0]]
        return factors_from(*(stacked(leaves, batches) for leaves in known))

    new = renewed(plan, state, [low, sketches], find, active)
    return new, jnp.where(active, share, state.captured_energy).astype(jnp.float32)
