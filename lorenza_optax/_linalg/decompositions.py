"""Decompositions of (stacks of) matrices. Nothing here knows of trees or optimizers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from lorenza_optax._linalg.stacks import each, stacked, unstacked

__all__ = [
    "FUSED_RANK",
    "OVERSAMPLING",
    "exact_svd",
    "exact_svds",
    "leading_left",
    "matmul",
    "orthonormal",
    "product",
    "randomized_svd",
    "randomized_svds",
    "total",
]

OVERSAMPLING = 8
LARGE = 256  # rows


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of (stacks of) matrices in full float32, also where the default is TF32."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


FUSED_RANK = 4


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """L R ([b,] m, n), of factors ([b,] m, r), ([b,] r, n), to be added to a weight.

    A product of matrices has a buffer of its own. For few columns a sum of outer products is as
    fast, and XLA computes it where it is added, with no buffer: 24 matrices (512, 1024), r = 2 on
    a CPU took 8 ms instead of 115 ms.
    """
    rank = left.shape[-1]
    if rank > FUSED_RANK:
        return matmul(left, right)
    outer = (left[..., :, i : i + 1] * right[..., i : i + 1, :] for i in range(rank))
    return functools.reduce(jnp.add, outer)


def total(numbers: Iterable[jax.Array]) -> jax.Array:
    """The sum of numbers that are not negative, in at least float32; nan if one of them is.

    The absolute value changes none of them. Without it XLA makes a sum of scalars a chain of
    additions, and repeats the chain in the fusion of every leaf that needs the result: at 144
    matrices four fifths of a training step's instructions.
    """
    numbers = [jnp.asarray(number) for number in numbers]
    dtype = jnp.result_type(jnp.float32, *numbers)
    return (
        jnp.sum(jnp.abs(jnp.stack([n.astype(dtype) for n in numbers])))
        if numbers
        else jnp.zeros((), dtype)
    )


def _cholesky_qr(y: jax.Array) -> jax.Array:
    lower = jnp.linalg.cholesky(matmul(y.mT, y))
    return jax.lax.linalg.triangular_solve(lower, y, left_side=False, lower=True, transpose_a=True)


def orthonormal(y: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns of ([b,] m, k), m >= k.

    For small matrices Householder's QR. For large ones, for which that is slow, two rounds of
    Cholesky-QR: products and a k × k factorization. It needs a condition number below 1e3 or so
    (of squares in float32); where its result is not orthonormal to round-off, Householder's
    takes over. (2752 × 72 on two cores: 4.8 ms against 8.2 ms.)
    """
    if y.shape[-2] < LARGE:
        return jnp.linalg.qr(y)[0]
    return _cholesky_or_householder(y)


def _cholesky_or_householder(y: jax.Array) -> jax.Array:
    lengths = jnp.linalg.norm(y, axis=-2, keepdims=True)
    y = y / jnp.where(lengths > 0, lengths, 1)
    q = _cholesky_qr(_cholesky_qr(y))
    errors = jnp.abs(matmul(q.mT, q) - jnp.eye(q.shape[-1], dtype=q.dtype))
    # nan, which a Cholesky factorization gives where it breaks down, must fail here. It may get
    # lost in the maximum of a large array: XLA's on CPUs is -inf then (jaxlib 0.10.2).
    good = jnp.all(errors < 64 * jnp.finfo(q.dtype).eps)
    return jax.lax.cond(good, lambda: q, lambda: jnp.linalg.qr(y)[0])


def leading_left(matrices: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The leading left singular vectors (B, m, r) and values (B, r) of tall (B, m, k).

    The largest entry of each vector is positive.
    """

    def leading(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = _largest(matrix)
        y = matrix / scale
        q = orthonormal(y)
        u, s = jnp.linalg.svd(matmul(q.mT, y))[:2]
        left = matmul(q, u[..., :rank])
        return left * _signs(left), s[..., :rank] * scale[..., 0]

    return each(leading, matrices)


def _wide(matrix: jax.Array) -> jax.Array:
    return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))


def _largest(matrix: jax.Array) -> jax.Array:
    """The largest entry ([b,] 1, 1), which what is computed is divided by; 1 for zeros.

    Squares of entries below 1e-19 or above 1e19 leave float32.
    """
    largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    return jnp.where(largest > 0, largest, 1)


def _check(matrix: jax.Array, rank: int) -> None:
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have 2 dimensions, got shape {matrix.shape}; use jax.vmap.")
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise TypeError(f"matrix must have a real float dtype, got {matrix.dtype}.")
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank must be between 1 and min(m, n) = {min(matrix.shape)} for a matrix of shape"
            f" {matrix.shape}, got {rank}."
        )


def _signs(u: jax.Array) -> jax.Array:
    """Signs ([b,] 1, r) of the largest entries of columns: without them vectors are not unique."""
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=-2, keepdims=True), axis=-2)
    return jnp.where(largest < 0, -1, 1).astype(u.dtype)


def _fix_signs(u: jax.Array, vt: jax.Array) -> tuple[jax.Array, jax.Array]:
    signs = _signs(u)
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
      matrix: The matrix G, shape (m, n), any real float dtype; computed in at least float32.
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
    u, s, vt = randomized_svds(
        [matrix], rank, key, oversampling=oversampling, power_iterations=power_iterations
    )
    return u[0], s[0], vt[0]


def randomized_svds(
    matrices: Sequence[jax.Array],
    rank: int,
    key: jax.Array,
    *,
    oversampling: int = OVERSAMPLING,
    power_iterations: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """:func:`randomized_svd` of all of many (stacks of) matrices ([b,] m, n) of one shape.

    They share one sketch: it need only be independent of each of them. Products with the
    matrices are taken one by one, without a copy of them; what is made of the products is
    stacked, so that the program does not grow with their number.

    Returns:
      Stacks (B, m, r), (B, r), (B, r, n), in the order of the matrices.
    """
    matrices = [_wide(matrix) for matrix in matrices]
    batches = [matrix.shape[:-2] for matrix in matrices]
    m, n = matrices[0].shape[-2:]
    scale = stacked([_largest(matrix) for matrix in matrices], batches)

    def times(right: Sequence[jax.Array]) -> jax.Array:
        """G X / scale."""
        products = [matmul(g, x) for g, x in zip(matrices, right, strict=True)]
        return stacked(products, batches) / scale

    def transposed_times(left: jax.Array) -> jax.Array:
        parts = zip(matrices, unstacked(left, batches), strict=True)
        return stacked([matmul(g.mT, x) for g, x in parts], batches) / scale

    width = min(rank + oversampling, m, n)
    sketch = jax.random.normal(key, (n, width), matrices[0].dtype)
    q = each(orthonormal, times([sketch] * len(matrices)))
    for _ in range(power_iterations):
        p = each(orthonormal, transposed_times(q))
        q = each(orthonormal, times(unstacked(p, batches)))
    small = transposed_times(q)
    p = each(orthonormal, small)
    u, s, vt = each(jnp.linalg.svd, matmul(small.mT, p))  # of qᵀ G p
    u, vt = _fix_signs(matmul(q, u[..., :rank]), matmul(vt[..., :rank, :], p.mT))
    return u, s[..., :rank] * scale[..., 0], vt


def exact_svds(
    matrices: Sequence[jax.Array], rank: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """:func:`exact_svd` of all of many (stacks of) matrices of one shape."""
    del key
    stack = stacked([_wide(g) for g in matrices], [g.shape[:-2] for g in matrices])
    scale = _largest(stack)
    u, s, vt = each(lambda one: jnp.linalg.svd(one, full_matrices=False), stack / scale)
    u, vt = _fix_signs(u[..., :rank], vt[..., :rank, :])
    return u, s[..., :rank] * scale[..., 0], vt


def exact_svd(
    matrix: jax.Array, rank: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular triplets from a full decomposition; O(mn min(m, n)), no randomness."""
    _check(matrix, rank)
    u, s, vt = exact_svds([matrix], rank, key)
    return u[0], s[0], vt[0]
