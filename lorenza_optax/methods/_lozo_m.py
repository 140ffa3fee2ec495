"""LOZO-M: LOZO with momentum in the subspace."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._low_rank.compose import with_learning_rate, without_learning_rate
from lorenza_optax._plan.selection import Rank
from lorenza_optax.methods._lozo import lozo_or_lozo_m

__all__ = ["lozo_m", "scale_by_lozo_m"]


def lozo_m(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 2,
    update_proj_gap: int = 50,
    *,
    momentum: jax.typing.ArrayLike = 0.9,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    estimator: str = "central",
    divide_by_rank: bool = True,
    scale: optax.ScalarOrSchedule = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    proj_type: str = "std",
    factored_updates: bool = False,
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    probe_batch_size: int | None = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""LOZO-M: :func:`lozo` with momentum that is kept in the subspace, r l numbers a matrix.

    .. math::
      M \leftarrow \tfrac1k P_{new}^\top P_{old} M \text{ (at a switch)}, \quad
      M \leftarrow \beta M + \frac{1 - \beta}{q r} \sum_j d_j N_j, \quad
      W_{t+1} = W_t - \gamma \alpha P M .

    Other leaves have the same mean of their gradients. The official code's first update sets M to
    its summand without 1 - β.

    Args:
      learning_rate: Step size γ.
      rank: r, as all that is not said here as in :func:`lozo`.
      update_proj_gap: ν.
      momentum: β.
      mu: Smoothing radius.
      num_probes: Directions a step, q.
      estimator: "central", "forward", "jvp" or "auto".
      divide_by_rank: Divide by r.
      scale: α.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      proj_type: Which side is compressed.
      factored_updates: Leaves updates of projected leaves unformed; those of other leaves, which
        have momentum, are formed.
      moment_dtype: None (float32), "bfloat16" or "int8", as in :func:`lorenza_optax.lorenza`.
      weight_dimension_numbers: Which axes form the matrix of which leaf.
      probe_batch_size: How many probes are evaluated at once.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Seed of the factors and directions.

    Returns:
      As :func:`lozo`.

    Raises:
      ValueError, TypeError: As :func:`lozo`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.lozo_m(1e-3, rank=2)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> loss = lambda params: jnp.sum((params["kernel"] @ jnp.ones(8)) ** 2)
      >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
      >>> print(state[0].projected.ema["kernel"].shape)
      (2, 16)

    References:
      Chen et al., `LOZO <https://arxiv.org/abs/2410.07698>`_, 2024
    """
    return with_learning_rate(lozo_or_lozo_m, **locals())


scale_by_lozo_m = without_learning_rate(lozo_m, lozo_or_lozo_m)
