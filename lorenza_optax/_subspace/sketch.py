r"""New subspaces without a full gradient: from two products with it that one backward pass yields.

With the gradient G of a leaf in its oriented view (k, l), the projector P (k, r) and rows K
(r, l) that are close to its leading right singular vectors, differentiating the loss at
W + P N + B Ωᵀ by N and by B, at B = 0, gives

    ĝ = Pᵀ G  and  Y = G Ω,  with  Ω = [Kᵀ, a few Gaussian columns],

and the new factors are the leading left singular vectors of Y and right singular vectors of ĝ:
one step of subspace iteration from each side, which goes on from refresh to refresh. Nothing of
the size of the leaf is formed. (A single-pass randomized SVD, its core by least squares from as
many sketches, captures as much, 0.998 of the best energy on real gradients, and 0.999 from twice
as many: benchmarks/results/refresh.json.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._linalg.decompositions import OVERSAMPLING, leading_left, orthonormal, total
from lorenza_optax._subspace.subspace import Factors

__all__ = ["WARM_UP", "energy_of", "factors_from", "random_projectors", "sketch_rows"]

WARM_UP = 3
"""Refreshes at the first updates, until subspaces that began at random have settled."""

Arrays = Mapping[str, jax.Array]


def random_projectors(
    shapes: Mapping[str, tuple[tuple[int, ...], int, int]], key: jax.Array
) -> dict[str, jax.Array]:
    """Orthonormal P ([b,] k, r) to begin with, from (batch, k, r) by path."""
    rows = max(k for _, k, _ in shapes.values())
    rank = max(r for _, _, r in shapes.values())
    noise = jax.random.normal(key, (rows, rank))
    bases: dict[Any, jax.Array] = {}
    for _, k, r in shapes.values():
        if (k, r) not in bases:
            bases[k, r] = orthonormal(noise[:k, :r])
    # Copies: one array in two leaves of a state could not be donated.
    return {
        path: jnp.array(jnp.broadcast_to(bases[k, r], (*b, k, r)))
        for path, (b, k, r) in shapes.items()
    }


def sketch_rows(rows: Arrays, projectors: Arrays, key: jax.Array) -> dict[str, jax.Array]:
    """Ωᵀ ([b,] r + p, l): the given rows of each leaf, scaled to length 1, and Gaussian ones.

    There are r + p <= k of them. A row that is zero, as before the first update, is replaced by
    a Gaussian one. The Gaussian rows are the same for all leaves, cut to size.
    """
    rank = max(k.shape[-2] for k in rows.values()) + OVERSAMPLING
    noise = jax.random.normal(key, (rank, max(k.shape[-1] for k in rows.values())))
    columns = {}
    for path, k in rows.items():
        r, length = k.shape[-2:]
        k = k.astype(jnp.promote_types(k.dtype, jnp.float32))
        fresh = (noise[:, :length] / jnp.sqrt(length)).astype(k.dtype)
        norms = jnp.linalg.norm(k, axis=-1, keepdims=True)
        extra = min(OVERSAMPLING, projectors[path].shape[-2] - r)
        old = jnp.where(norms > 0, k / jnp.where(norms > 0, norms, 1), fresh[OVERSAMPLING:][:r])
        more = jnp.broadcast_to(fresh[:extra], (*k.shape[:-2], extra, length))
        columns[path] = jnp.concatenate([old, more], axis=-2)
    return columns


def factors_from(low: jax.Array, sketch: jax.Array) -> Factors:
    """New factors from stacks of ĝ (B, r, l) and Y (B, k, r + p)."""
    rank = low.shape[-2]
    left, _ = leading_left(sketch, rank)
    right, values = leading_left(low.mT, rank)
    return Factors(left, right.mT, values)


def energy_of(low: Arrays, sketches: Arrays) -> jax.Array:
    """‖G‖² over all leaves, estimated from the Gaussian columns of Y."""
    energies = []
    for path, y in sketches.items():
        gaussian = y[..., low[path].shape[-2] :]
        free = low[path].shape[-1]
        energies.append(jnp.sum(jnp.square(gaussian)) * (free / gaussian.shape[-1]))
    return total(energies)
