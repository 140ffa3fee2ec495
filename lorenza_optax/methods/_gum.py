"""GUM: Muon in a subspace, made unbiased by matrices that train on what lies outside of it."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._base.checks import check_share
from lorenza_optax._inner.rules import orthogonalize, scale_by_adam
from lorenza_optax._low_rank.compose import by_backprop, with_learning_rate, without_learning_rate
from lorenza_optax._plan.selection import Rank
from lorenza_optax._residual.full_rank import full_rank_blocks

__all__ = ["gum", "scale_by_gum"]


def gum(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    update_proj_gap: int = 200,
    *,
    full_rank_share: float = 1 / 16,
    beta: jax.typing.ArrayLike = 0.95,
    scale: optax.ScalarOrSchedule = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    subspace: str = "svd",
    proj_type: str = "std",
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    gradient_transform: optax.GradientTransformation | None = None,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""GUM: in each period of T updates a matrix is low-rank, or with probability q full-rank.

    .. math::
      \text{low-rank:} \quad R \leftarrow \beta R + \tfrac{1}{1 - q} P^\top G, \quad
      W \leftarrow W - \gamma (\alpha P\, \mathrm{NS}(R) + \lambda W), \\
      \text{full-rank:} \quad R \leftarrow \beta R + \tfrac{1}{q} (G - P P^\top G), \quad
      W \leftarrow W - \gamma (\alpha \mathrm{NS}(R) + \lambda W),

    with P from the SVD of the period's first gradient, R = 0 at its beginning, and NS Muon's five
    Newton-Schulz steps. The expectation of what enters R, lifted, is G. The two factors do not
    change within a period and NS divides by the norm, so they cannot change an update: they are
    left out, and R is kept without them. Where G lies in the subspace up to round-off, a
    full-rank matrix stands still. Leaves that are not projected take Adam.

    It keeps r (m + n) numbers a matrix, and momenta of full size for ⌈q N⌉ of the N matrices
    of each shape (layers of stacks are matrices of their own): never more of them are full-rank
    at once, and each is with probability q exactly, though not independently.

    Args:
      learning_rate: Step size γ, a float or a schedule.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`.
      update_proj_gap: T, in updates; the paper's 200.
      full_rank_share: q, above 0 and below 1. The paper has it as γ / N, with γ of N blocks
        full-rank on average, γ = 2 in fine-tuning: 1/16 where N = 32, the layers of an 8B model.
      beta: Momentum β.
      scale: α, factor of the projected leaves' updates.
      b1: Adam's β₁, for the other leaves.
      b2: Adam's β₂, likewise.
      eps: Adam's ε, likewise.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      subspace: "svd", as published, or "randomized_svd".
      proj_type: "std" (the shorter side is compressed), "reverse_std", "left" or "right".
      moment_dtype: None (float32), "bfloat16" or "int8", of low-rank momenta and of Adam's.
      weight_dimension_numbers: As in :func:`lorenza_optax.lorenza`.
      gradient_transform: Applied to the gradient before it is projected.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Of the draws.

    Returns:
      ``optax.chain(scale_by_gum(...), add_decayed_weights, scale_by_learning_rate)``. Its
      ``update`` takes gradients; or None and ``value_fn``, and then takes them itself.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.gum(1e-3, rank=4, full_rank_share=0.25)
      >>> params = {"layers": {"kernel": jnp.ones((16, 8))}}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["layers"]["kernel"].shape)
      (16, 8)

    References:
      Pan, Luo, Liu, You, Zhang, `Unbiased Gradient Low-Rank Projection
      <https://arxiv.org/abs/2510.17802>`_, 2025
    """
    return with_learning_rate(_build, **locals())


def _build(
    full_rank_share: float, beta: Any, b1: Any, b2: Any, eps: Any, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    check_share("full_rank_share", full_rank_share)
    return by_backprop(
        optax.chain(optax.trace(beta), orthogonalize()),
        inner_others=scale_by_adam(b1, b2, eps),
        residual=full_rank_blocks(full_rank_share, beta),
        moment_transport="reset",
        **axes,
    )


scale_by_gum = without_learning_rate(gum, _build)
