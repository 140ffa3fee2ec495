"""What happens to the part of the gradient outside the subspace.

A rule is a function of one leaf's gradient, projector, projected gradient and inner update,
and of one number a matrix that it may keep. It returns the whole update in the oriented view.
The complement G - P Pᵀ G is defined for orthonormal P only.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lorenza_optax._subspace import lift

__all__ = ["RESIDUALS", "keeps_norm"]

FIRA_LIMIT = 1.01
# A column of which the subspace holds less than this share tells nothing of its scale: what is
# left of it is round-off, and φ was seen to reach 1e6.
FIRA_LEAST_SHARE = 1e-3
SUMO_LIMIT = 1.1

Residual = Callable[..., tuple[jax.Array, jax.Array | None]]


def discard(
    gradient: jax.Array,
    projector: jax.Array,
    low: jax.Array,
    inner: jax.Array,
    norm: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """P N: GaLore and LORENZA drop the complement."""
    del gradient, low
    return lift(projector, inner), norm


def fira(
    gradient: jax.Array,
    projector: jax.Array,
    low: jax.Array,
    inner: jax.Array,
    norm: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    r"""P N + φ ∘ (G - P Pᵀ G), with φ_j = ‖N_:j‖ / ‖ĝ_:j‖ a column, its growth limited to 1.01.

    φ_j is 0 where the subspace holds less than a thousandth of a column's norm.

    Args:
      gradient: G, ([b,] k, l).
      projector: P, ([b,] k, r).
      low: ĝ = Pᵀ G, ([b,] r, l).
      inner: N, the inner optimizer's update, ([b,] r, l).
      norm: Norm of the scaled complement one update ago, ([b]); 0 if there was none.

    References:
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    assert norm is not None
    low_norm = jnp.linalg.norm(low, axis=-2, keepdims=True)
    inner_norm = jnp.linalg.norm(inner, axis=-2, keepdims=True)
    whole_norm = jnp.linalg.norm(gradient, axis=-2, keepdims=True)
    held = low_norm > FIRA_LEAST_SHARE * whole_norm
    phi = jnp.where(held, inner_norm / jnp.where(held, low_norm, 1), 0)
    added, norm = _limit_growth(phi * (gradient - lift(projector, low)), norm, FIRA_LIMIT)
    return lift(projector, inner) + added, norm


def sumo(
    gradient: jax.Array,
    projector: jax.Array,
    low: jax.Array,
    inner: jax.Array,
    norm: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """G - P (ĝ - O), with O the inner update, its growth limited to 1.1 an update.

    References:
      Refael, Smorodinsky, Tirer, Lindenbaum, `SUMO <https://arxiv.org/abs/2505.24749>`_, 2025
    """
    assert norm is not None
    inner, norm = _limit_growth(inner, norm, SUMO_LIMIT)
    return gradient - lift(projector, low - inner), norm


def _limit_growth(
    matrix: jax.Array, before: jax.Array, limit: float
) -> tuple[jax.Array, jax.Array]:
    """Scales a matrix down if its norm exceeds ``limit`` times the norm before, if any."""
    norm = jnp.linalg.norm(matrix, axis=(-2, -1))
    exceeds = (before > 0) & (norm > limit * before)
    factor = jnp.where(exceeds, limit * before / jnp.where(exceeds, norm, 1), 1)
    return matrix * factor[..., None, None], (norm * factor).astype(before.dtype)


RESIDUALS: dict[str, Residual] = {"discard": discard, "fira": fira, "sumo": sumo}


def keeps_norm(residual: str) -> bool:
    """Whether a rule keeps one number a matrix between updates."""
    return residual != "discard"
