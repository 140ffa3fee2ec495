"""Refreshes of some matrices only: those whose turn it is, or whose gradient stands still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._linalg.decompositions import total
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._plan.plan import ProjectionPlan
from lorenza_optax._subspace.subspace import SUBSPACES, align_signs, project

__all__ = ["Chosen", "displaced", "in_turn", "moved_on", "refresh_some", "standing_still"]

Arrays = dict[str, jax.Array]


class Chosen(NamedTuple):
    """Which matrices of a group are refreshed: ``order[start:stop]``.

    Attributes:
      order: Indices among the matrices of the group's shape, layers of a stack included.
      start: The first.
      stop: The one after the last.
    """

    order: jax.Array
    start: Any
    stop: Any


def in_turn(config: LowRankConfig, plan: ProjectionPlan, count: jax.Array) -> list[Chosen]:
    """Those whose share of the T updates begins in this one: each has one turn in T updates."""
    phase, gap = count % config.update_proj_gap, config.update_proj_gap
    chosen = []
    for paths in plan.groups:
        number = len(plan.matrices(paths))
        start, stop = (-((-(phase + i) * number) // gap) for i in (0, 1))
        chosen.append(Chosen(jnp.arange(number), start, stop))
    return chosen


def standing_still(
    config: LowRankConfig,
    plan: ProjectionPlan,
    projectors: Arrays,
    matrices: Arrays,
    state: LowRankState,
) -> Arrays:
    """Lotus's rule: whether each matrix's gradient moves too little, ([b]) by path.

    With d = PᵀG / ‖PᵀG‖ and d₀ that at the last refresh, ‖d - d₀‖ / age < γ, looked at when η
    divides the age.
    """
    assert config.displacement is not None
    every, threshold = config.displacement
    ages = {path: age + 1 for path, age in state.displacement["age"].items()}

    def look() -> Arrays:
        found = {}
        for path, age in ages.items():
            oriented = plan.leaves[path].matrix.orient(matrices[path])
            moved = _direction(project(projectors[path], oriented))
            moved -= state.displacement["direction"][path]
            speed = jnp.linalg.norm(moved, axis=(-2, -1)) / age
            # A gradient of zero does not stand still: it has no direction.
            moves = jnp.any(matrices[path] != 0, (-2, -1))
            found[path] = (age % every == 0) & (speed < threshold) & moves
        return found

    looks = total(jnp.sum(age % every == 0) for age in ages.values()) > 0
    nothing = {path: jnp.zeros(age.shape, bool) for path, age in ages.items()}
    return jax.lax.cond(looks, look, lambda: nothing)


def displaced(plan: ProjectionPlan, switched: Arrays) -> list[Chosen]:
    """The matrices that a mask by path chooses."""
    chosen = []
    for paths in plan.groups:
        mask = jnp.concatenate([switched[path].reshape(-1) for path in paths])
        chosen.append(Chosen(jnp.argsort(~mask), 0, jnp.sum(mask)))
    return chosen


def moved_on(switched: Arrays, low: Arrays, state: LowRankState) -> dict[str, Arrays]:
    """Lotus's memory after an update: directions of refreshed matrices, and ages."""
    directions, ages = {}, {}
    for path, new in switched.items():
        old = state.displacement["direction"][path]
        directions[path] = jnp.where(new[..., None, None], _direction(low[path]), old)
        ages[path] = jnp.where(new, 1, state.displacement["age"][path] + 1)
    return {"direction": directions, "age": ages}


def _direction(low: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(low, axis=(-2, -1), keepdims=True)
    return low / jnp.where(norm > 0, norm, 1)


def refresh_some(
    config: LowRankConfig,
    plan: ProjectionPlan,
    matrices: Arrays,
    state: LowRankState,
    chosen: Sequence[Chosen],
    key: jax.Array,
) -> tuple[tuple[Any, Any, Any], jax.Array, jax.Array]:
    """Refreshes the chosen matrices.

    All matrices of one shape, layers of a stack included, share one decomposition in the
    program, which takes the matrix out of them.

    Args:
      config: The method.
      plan: Its plan.
      matrices: Gradients ([b,] m, n) of the projected leaves by path.
      state: The state before the update.
      chosen: For each group of the plan.
      key: For the sketch.

    Returns:
      The subspaces, the ``subspace_overlap`` of the new ones, and whether there are any.
    """
    now = (state.q, state.r, state.singular_values), jnp.zeros((), jnp.float32)
    number = jnp.zeros((), jnp.int32)
    for paths, (order, start, stop) in zip(plan.groups, chosen, strict=True):
        layers = plan.matrices(paths)
        number += stop - start

        def refresh(i: jax.Array, now: Any, layers: Any = layers, order: Any = order) -> Any:
            return _refresh_one(config, plan, layers, matrices, now, order[i], key)

        now = jax.lax.fori_loop(start, stop, refresh, now)
    subspaces, overlaps = now
    refreshed = number > 0
    overlap = jnp.where(refreshed, overlaps / jnp.maximum(number, 1), state.subspace_overlap)
    return subspaces, overlap, refreshed


def _refresh_one(
    config: LowRankConfig,
    plan: ProjectionPlan,
    layers: Sequence[tuple[str, int | None]],
    matrices: Arrays,
    now: tuple[tuple[Any, Any, Any], jax.Array],
    index: jax.Array,
    key: jax.Array,
) -> tuple[tuple[Any, Any, Any], jax.Array]:
    """New factors of the matrix with this index among those of its shape, and ‖C‖²/r added."""

    def pick(tree: Arrays, place: tuple[str, int | None]) -> jax.Array | None:
        path, layer = place
        if path not in tree:
            return None
        return tree[path] if layer is None else tree[path][layer]

    def put(tree: Arrays, place: tuple[str, int | None], value: jax.Array | None) -> Arrays:
        path, layer = place
        if path not in tree or value is None:
            return tree
        value = value.astype(tree[path].dtype)
        return {**tree, path: value if layer is None else tree[path].at[layer].set(value)}

    subspaces, overlaps = now
    q, r, values = subspaces
    matrix, old_q, old_r = jax.lax.switch(
        index, [lambda place=p: (pick(matrices, place), pick(q, place), pick(r, place))
                for p in layers]
    )  # fmt: skip
    leaf = plan.leaves[layers[0][0]]
    stack = SUBSPACES[config.subspace]([matrix], leaf.rank, key)
    new_q, new_s, new_r = (factor[0] for factor in stack)
    view = leaf.matrix
    projector, old = view.projector(new_q, new_r), view.projector(old_q, old_r)
    overlap = project(projector, old.astype(projector.dtype))
    projector, partner, _ = align_signs(projector, view.partner(new_q, new_r), overlap)
    left, right = view.product(projector, partner)
    left = None if old_q is None else left[..., : old_q.shape[-1]]
    right = None if old_r is None else right[..., : old_r.shape[-2], :]
    good = jnp.isfinite(jnp.sum(new_q) + jnp.sum(new_r)) & jnp.any(matrix != 0)
    chosen = jnp.where(good, index, len(layers))  # beyond them: leave all as it is

    def install(place: tuple[str, int | None]) -> tuple[Any, Any, Any]:
        return put(q, place, left), put(r, place, right), put(values, place, new_s)

    installs = [lambda place=p: install(place) for p in layers]
    share = jnp.sum(jnp.square(overlap)) / overlap.shape[-1]
    overlaps += jnp.where(good, share, 0).astype(overlaps.dtype)
    return jax.lax.switch(chosen, [*installs, lambda: subspaces]), overlaps
