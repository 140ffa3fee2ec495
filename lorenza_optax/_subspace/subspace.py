"""The subspace of a matrix: how its factors are chosen, and moving in and out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._linalg.decompositions import (
    exact_svds,
    matmul,
    orthonormal,
    product,
    randomized_svds,
)

__all__ = [
    "POWER_ITERATION",
    "RANDOM",
    "SUBSPACES",
    "Factors",
    "RandomSubspace",
    "align_signs",
    "lift",
    "power_iteration",
    "project",
]


class Factors(NamedTuple):
    """New factors of matrices that are alike, in the oriented view.

    Attributes:
      projectors: P (B, k, r).
      partners: K (B, r, l), orthonormal rows.
      values: Singular values (B, r), or of a power iteration the matrix S (B, r, r).
    """

    projectors: jax.Array
    partners: jax.Array
    values: jax.Array


# name -> (matrices ([b,] m, n) of one shape, rank, key) -> stacks q (B, m, r), s (B, r) and
# r (B, r, n). Q and R are orthonormal, so the space outside them is well defined (_residual/).
SUBSPACES: dict[str, Callable[..., Any]] = {"randomized_svd": randomized_svds, "svd": exact_svds}


POWER_ITERATION = "power_iteration"


class RandomSubspace(NamedTuple):
    """A way to draw projectors without a gradient.

    Attributes:
      of_normal: N(0, 1) of shape ([b,] k, r) -> P.
      overlap: (k, r) -> the factor of P_newᵀ P_old by which moments are carried over.
      is_kept: Whether P is kept in the state, and not drawn again at each update.
      is_orthonormal: Whether Pᵀ P = I.
    """

    of_normal: Callable[[jax.Array], jax.Array]
    overlap: Callable[[int, int], float]
    is_kept: bool
    is_orthonormal: bool


RANDOM: dict[str, RandomSubspace] = {
    # E P Pᵀ = I, so that lifting what was projected is right in expectation.
    "gaussian": RandomSubspace(
        lambda normal: normal / normal.shape[-1] ** 0.5, lambda k, r: 1.0, False, False
    ),
    # E Pᵀ P / k = I.
    "unit_gaussian": RandomSubspace(lambda normal: normal, lambda k, r: 1 / k, False, False),
    "orthonormal": RandomSubspace(orthonormal, lambda k, r: 1.0, True, True),
}


def power_iteration(
    matrices: jax.Array, old: jax.Array, s: jax.Array, first: jax.Array, decay: Any
) -> tuple[jax.Array, jax.Array]:
    r"""The projectors of COSMOS, one step of power iteration on a running mean of G Gᵀ.

    .. math::
      P \leftarrow \mathrm{QR}(\beta P S + (1 - \beta) G G^\top P), \quad
      S \leftarrow P^\top (\beta P_{old} S P_{old}^\top + (1 - \beta) G G^\top) P .

    Args:
      matrices: G (B, k, l), in the oriented view.
      old: P (B, k, r).
      s: S (B, r, r).
      first: Whether there is no P yet: then it is taken from the SVD of G.
      decay: β.

    Returns:
      P, with the signs of the old one, and S.
    """

    def start() -> jax.Array:
        return exact_svds([matrices], old.shape[-1], jax.random.key(0))[0]

    def step() -> jax.Array:
        grown = matmul(matrices, project(old, matrices).mT)
        return orthonormal(decay * matmul(old, s) + (1 - decay) * grown)

    p = jax.lax.cond(first, start, step)
    overlap = project(p, old)
    signs = jnp.where(jnp.diagonal(overlap, axis1=-2, axis2=-1) < 0, -1, 1).astype(p.dtype)
    p, overlap = p * signs[..., None, :], overlap * signs[..., :, None]
    low = project(p, matrices)
    s = decay * matmul(matmul(overlap, s), overlap.mT) + (1 - decay) * matmul(low, low.mT)
    return p, s


def align_signs(
    q: jax.Array, r: jax.Array, overlap: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns new singular vectors so that none points against its predecessor.

    A pair (q_i, r_i) is unique only up to a common sign. Moments kept over a refresh belong to
    the old signs, so a flip would turn them round.

    Args:
      q: New left factor, ([b,] m, r).
      r: New right factor, ([b,] r, n).
      overlap: C = P_newᵀ P_old, ([b,] r, r); zero before the first refresh.

    Returns:
      q, r and the overlap, with signs turned so that C has no negative diagonal entry.
    """
    signs = jnp.where(jnp.diagonal(overlap, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
    return q * signs[..., None, :], r * signs[..., :, None], overlap * signs[..., :, None]


def project(projector: jax.Array, matrix: jax.Array) -> jax.Array:
    """Pᵀ G: ([b,] k, r), ([b,] k, l) -> ([b,] r, l)."""
    return matmul(projector.astype(matrix.dtype).swapaxes(-1, -2), matrix)


def lift(projector: jax.Array, low: jax.Array) -> jax.Array:
    """P N: ([b,] k, r), ([b,] r, l) -> ([b,] k, l)."""
    return product(projector.astype(low.dtype), low)
