"""Decompositions of (stacks of) matrices. Nothing here knows of trees or optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "OVERSAMPLING",
    "exact_svd",
    "exact_svds",
    "leading_left",
    "matmul",
    "orthonormal",
    "randomized_svd",
    "randomized_svds",
]

OVERSAMPLING = 8
LARGE = 256  # rows


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of (stacks of) matrices in full float32, also where the default is TF32."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _by_shape(function: Callable[[jax.Array], Any], matrices: Sequence[jax.Array]) -> list[Any]:
    """A function of (stacks of) matrices, applied to all of equal shape and dtype together.

    A program with one decomposition for many matrices compiles faster, and on an accelerator
    runs faster, than one with many.
    """
    groups: dict[Any, list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape[-2:], matrix.dtype), []).append(index)
    results: list[Any] = [None] * len(matrices)
    for (shape, _), members in groups.items():
        stacks = [matrices[i].reshape(-1, *shape) for i in members]
        # XLA runs independent LAPACK calls, and those of a batch, at the same time, and the
        # OpenBLAS below was seen to deadlock then (jaxlib 0.10.2): on a CPU they take turns.
        whole = jax.lax.platform_dependent(
            jnp.concatenate(stacks),
            cpu=lambda stack: jax.lax.map(function, stack),
            default=function,
        )
        start = 0
        for i, stack in zip(members, stacks, strict=True):
            batch = matrices[i].shape[:-2]
            part = slice(start, start := start + stack.shape[0])
            results[i] = jax.tree.map(
                lambda x, part=part, batch=batch: x[part].reshape(*batch, *x.shape[1:]), whole
            )
    return results


def _cholesky_qr(y: jax.Array) -> jax.Array:
    lower = jnp.linalg.cholesky(matmul(y.mT, y))
    return jax.lax.linalg.triangular_solve(lower, y, left_side=False, lower=True, transpose_a=True)


def orthonormal(y: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns of ([b,] m, k), m >= k.

    On a CPU, and for small matrices, Householder's QR. On accelerators, where that is slow, two
    rounds of Cholesky-QR: products and a k × k factorization. It needs a condition number below
    1e3 or so (of squares in float32); where its result is not orthonormal to round-off,
    Householder's takes over.
    """
    householder = lambda y: jnp.linalg.qr(y)[0]  # noqa: E731
    if y.shape[-2] < LARGE:
        return householder(y)
    return jax.lax.platform_dependent(y, cpu=householder, default=_cholesky_or_householder)


def _cholesky_or_householder(y: jax.Array) -> jax.Array:
    lengths = jnp.linalg.norm(y, axis=-2, keepdims=True)
    y = y / jnp.where(lengths > 0, lengths, 1)
    q = _cholesky_qr(_cholesky_qr(y))
    error = jnp.max(jnp.abs(matmul(q.mT, q) - jnp.eye(q.shape[-1], dtype=q.dtype)))
    # Also false for nan, which a Cholesky factorization gives where it breaks down.
    good = error < 64 * jnp.finfo(q.dtype).eps
    return jax.lax.cond(good, lambda: q, lambda: jnp.linalg.qr(y)[0])


def leading_left(matrices: Sequence[jax.Array], rank: int) -> list[tuple[jax.Array, jax.Array]]:
    """The leading left singular vectors ([b,] m, r) and values ([b,] r) of tall ([b,] m, k)."""
    scaled = [_scaled(matrix) for matrix in matrices]
    bases = _by_shape(orthonormal, [matrix for matrix, _ in scaled])
    cores = [matmul(q.mT, y) for q, (y, _) in zip(bases, scaled, strict=True)]
    parts = _by_shape(lambda core: jnp.linalg.svd(core)[:2], cores)
    return [
        (matmul(q, u[..., :rank]), s[..., :rank] * scale)
        for q, (u, s), (_, scale) in zip(bases, parts, scaled, strict=True)
    ]


def _scaled(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In at least float32 with the largest entry 1, and the scale ([b,] 1).

    Squares of entries below 1e-19 or above 1e19 leave float32.
    """
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    scale = jnp.max(jnp.abs(matrix), axis=(-2, -1))
    scale = jnp.where(scale > 0, scale, 1)
    return matrix / scale[..., None, None], scale[..., None]


def _check(matrix: jax.Array, rank: int) -> None:
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have 2 dimensions, got shape {matrix.shape}; use jax.vmap.")
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank must be between 1 and min(m, n) = {min(matrix.shape)} for a matrix of shape"
            f" {matrix.shape}, got {rank}."
        )


def _fix_signs(u: jax.Array, vt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes the largest entry of each left vector positive, so that results are unique."""
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=-2, keepdims=True), axis=-2)
    signs = jnp.where(largest < 0, -1, 1).astype(u.dtype)
    return u * signs, vt * signs.mT


@functools.partial(jax.jit, static_argnames=("rank", "oversampling", "power_iterations"))
def randomized_svd(
    matrix: jax.Array,
    rank: int,
    key: jax.Array,
    *,
    oversampling: int = 8,
    power_iterations: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The leading singular triplets of a matrix, from a random sketch of its range.

    With a Gaussian :math:`\Omega` of shape (n, r + p):

    .. math::
      Q_0 = \mathrm{orth}\big((G G^\top)^{k} G \Omega\big), \quad
      Q_0^\top G = U' \Sigma V^\top, \quad G \approx (Q_0 U') \Sigma V^\top,

    orthonormalized between any two of the products, so that singular values down to round-off
    are told apart, by Cholesky-QR or, where that breaks down, Householder's QR. The small factor
    goes through an orthonormal basis of its own rows, so both ``u`` and ``vt`` are orthonormal
    to round-off also where singular values decay, vanish, or the matrix is zero. Cost O(mnr); no
    decomposition of the matrix itself.

    Args:
      matrix: The matrix G, shape (m, n), any float dtype; computed in at least float32.
      rank: Number r of triplets, 1 to min(m, n).
      key: A PRNG key for the sketch.
      oversampling: Extra sketch columns p; r + p is cut at min(m, n).
      power_iterations: Number k of power iterations; each costs two more products with G
        and sharpens the subspace where singular values decay slowly.

    Returns:
      ``(u, s, vt)`` of shapes (m, r), (r,) descending, (r, n); the largest entry of each
      column of ``u`` is positive.

    Raises:
      ValueError: If the matrix is not 2-D, or ``rank`` exceeds min(m, n).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from lorenza_optax import randomized_svd
      >>> matrix = jnp.outer(jnp.arange(1.0, 6.0), jnp.ones(7))
      >>> u, s, vt = randomized_svd(matrix, 1, jax.random.key(0))
      >>> print(u.shape, s.shape, vt.shape, bool(jnp.allclose(u * s @ vt, matrix, atol=1e-4)))
      (5, 1) (1,) (1, 7) True

    References:
      Halko, Martinsson, Tropp, `Finding structure with randomness
      <https://arxiv.org/abs/0909.4061>`_, 2011
    """
    if oversampling < 0 or power_iterations < 0:
        raise ValueError(
            "oversampling and power_iterations must not be negative, got"
            f" {oversampling} and {power_iterations}."
        )
    _check(matrix, rank)
    (triplets,) = randomized_svds(
        [matrix], rank, key, oversampling=oversampling, power_iterations=power_iterations
    )
    return triplets


def randomized_svds(
    matrices: Sequence[jax.Array],
    rank: int,
    key: jax.Array,
    *,
    oversampling: int = OVERSAMPLING,
    power_iterations: int = 1,
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """:func:`randomized_svd` of many (stacks of) matrices ([b,] m, n) at once.

    All share one sketch, cut to size: it need only be independent of each of them, and the
    program then has one generator. Products are taken one by one, decompositions together.
    """
    scaled = [_scaled(matrix) for matrix in matrices]
    ones = [matrix for matrix, _ in scaled]
    widths = [min(rank + oversampling, *matrix.shape[-2:]) for matrix in ones]
    dtype = jnp.result_type(*ones)
    sketch = jax.random.normal(key, (max(m.shape[-1] for m in ones), max(widths)), dtype)
    left = [matmul(one, sketch[: one.shape[-1], :width].astype(one.dtype))
            for one, width in zip(ones, widths, strict=True)]  # fmt: skip
    left = _by_shape(orthonormal, left)
    for _ in range(power_iterations):
        right = [matmul(one.mT, q) for one, q in zip(ones, left, strict=True)]
        right = _by_shape(orthonormal, right)
        left = [matmul(one, q) for one, q in zip(ones, right, strict=True)]
        left = _by_shape(orthonormal, left)
    small = [matmul(one.mT, q) for one, q in zip(ones, left, strict=True)]
    right = _by_shape(orthonormal, small)
    cores = [matmul(b.mT, q) for b, q in zip(small, right, strict=True)]  # leftᵀ G rightᵀ
    parts = _by_shape(jnp.linalg.svd, cores)
    triplets = []
    for q, p, (u, s, vt), (_, scale) in zip(left, right, parts, scaled, strict=True):
        u, vt = _fix_signs(matmul(q, u[..., :rank]), matmul(vt[..., :rank, :], p.mT))
        triplets.append((u, s[..., :rank] * scale, vt))
    return triplets


def exact_svds(
    matrices: Sequence[jax.Array], rank: int, key: jax.Array
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """:func:`exact_svd` of many (stacks of) matrices."""
    del key
    triplets = []
    for matrix, scale in map(_scaled, matrices):
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        u, vt = _fix_signs(u[..., :rank], vt[..., :rank, :])
        triplets.append((u, s[..., :rank] * scale, vt))
    return triplets


def exact_svd(
    matrix: jax.Array, rank: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular triplets from a full decomposition; O(mn min(m, n)), no randomness."""
    _check(matrix, rank)
    return exact_svds([matrix], rank, key)[0]
