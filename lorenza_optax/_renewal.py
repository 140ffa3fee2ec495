"""New subspaces from a full gradient, and how a state keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._config import LowRankConfig
from lorenza_optax._gradient import SKETCH, step_key
from lorenza_optax._linalg import stacked, total, unstacked
from lorenza_optax._plan import ProjectionPlan
from lorenza_optax._sketch import WARM_UP
from lorenza_optax._state import LowRankState
from lorenza_optax._subspace import (
    POWER_ITERATION,
    SUBSPACES,
    Factors,
    align_signs,
    power_iteration,
    project,
)
from lorenza_optax._transport import transport

__all__ = ["NewSubspaces", "carried", "install", "projectors_of", "renewed"]

Arrays = dict[str, jax.Array]


class NewSubspaces(NamedTuple):
    """Subspaces that serve from the next update on.

    Attributes:
      subspaces: (q, r, singular_values) as the state keeps them.
      overlaps: C = P_newᵀ P_old by path ([b,] r, r).
      overlap: The mean of ‖C‖² / r over all matrices.
      refreshed: Whether they are new.
    """

    subspaces: tuple[Any, Any, Any]
    overlaps: Arrays
    overlap: Any
    refreshed: Any


def renewed(
    config: LowRankConfig,
    plan: ProjectionPlan,
    matrices: Arrays,
    state: LowRankState,
    moments: Any,
    initial: Any,
) -> tuple[Any, ...]:
    """New factors from the gradient, and the moments carried over to them."""
    key = step_key(state.ascent.seed, state.count, SKETCH)
    found = []
    for paths in plan.groups:
        view, rank = plan.leaves[paths[0]].matrix, plan.leaves[paths[0]].rank
        if config.subspace == POWER_ITERATION:
            found.append(_iterated(config, plan, matrices, state, paths))
            continue
        q, s, r = SUBSPACES[config.subspace]([matrices[path] for path in paths], rank, key)
        found.append(Factors(paths, view.projector(q, r), view.partner(q, r), s))
    new = install(config, plan, state, found)
    moved = transport(config.moment_transport, moments, initial, new.overlaps, config.decays)
    old = (state.q, state.r, state.singular_values)
    # No `where` on each leaf: see `ascend` on fusions that are all different.
    kept = jax.lax.cond(
        new.refreshed,
        lambda: (new.subspaces, moved, new.overlap),
        lambda: (old, moments, state.subspace_overlap),
    )
    return (*kept, new.refreshed)


def _iterated(
    config: LowRankConfig,
    plan: ProjectionPlan,
    matrices: Arrays,
    state: LowRankState,
    paths: tuple[str, ...],
) -> Factors:
    view = plan.leaves[paths[0]].matrix
    old = projectors_of(plan, state.q, state.r)
    g, p, s = (
        stacked([tree[path] for path in paths]) for tree in (matrices, old, state.singular_values)
    )
    g = view.orient(g)
    p, s = power_iteration(g, p.astype(g.dtype), s, state.last_refresh < 0, config.power_decay)
    nothing = jnp.zeros((len(p), p.shape[-1], g.shape[-1]), g.dtype)
    return Factors(paths, p, nothing, s)


def install(
    config: LowRankConfig, plan: ProjectionPlan, state: LowRankState, found: Sequence[Factors]
) -> NewSubspaces:
    """Factors as the state keeps them, their signs turned to those of the old ones in it."""
    old = projectors_of(plan, state.q, state.r)
    q, r, values, overlaps = {}, {}, {}, {}
    finite, squares = [], []
    for paths, projectors, partners, singular_values in found:
        before = stacked([old[path] for path in paths])
        overlap = project(projectors, before.astype(projectors.dtype))
        p, k, overlap = align_signs(projectors, partners, overlap)
        finite += [jnp.sum(jnp.square(p)), jnp.sum(jnp.square(k))]
        squares.append(jnp.mean(jnp.sum(jnp.square(overlap), axis=-1)) * len(p))
        left, right = plan.leaves[paths[0]].matrix.product(p, k)
        batches = [plan.leaves[path].matrix.batch for path in paths]
        parts = (unstacked(stack, batches) for stack in (left, right, singular_values, overlap))
        for path, new_q, new_r, new_s, overlaps[path] in zip(paths, *parts, strict=True):
            # Probes may need fewer rows of the factor that does not project.
            if path in state.q:
                q[path] = new_q[..., : state.q[path].shape[-1]].astype(state.q[path].dtype)
            if path in state.r:
                r[path] = new_r[..., : state.r[path].shape[-2], :].astype(state.r[path].dtype)
            if path in state.singular_values:
                values[path] = new_s.astype(state.singular_values[path].dtype)
    # A decomposition that does not converge gives nan; it stays due, like any failed refresh.
    succeeded = jnp.isfinite(total(finite))
    number = sum(len(one.projectors) for one in found)
    overlap = (total(squares) / number).astype(jnp.float32)
    return NewSubspaces((q, r, values), overlaps, overlap, succeeded)


def projectors_of(plan: ProjectionPlan, q: Arrays, r: Arrays) -> Arrays:
    """P ([b,] k, r) of each projected leaf."""
    return {
        path: leaf.matrix.projector(q.get(path), r.get(path))
        for path, leaf in plan.projected.items()
    }


def carried(
    config: LowRankConfig, count: jax.Array, moments: Any, low: Arrays, overlaps: Arrays
) -> Any:
    """Moments of gradients like ``low`` in subspaces from sketches."""
    initial = config.inner.init(low)

    def carry(kind: str) -> Any:
        return transport(kind, moments, initial, overlaps, config.decays)

    if config.moment_transport != "keep" or config.decays is None:
        return carry(config.moment_transport)
    # While the first subspaces settle they turn at each update, and moments turn with them.
    return jax.lax.cond(count < WARM_UP, lambda: carry("rotate"), lambda: carry("keep"))
