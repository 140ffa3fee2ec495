"""New subspaces, and how a state keeps them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._ascent.gradient import SKETCH, step_key
from lorenza_optax._inner.transport import transport
from lorenza_optax._linalg.decompositions import total
from lorenza_optax._linalg.stacks import overwritten, stacked
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._plan.plan import LeafPlan, ProjectionPlan, Stack
from lorenza_optax._subspace.subspace import (
    POWER_ITERATION,
    SUBSPACES,
    Factors,
    align_signs,
    power_iteration,
    project,
)

__all__ = [
    "NewSubspaces",
    "carried",
    "from_gradient",
    "projectors_of",
    "renewed",
    "unchanged",
]

Arrays = dict[str, jax.Array]
Stacks = dict[str, jax.Array]

# A head that begins at zero hides the gradient of what is below it in one update, and a warm-up of
# the learning rate from 0 in one more.
FIRST_TRIES = 4

Find = Callable[[LeafPlan, list[Any], Stacks], Factors]
"""(any of some like leaves, what is known of them, what the state keeps) -> their new factors."""


class NewSubspaces(NamedTuple):
    """Subspaces after a refresh, if there was one.

    Attributes:
      subspaces: (q, r, singular_values) as the state keeps them.
      overlaps: C = P_newᵀ P_old by path ([b,] r, r).
      overlap: The mean of ‖C‖² / r over all matrices.
      refreshed: Whether all of them are new. A matrix whose decomposition does not converge keeps
        its old subspace, and the refresh stays due. So does one whose gradient is zero, which has
        no directions; for that a refresh stays due in the first few updates only, as a matrix
        may be unused.
      changed: Whether the inner state has to follow; the overlaps say how.
    """

    subspaces: tuple[Any, Any, Any]
    overlaps: Arrays
    overlap: Any
    refreshed: Any
    changed: Any


def unchanged(plan: ProjectionPlan, state: LowRankState) -> NewSubspaces:
    """The subspaces of the state; of overlaps only the shape is right."""
    overlaps = {
        path: jnp.zeros((*leaf.matrix.batch, leaf.rank, leaf.rank), leaf.compute_dtype)
        for path, leaf in plan.projected.items()
    }
    old = (state.q, state.r, state.singular_values)
    no = jnp.zeros((), bool)
    return NewSubspaces(old, overlaps, state.subspace_overlap, no, no)


def renewed(
    plan: ProjectionPlan,
    state: LowRankState,
    known: list[Arrays],
    find: Find,
    active: jax.typing.ArrayLike,
) -> NewSubspaces:
    """New factors in the place of the old ones, their signs turned to those.

    Args:
      plan: The plan.
      state: The state, with the old factors.
      known: What ``find`` needs, by path.
      find: Finds new factors.
      active: Whether a refresh is due and can be made; if not, all is as it was.
    """
    before = unchanged(plan, state)
    q, r, values = before.subspaces
    good = {p: jnp.ones(leaf.matrix.batch, bool) for p, leaf in plan.projected.items()}
    kept = {"q": q, "r": r, "values": values, "overlap": before.overlaps}
    kept |= {"good": good, "found": good}
    new: dict[str, Arrays] = {name: {} for name in kept}
    for paths, batches, in_turn in plan.stacks:
        old = {
            name: [tree[path] for path in paths] for name, tree in kept.items() if paths[0] in tree
        }
        given = [[tree[path] for path in paths] for tree in known]
        renew = functools.partial(_renew, plan.leaves[paths[0]], find)
        found = overwritten(renew, old, given, batches, active, in_turn)
        for name, leaves in found.items():
            new[name] |= dict(zip(paths, leaves, strict=True))
    goods = new["good"].values()
    number = sum(good.size for good in goods)
    failed = total(jnp.sum(~good) for good in goods)
    lacking = total(jnp.sum(~found) for found in new["found"].values())
    waits = (state.last_refresh < 0) & (state.count - state.skipped < FIRST_TRIES - 1)
    refreshed = jnp.asarray(active) & (jnp.where(waits, lacking, failed) == 0)
    changed = jnp.asarray(active) & (failed < number)
    shares = (jnp.sum(jnp.square(c)) / c.shape[-1] for c in new["overlap"].values())
    mean = total(shares) / number
    overlap = jnp.where(refreshed, mean.astype(jnp.float32), state.subspace_overlap)
    subspaces = new["q"], new["r"], new["values"]
    return NewSubspaces(subspaces, new["overlap"], overlap, refreshed, changed)


def _renew(leaf: LeafPlan, find: Find, old: Stacks, known: list[Any]) -> Stacks:
    """A stack of matrices with new factors, but for those of which none were found.

    "good" says whose decomposition converged, and "found" whose gradient was not zero either.
    """
    view = leaf.matrix
    p, k, values = find(leaf, known, old)
    p_old = view.projector(old.get("q"), old.get("r"))
    p, k, overlap = align_signs(p, k, project(p, p_old.astype(p.dtype)))
    good = jnp.isfinite(jnp.sum(p * p, (-2, -1)) + jnp.sum(k * k, (-2, -1)))
    found = good & ~functools.reduce(jnp.logical_and, map(_are_zero, known))
    # The first time any directions will do: without some the matrix would not move at all.
    taken = found | (good & ~jnp.any(p_old != 0, (-2, -1)))
    left, right = view.product(p, k)
    new = {"q": left, "r": right, "values": values, "overlap": overlap}
    told = {"good": good, "found": found}
    same = jnp.eye(leaf.rank, dtype=old["overlap"].dtype)
    old = old | {"overlap": jnp.broadcast_to(same, overlap.shape)}

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        # Probes may need fewer rows of the factor that does not project.
        new = new[tuple(slice(size) for size in old.shape)].astype(old.dtype)
        return jnp.where(taken.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return {name: told[name] if name in told else chosen(new[name], old[name]) for name in old}


def _are_zero(leaves: list[jax.Array]) -> jax.Array:
    """Of each matrix of a stack (B) whether it is zero."""
    return stacked([jnp.all(g == 0, (-2, -1)) for g in leaves], [g.shape[:-2] for g in leaves])


def from_gradient(
    config: LowRankConfig,
    plan: ProjectionPlan,
    state: LowRankState,
    matrices: Arrays,
    active: jax.typing.ArrayLike,
) -> NewSubspaces:
    """New subspaces from the gradient ([b,] m, n) of each projected leaf."""
    key = step_key(state.ascent.seed, state.count, SKETCH)

    def decomposed(leaf: LeafPlan, known: list[Any], old: Stacks) -> Factors:
        del old
        q, s, r = SUBSPACES[config.subspace](known[0], leaf.rank, key)
        return Factors(leaf.matrix.projector(q, r), leaf.matrix.partner(q, r), s)

    def iterated(leaf: LeafPlan, known: list[Any], old: Stacks) -> Factors:
        view = leaf.matrix
        g = view.orient(stacked(known[0], [g.shape[:-2] for g in known[0]]))
        g = g.astype(leaf.compute_dtype)
        p = view.projector(old.get("q"), old.get("r")).astype(g.dtype)
        first = state.last_refresh < 0
        p, s = power_iteration(g, p, old["values"], first, config.power_decay)
        return Factors(p, jnp.zeros((len(p), p.shape[-1], g.shape[-1]), g.dtype), s)

    find = iterated if config.subspace == POWER_ITERATION else decomposed
    return renewed(plan, state, [matrices], find, active)


def projectors_of(plan: ProjectionPlan, q: Arrays, r: Arrays) -> Arrays:
    """P ([b,] k, r) of each projected leaf."""
    return {
        path: leaf.matrix.projector(q.get(path), r.get(path))
        for path, leaf in plan.projected.items()
    }


def carried(
    config: LowRankConfig,
    stacks: Sequence[Stack],
    moments: Any,
    initial: Any,
    overlaps: Arrays,
    changed: Any,
    settling: Any = None,
) -> Any:
    """The inner state in new subspaces, if they have changed.

    While the first subspaces from sketches are ``settling`` they turn at each update, and moments
    turn with them even where they are kept else.
    """
    kind = config.moment_transport
    if kind == "keep" and config.decays is not None and settling is not None:
        kind, changed = "rotate", changed & settling
    return transport(kind, moments, initial, overlaps, config.decays, changed, stacks)
