"""The subspace of a matrix: how its factors are chosen, and moving in and out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._linalg import exact_svds, matmul, randomized_svds

__all__ = ["SUBSPACES", "Factors", "align_signs", "lift", "project"]


class Factors(NamedTuple):
    """New factors of leaves whose matrices are alike, in the oriented view; one stack for all.

    Attributes:
      paths: The leaves, in the order of the stacks.
      projectors: P (B, k, r).
      partners: K (B, r, l), orthonormal rows.
      values: Singular values (B, r).
    """

    paths: tuple[str, ...]
    projectors: jax.Array
    partners: jax.Array
    values: jax.Array


# name -> (matrices ([b,] m, n) of one shape, rank, key) -> stacks q (B, m, r), s (B, r) and
# r (B, r, n). Q and R are orthonormal, so the space outside them is well defined (_residual.py).
SUBSPACES: dict[str, Callable[..., Any]] = {"randomized_svd": randomized_svds, "svd": exact_svds}


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
    return matmul(projector.astype(low.dtype), low)
