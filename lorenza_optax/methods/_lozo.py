"""LOZO: zeroth order along low-rank directions of which one factor is kept for a while."""

from __future__ import annotations

from typing import Any

import optax

from lorenza_optax._low_rank.compose import (
    by_forward_passes,
    with_learning_rate,
    without_learning_rate,
)
from lorenza_optax._low_rank.config import Coordinates
from lorenza_optax._plan.selection import Rank

__all__ = ["lozo", "lozo_or_lozo_m", "scale_by_lozo"]


def lozo(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 2,
    update_proj_gap: int = 50,
    *,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    estimator: str = "central",
    divide_by_rank: bool = True,
    scale: optax.ScalarOrSchedule = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    proj_type: str = "std",
    factored_updates: bool = False,
    weight_dimension_numbers: Any = None,
    probe_batch_size: int | None = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""LOZO: zeroth order along directions of rank r, one factor of which is kept ν updates long.

    .. math::
      d_j = \frac{f(W + \mu P N_j) - f(W - \mu P N_j)}{2 \mu}, \quad
      W_{t+1} = W_t - \gamma \alpha P \frac{1}{q r} \sum_j d_j N_j .

    P (k, r) and N_j (r, l) have entries N(0, 1). P is new every ν updates and regenerated from the
    seed; N_j (the paper's U) is new each time. Other leaves take MeZO's step. The official code
    always compresses the columns of PyTorch's (outputs, inputs), ``proj_type="left"`` of a Flax
    kernel; does not divide by r; and projects embeddings, which here must be selected (both hold
    them alike, so that "std" is its side of them).

    Args:
      learning_rate: Step size γ.
      rank: r; 1 to 4 in the paper.
      update_proj_gap: ν; 50 to 100 in the paper.
      mu: Smoothing radius, the paper's ε = 1e-3.
      num_probes: Directions a step, q.
      estimator: "central" as above, "forward", "jvp" or "auto", as in :func:`mezo`.
      divide_by_rank: Divide by r, as the paper does.
      scale: α, factor of the projected leaves' updates.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      proj_type: "std" (the shorter side is compressed), "reverse_std", "left" or "right".
      factored_updates: Leaves updates unformed, for :func:`lorenza_optax.apply_updates` in the
        same ``jit``: nothing of a weight's size is made.
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
      >>> tx = lorenza_optax.methods.lozo(1e-3, rank=2)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> loss = lambda params: jnp.sum((params["kernel"] @ jnp.ones(8)) ** 2)
      >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
      >>> print(updates["kernel"].shape)
      (16, 8)

    References:
      Chen et al., `LOZO <https://arxiv.org/abs/2410.07698>`_, 2024
    """
    return with_learning_rate(lozo_or_lozo_m, **locals())


def lozo_or_lozo_m(
    divide_by_rank: bool, momentum: Any = None, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    """Both methods without what is behind them in the chain, by their arguments."""
    coordinates = Coordinates(
        of_normal=lambda normal, *_: normal,
        shape=lambda leaf: leaf.low_rank_shape,
        weight=lambda leaf: 1 / leaf.rank if divide_by_rank else 1.0,
        others_factor=1.0 if momentum is None else None,
    )
    inner = optax.identity()
    if momentum is not None:
        inner, axes["moment_transport"] = optax.ema(momentum, debias=False), "rotate"
    return by_forward_passes(inner, subspace="unit_gaussian", coordinates=coordinates, **axes)


scale_by_lozo = without_learning_rate(lozo, lozo_or_lozo_m)
