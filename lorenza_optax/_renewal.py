"""New subspaces from a full gradient, and how a state keeps them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._config import LowRankConfig
from lorenza_optax._gradient import SKETCH, step_key
from lorenza_optax._plan import ProjectionPlan
from lorenza_optax._state import LowRankState
from lorenza_optax._subspace import SUBSPACES, align_signs, project
from lorenza_optax._transport import transport

__all__ = ["NewSubspaces", "install", "projectors_of", "renewed", "total"]

Arrays = dict[str, jax.Array]


class NewSubspaces(NamedTuple):
    """Subspaces that serve from the next update on.

    Attributes:
      subspaces: (q, r, singular_values) as the state keeps them.
      overlaps: C = P_newᵀ P_old by path ([b,] r, r).
      refreshed: Whether they are new.
    """

    subspaces: tuple[Any, Any, Any]
    overlaps: Arrays
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
    triplets = SUBSPACES[config.subspace](list(matrices.values()), config.rank, key)
    found = dict(zip(matrices, triplets, strict=True))
    projectors, partners, values = {}, {}, {}
    for path, (q, s, r) in found.items():
        view = plan.leaves[path].matrix
        projectors[path], partners[path] = view.projector(q, r), view.partner(q, r)
        values[path] = s
    new = install(config, plan, state, projectors, partners, values)
    carried = transport(config.moment_transport, moments, initial, new.overlaps, config.decays)
    old = (state.q, state.r, state.singular_values)
    kept = jax.tree.map(
        lambda n, o: jnp.where(new.refreshed, n, o), (new.subspaces, carried), (old, moments)
    )
    return (*kept, new.refreshed)


def install(
    config: LowRankConfig,
    plan: ProjectionPlan,
    state: LowRankState,
    projectors: Arrays,
    partners: Arrays,
    values: Arrays,
) -> NewSubspaces:
    """Factors in the oriented view as the state keeps them, their signs turned to the old ones.

    Args:
      config: The method.
      plan: Its plan for these leaves.
      state: The state with the old factors.
      projectors: P ([b,] k, r).
      partners: K ([b,] r, l).
      values: Singular values ([b,] r).
    """
    old = projectors_of(plan, state.q, state.r)
    q, r, overlaps = {}, {}, {}
    for path, leaf in plan.projected.items():
        overlap = project(projectors[path], old[path].astype(projectors[path].dtype))
        p, k, overlaps[path] = align_signs(projectors[path], partners[path], overlap)
        left, right = leaf.matrix.product(p, k)
        if path in state.q:
            q[path] = left[..., : state.q[path].shape[-1]].astype(state.q[path].dtype)
        if path in state.r:
            r[path] = right[..., : state.r[path].shape[-2], :].astype(state.r[path].dtype)
    # A decomposition that does not converge gives nan; it stays due, like any failed refresh.
    factors = (*q.values(), *r.values())
    succeeded = jnp.isfinite(total(jnp.sum(f.astype(jnp.float32)) for f in factors))
    kept = {path: values[path].astype(s.dtype) for path, s in state.singular_values.items()}
    return NewSubspaces((q, r, kept), overlaps, succeeded)


def projectors_of(plan: ProjectionPlan, q: Arrays, r: Arrays) -> Arrays:
    """P ([b,] k, r) of each projected leaf."""
    return {
        path: leaf.matrix.projector(q.get(path), r.get(path))
        for path, leaf in plan.projected.items()
    }


def total(numbers: Iterable[jax.Array]) -> jax.Array:
    """Their sum, in at least float32."""
    return sum(numbers, jnp.zeros((), jnp.float32))
