"""A refresh of the subspaces by a pass of its own, before the gradient of an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._ascent.gradient import (
    SKETCH,
    full_gradient,
    low_rank_gradient,
    step_key,
    varying,
)
from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._factored.landscape import Displacement, landscape
from lorenza_optax._inner.inner import load_moments, store_moments
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.in_update import sketched_subspaces, surroundings_of
from lorenza_optax._low_rank.renewal import carried
from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._low_rank.step import prepare
from lorenza_optax._plan.plan import ProjectionPlan
from lorenza_optax._subspace.refresh import is_due, lacking_at
from lorenza_optax._subspace.sketch import WARM_UP, energy_of, sketch_rows

__all__ = ["refreshed_apart"]


def refreshed_apart(
    config: LowRankConfig,
    plan: ProjectionPlan,
    state: LowRankState,
    params: Any,
    loss: Callable[[Any], Any],
    has_aux: bool,
) -> LowRankState:
    """The state, with new subspaces from the gradient at θ if they are due."""
    if not plan.projected:
        return state
    around = surroundings_of(config, plan, state)
    near = landscape(
        loss,
        varying(params, config.ascent),
        around.subspaces,
        keep_factored=config.ascent.factored,
        has_aux=has_aux,
    )
    still = Displacement({}, {})

    def from_sketches() -> LowRankState:
        key = step_key(state.ascent.seed, state.count, SKETCH)
        columns = sketch_rows(around.rows, around.subspaces.projectors, key)
        _, gradient = low_rank_gradient(near, around.subspaces, still, config.ascent, columns)
        return in_auto_mode(
            lambda *args: _with_sketches(config, plan, *args),
            gradient.low,
            gradient.sketches,
            state,
            like=state,
        )

    def from_gradient() -> LowRankState:
        _, gradient = full_gradient(near, still, config.ascent)
        return in_auto_mode(
            lambda *args: _with_gradient(config, plan, *args), gradient, state, like=state
        )

    warm_up = WARM_UP if config.sketches else 1
    due = is_due(
        state.count, state.last_refresh, config.update_proj_gap, warm_up, state.skipped
    ) & (state.last_refresh != lacking_at(state.count))
    renew = from_sketches if config.sketches else from_gradient
    return jax.lax.cond(due, renew, lambda: state)


def _with_sketches(
    config: LowRankConfig, plan: ProjectionPlan, low: Any, sketches: Any, state: LowRankState
) -> LowRankState:
    energy, due = energy_of(low, sketches), jnp.ones((), bool)
    new, share = sketched_subspaces(config, plan, low, sketches, energy, state, due)
    initial = config.inner.init(low)
    moments = load_moments(state.projected, initial)
    settling = state.count - state.skipped < WARM_UP
    moved = carried(config, plan.stacks, moments, initial, new.overlaps, new.changed, settling)
    when = new.refreshed, new.changed
    return _installed(config, state, new.subspaces, moved, *when, share, new.overlap)


def _with_gradient(
    config: LowRankConfig, plan: ProjectionPlan, gradient: Any, state: LowRankState
) -> LowRankState:
    found, _ = prepare(config, plan, gradient, state)
    initial = config.inner.init(found.low)
    moments = load_moments(state.projected, initial)
    if found.overlaps:
        moments = carried(config, plan.stacks, moments, initial, found.overlaps, found.changed)
    when, shares = (found.refreshed, found.changed), (found.captured_energy, found.overlap)
    return _installed(config, state, found.subspaces, moments, *when, *shares)


def _installed(
    config: LowRankConfig,
    state: LowRankState,
    subspaces: Any,
    moments: Any,
    refreshed: jax.Array,
    changed: jax.Array,
    share: jax.Array,
    overlap: jax.Array,
) -> LowRankState:
    q, r, values = subspaces
    dtype = config.stored_moment_dtype()
    # Carried by "keep" they are as they were, and storing them again changes nothing.
    stored = store_moments(moments, dtype, None)
    lacking = changed & (state.last_refresh < 0)
    last = jnp.where(lacking, lacking_at(state.count), state.last_refresh)
    new = state._replace(
        q=q,
        r=r,
        singular_values=values,
        projected=stored,
        last_refresh=jnp.where(refreshed, state.count, last),
        captured_energy=share,
        subspace_overlap=overlap,
    )
    new_ones = refreshed | changed  # a few alone, by turns or displacement, are not "changed"
    return jax.tree.map(lambda n, o: jnp.where(new_ones, n, o).astype(o.dtype), new, state)
