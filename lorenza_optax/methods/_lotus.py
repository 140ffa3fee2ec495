"""Lotus: GaLore whose subspaces are renewed where the gradient's direction stands still."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._base.checks import check_constant, check_int
from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.compose import by_backprop, with_learning_rate, without_learning_rate
from lorenza_optax._low_rank.config import Displacement
from lorenza_optax._plan.selection import Rank

__all__ = ["lotus", "scale_by_lotus"]


def lotus(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    *,
    check_every: int = 50,
    threshold: float = 0.01,
    scale: optax.ScalarOrSchedule = 0.25,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    subspace: str = "randomized_svd",
    proj_type: str = "std",
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    gradient_transform: optax.GradientTransformation | None = None,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lotus: each matrix has a new subspace as soon as its gradient's direction stands still.

    .. math::
      d_t = \frac{P^\top G_t}{\lVert P^\top G_t \rVert}, \quad
      \text{new } P \text{ from } G_t \text{ if } a \bmod \eta = 0 \text{ and }
      \frac{\lVert d_t - d_0 \rVert}{a} < \gamma, \quad
      W_{t+1} = W_t - \mu_t (\alpha P\, \mathrm{Adam}(P^\top G_t) + \lambda W_t) ,

    with :math:`d_0` the direction at the matrix's last switch and a its age, the updates since
    then, which is 1 at the switch. This is Algorithm 1 of the paper. Its text also argues with
    the path efficiency :math:`\lVert \sum_i P^\top \hat g_i \rVert / \lVert \sum_i \hat g_i
    \rVert` of the unit gradients :math:`\hat g_i`, for which a switch is due where it is small;
    the algorithm does not compute it, and neither does this.

    Matrices switch one by one, layers of a stack too; of those that do not, the factors stay bit
    for bit. Moments stay as they are. It keeps 2 r max(m, n) + r min(m, n) numbers a matrix, as
    :func:`galore`, and the direction and age, r max(m, n) + 1. Two unit vectors are at most 2
    apart: a test at an age above 2 / γ always switches.

    Args:
      learning_rate: Step size μ_t, a float or a schedule.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`.
      check_every: η, in updates of the matrix's age; the paper's 50.
      threshold: γ; the paper's 0.01, of 0.005 to 0.02 that it tries.
      scale: α, factor of the projected leaves' updates; GaLore's 0.25.
      b1: Adam's β₁.
      b2: Adam's β₂.
      eps: Adam's ε.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      subspace: "randomized_svd", as published, or "svd".
      proj_type: "std" (the shorter side is compressed), "reverse_std", "left" or "right".
      moment_dtype: None (float32), "bfloat16" or "int8", as in :func:`lorenza_optax.lorenza`.
      weight_dimension_numbers: Which axes form the matrix of which leaf, likewise.
      gradient_transform: Applied to the gradient before it is projected.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Of the sketches.

    Returns:
      ``optax.chain(scale_by_lotus(...), add_decayed_weights, scale_by_learning_rate)``. Its
      ``update`` takes gradients; or None and ``value_fn``, and then takes them itself.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.lotus(1e-2, rank=4, check_every=20)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"].shape, state[0].displacement["age"]["kernel"])
      (16, 8) 1.0

    References:
      Miao, Bao, Zhang, `Lotus <https://arxiv.org/abs/2602.01233>`_, 2026
    """
    return with_learning_rate(_build, **locals())


def _build(
    b1: Any, b2: Any, eps: Any, check_every: int, threshold: float, subspace: str, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    check_int("check_every", check_every, 1)
    check_constant("threshold", threshold, 0)
    rule = Displacement(check_every, threshold)
    inner = scale_by_adam(b1, b2, eps)
    return by_backprop(inner, update_proj_gap=1, displacement=rule, subspace=subspace, **axes)


scale_by_lotus = without_learning_rate(lotus, _build)
