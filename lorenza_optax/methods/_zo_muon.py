"""ZO-Muon: a zeroth-order gradient in a random subspace, orthogonalized there."""

from __future__ import annotations

from typing import Any

import optax

from lorenza_optax._base.checks import check_constant
from lorenza_optax._inner.rules import orthogonalize
from lorenza_optax._low_rank.compose import (
    by_forward_passes,
    with_learning_rate,
    without_learning_rate,
)
from lorenza_optax._low_rank.config import Coordinates
from lorenza_optax._plan.selection import Rank

__all__ = ["scale_by_zo_muon", "zo_muon"]


def zo_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 64,
    update_proj_gap: int = 100,
    *,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 4,
    estimator: str = "forward",
    others_scale: float = 1e-5,
    scale: optax.ScalarOrSchedule = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    proj_type: str = "std",
    factored_updates: bool = False,
    factor_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    probe_batch_size: int | None = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""ZO-Muon: a zeroth-order gradient in a random subspace, orthogonalized there as by Muon.

    .. math::
      d_j = \frac{f(W + \mu P N_j) - f(W)}{\mu}, \quad
      \hat g = \frac1q \sum_j d_j N_j, \quad
      W_{t+1} = W_t - \gamma \alpha P \, \mathrm{NS}(\hat g) .

    P (k, r) is orthonormal, a basis of a Gaussian, kept in the state and new every T updates; N_j
    (r, l) has entries N(0, 1); NS are five Newton-Schulz steps. All q differences share f(W).
    A step in W has the same length whatever the slopes, other leaves take
    :math:`\gamma_o d z` as in MeZO, for which the learning rates that fit W are far too large: the
    published code has a fixed rate of 1e-7 for leaves of one dimension. ``others_scale`` is
    :math:`\gamma_o / \gamma`. That code always compresses the rows of PyTorch's (outputs, inputs),
    ``proj_type="right"`` of a Flax kernel; and projects embeddings, too, as here does
    ``weight_dimension_numbers=select_leaves([".", "embedding"])``. Without that an embedding is
    perturbed by a full Gaussian, whose entries are √(k / r) times as large as those of P N, and its
    part of every slope is noise to the matrices.

    Args:
      learning_rate: Step size γ; 1e-2 in the paper's run of OPT-13B.
      rank: r; 64 there.
      update_proj_gap: T; 100 there.
      mu: Smoothing radius.
      num_probes: q; 4 there.
      estimator: "forward" as above, "central", "jvp" or "auto", as in :func:`mezo`.
      others_scale: Factor of the other leaves' updates; 1e-5 of 1e-2 is the published rate.
      scale: α, factor of the projected leaves' updates.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      proj_type: "std" (the shorter side is compressed), "reverse_std", "left" or "right".
      factored_updates: Leaves updates unformed, for :func:`lorenza_optax.apply_updates` in the
        same ``jit``: nothing of a weight's size is made.
      factor_dtype: Dtype of P; None is the parameters'.
      weight_dimension_numbers: Which axes form the matrix of which leaf, as in
        :func:`lorenza_optax.lorenza`.
      probe_batch_size: As in :func:`mezo`.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Seed of the subspaces and directions.

    Returns:
      As :func:`mezo`; ``update`` needs ``value_fn``.

    Raises:
      ValueError, TypeError: As :func:`mezo`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.zo_muon(1e-2, rank=4)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> loss = lambda params: jnp.sum((params["kernel"] @ jnp.ones(8)) ** 2)
      >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
      >>> print(updates["kernel"].shape)
      (16, 8)

    References:
      `ZO-Muon <https://arxiv.org/abs/2602.17155>`_, 2026
    """
    return with_learning_rate(_build, **locals())


def _build(others_scale: float, **axes: Any) -> optax.GradientTransformationExtraArgs:
    check_constant("others_scale", others_scale, 0)
    coordinates = Coordinates(
        of_normal=lambda normal, *_: normal,
        shape=lambda leaf: leaf.low_rank_shape,
        weight=lambda leaf: 1.0,
        others_factor=others_scale,
    )
    return by_forward_passes(
        orthogonalize(),
        inner_others=optax.scale(others_scale),
        subspace="orthonormal",
        coordinates=coordinates,
        **axes,
    )


scale_by_zo_muon = without_learning_rate(zo_muon, _build)
