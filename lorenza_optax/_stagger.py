"""Refreshes from full gradients, a few matrices at each update instead of all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._config import LowRankConfig
from lorenza_optax._plan import ProjectionPlan
from lorenza_optax._state import LowRankState
from lorenza_optax._subspace import SUBSPACES, align_signs, project

__all__ = ["staggered"]

Arrays = dict[str, jax.Array]


def staggered(
    config: LowRankConfig,
    plan: ProjectionPlan,
    matrices: Arrays,
    state: LowRankState,
    usable: jax.Array,
    key: jax.Array,
) -> tuple[tuple[Any, Any, Any], jax.Array, jax.Array]:
    """Refreshes the matrices whose turn it is: each has one in T updates.

    All matrices of one shape, layers of a stack included, share one decomposition in the
    program, which takes the matrix of this update out of them.

    Args:
      config: The method.
      plan: Its plan.
      matrices: Gradients ([b,] m, n) of the projected leaves by path.
      state: The state before the update.
      usable: Whether the gradient is finite; otherwise a turn is lost.
      key: For the sketch.

    Returns:
      The subspaces, the ``subspace_overlap`` of the new ones, and whether there are any.
    """
    phase, gap = state.count % config.update_proj_gap, config.update_proj_gap
    now = (state.q, state.r, state.singular_values), jnp.zeros(())
    number = jnp.zeros((), jnp.int32)
    for paths in plan.groups:
        layers = [(path, layer) for path in paths for layer in _layers(matrices[path])]
        # The matrices whose share of the T updates begins in this one.
        start, stop = (-((-(phase + i) * len(layers)) // gap) for i in (0, 1))
        stop = jnp.where(usable, stop, start)
        number += stop - start
        now = jax.lax.fori_loop(
            start,
            stop,
            lambda i, now, layers=layers: _refresh_one(config, plan, layers, matrices, now, i, key),
            now,
        )
    subspaces, overlaps = now
    refreshed = number > 0
    overlap = jnp.where(refreshed, overlaps / jnp.maximum(number, 1), state.subspace_overlap)
    return subspaces, overlap, refreshed


def _layers(matrix: jax.Array) -> Sequence[int | None]:
    return range(matrix.shape[0]) if matrix.ndim == 3 else (None,)


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
    good = jnp.isfinite(jnp.sum(new_q) + jnp.sum(new_r))
    chosen = jnp.where(good, index, len(layers))  # beyond them: leave all as it is

    def install(place: tuple[str, int | None]) -> tuple[Any, Any, Any]:
        return put(q, place, left), put(r, place, right), put(values, place, new_s)

    installs = [lambda place=p: install(place) for p in layers]
    share = jnp.sum(jnp.square(overlap)) / overlap.shape[-1]
    overlaps += jnp.where(good, share, 0).astype(overlaps.dtype)
    return jax.lax.switch(chosen, [*installs, lambda: subspaces]), overlaps
