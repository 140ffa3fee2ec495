"""Decompositions of one (m, n) matrix. Nothing here knows of trees or optimizers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

__all__ = ["exact_svd", "matmul", "randomized_svd"]


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of (stacks of) matrices in full float32, also where the default is TF32."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _prepare(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The matrix in at least float32 with its largest entry scaled to 1, and the scale."""
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have 2 dimensions, got shape {matrix.shape}; use jax.vmap.")
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank must be between 1 and min(m, n) = {min(matrix.shape)} for a matrix of shape"
            f" {matrix.shape}, got {rank}."
        )
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    # Squares of entries below 1e-19 or above 1e19 leave float32.
    scale = jnp.max(jnp.abs(matrix))
    scale = jnp.where(scale > 0, scale, 1)
    return matrix / scale, scale


def _fix_signs(u: jax.Array, vt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes the largest entry of each left vector positive, so that results are unique."""
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None, :], axis=0)[0]
    signs = jnp.where(largest < 0, -1, 1).astype(u.dtype)
    return u * signs, vt * signs[:, None]


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

    with a QR decomposition between any two of the products, so that singular values down to
    round-off are told apart. The small factor goes through the QR decomposition of its
    transpose, so both ``u`` and ``vt`` are orthonormal to round-off also where singular values
    decay, vanish, or the matrix is zero. Cost O(mnr); no decomposition of the matrix itself.

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
    matrix, scale = _prepare(matrix, rank)
    m, n = matrix.shape
    width = min(rank + oversampling, m, n)
    sketch = jax.random.normal(key, (n, width), matrix.dtype)
    left, _ = jnp.linalg.qr(matmul(matrix, sketch))  # (m, r + p)
    for _ in range(power_iterations):
        right, _ = jnp.linalg.qr(matmul(matrix.T, left))
        left, _ = jnp.linalg.qr(matmul(matrix, right))
    right, core = jnp.linalg.qr(matmul(matrix.T, left))  # leftᵀ G = coreᵀ rightᵀ
    u, s, vt = jnp.linalg.svd(core.T)
    u, vt = _fix_signs(matmul(left, u[:, :rank]), matmul(vt[:rank], right.T))
    return u, s[:rank] * scale, vt


def exact_svd(
    matrix: jax.Array, rank: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular triplets from a full decomposition; O(mn min(m, n)), no randomness."""
    del key
    matrix, scale = _prepare(matrix, rank)
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    u, vt = _fix_signs(u[:, :rank], vt[:rank])
    return u, s[:rank] * scale, vt
