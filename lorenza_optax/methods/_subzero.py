"""SubZero: zeroth order in subspaces with two orthonormal random factors."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from lorenza_optax._linalg.decompositions import matmul
from lorenza_optax._low_rank.compose import (
    by_forward_passes,
    with_learning_rate,
    without_learning_rate,
)
from lorenza_optax._low_rank.config import Coordinates
from lorenza_optax._plan.plan import LeafPlan
from lorenza_optax._plan.selection import Rank

__all__ = ["scale_by_subzero", "subzero"]


def subzero(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 24,
    update_proj_gap: int = 1000,
    *,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    estimator: str = "central",
    normalize: bool = True,
    scale: optax.ScalarOrSchedule = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    factored_updates: bool = False,
    factor_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    probe_batch_size: int | None = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""SubZero: zeroth order along U Z Vᵀ with orthonormal random U and V, new every T updates.

    .. math::
      D_j = s U Z_j V^\top, \quad s = \frac{\sqrt{m n}}{r}, \quad
      d_j = \frac{f(W + \mu D_j) - f(W - \mu D_j)}{2 \mu}, \quad
      W_{t+1} = W_t - \gamma \alpha \frac1q \sum_j d_j D_j .

    U (m, r) and V (n, r) are bases of Gaussians, kept in the state; Z_j (r, r) has entries N(0, 1).
    With s a direction is as long as a Gaussian of the whole size, so that MeZO's learning rates and
    μ fit; the published code has it. Other leaves take MeZO's step; that code projects embeddings,
    too: ``weight_dimension_numbers=select_leaves([".", "embedding"])``.

    Args:
      learning_rate: Step size γ.
      rank: r; 24 in the published example, of prompt tuning.
      update_proj_gap: T; 1000 in the published example.
      mu: Smoothing radius, the paper's ε.
      num_probes: Directions a step, q.
      estimator: "central" as above, "forward", "jvp" or "auto", as in :func:`mezo`.
      normalize: Scale by s; else s = 1.
      scale: α, factor of the projected leaves' updates.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      factored_updates: Leaves updates unformed, for :func:`lorenza_optax.apply_updates` in the
        same ``jit``: nothing of a weight's size is made.
      factor_dtype: Dtype of U and V; None is the parameters'.
      weight_dimension_numbers: Which axes form the matrix of which leaf, as in
        :func:`lorenza_optax.lorenza`.
      probe_batch_size: As in :func:`mezo`.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Seed of the factors and directions.

    Returns:
      As :func:`mezo`; ``update`` needs ``value_fn``.

    Raises:
      ValueError, TypeError: As :func:`mezo`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.subzero(1e-3, rank=4)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> loss = lambda params: jnp.sum((params["kernel"] @ jnp.ones(8)) ** 2)
      >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
      >>> print(updates["kernel"].shape, state[0].q["kernel"].shape, state[0].r["kernel"].shape)
      (16, 8) (16, 4) (4, 8)

    References:
      Yu et al., `SubZero <https://arxiv.org/abs/2410.08989>`_, 2024
    """
    return with_learning_rate(_build, **locals())


def _build(normalize: bool, **axes: Any) -> optax.GradientTransformationExtraArgs:
    def of_normal(normal: jax.Array, partner: jax.Array, leaf: LeafPlan) -> jax.Array:
        size = leaf.matrix.m * leaf.matrix.n
        s = math.sqrt(size) / leaf.rank if normalize else 1.0
        return matmul(s * normal, partner.astype(normal.dtype))

    coordinates = Coordinates(
        of_normal,
        shape=lambda leaf: (*leaf.matrix.batch, leaf.rank, leaf.rank),
        weight=lambda leaf: 1.0,
        needs_partner=True,
        others_factor=1.0,
    )
    return by_forward_passes(
        optax.identity(), subspace="orthonormal", coordinates=coordinates, **axes
    )


scale_by_subzero = without_learning_rate(subzero, _build)
