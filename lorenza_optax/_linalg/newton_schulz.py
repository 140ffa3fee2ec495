"""Orthogonalization by products alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lorenza_optax._linalg.decompositions import matmul

__all__ = ["newton_schulz"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrix: jax.Array, steps: int = 5) -> jax.Array:
    r"""Pushes the singular values of ([b,] m, n) towards 1, products alone: Muon's step.

    .. math::
      X \leftarrow X / \lVert X \rVert, \quad
      X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X, \quad
      (a, b, c) = (3.4445, -4.7750, 2.0315) .

    They end between about 0.7 and 1.2. A zero matrix stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = x / jnp.where(norm > 0, norm, 1)
    for _ in range(steps):
        gram = matmul(x, x.mT)
        x = a * x + matmul(b * gram + c * matmul(gram, gram), x)
    return x.mT if tall else x
