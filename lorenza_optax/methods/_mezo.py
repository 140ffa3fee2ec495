"""MeZO and its variants: zeroth order along Gaussians over all parameters."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._base.checks import check_choice
from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.compose import (
    by_forward_passes,
    with_learning_rate,
    without_learning_rate,
)
from lorenza_optax._low_rank.zeroth_order import best_of_three

__all__ = ["mezo", "scale_by_mezo"]

VARIANTS = ("sgd", "sign", "momentum", "adam", "conservative")


def mezo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    variant: str = "sgd",
    estimator: str = "central",
    momentum: jax.typing.ArrayLike = 0.9,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    factored_updates: bool = False,
    moment_dtype: Any = None,
    probe_batch_size: int | None = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""MeZO and its variants: the gradient from two values of the loss along a Gaussian.

    .. math::
      d_j = \frac{f(\theta + \mu z_j) - f(\theta - \mu z_j)}{2 \mu}, \quad
      \hat g = \frac1q \sum_j d_j z_j, \quad z_j \sim N(0, I), \quad
      \theta_{t+1} = \theta_t - \gamma U(\hat g) .

    U is the identity ("sgd"), the sign of each entry of :math:`\hat g` ("sign"; the benchmark has
    sign(d) z), :math:`m \leftarrow \beta m + \hat g` ("momentum") or Adam ("adam").
    "conservative" takes of θ, θ + u and θ - u, with u the whole step, the one with the smallest
    loss on the batch, and the first of equal ones; three more forward passes.

    Only a seed (and moments) is kept: with ``factored_updates`` a step takes inference's memory.

    Args:
      learning_rate: Step size γ; 1e-7 to 1e-5 in the paper.
      mu: Smoothing radius, the papers' ε; 1e-3 in the paper.
      num_probes: q; 1 in the paper.
      variant: "sgd", "sign", "momentum", "adam" or "conservative".
      estimator: "central" as above; "forward", from f(θ + μ z) - f(θ); "jvp", the forward gradient:
        the derivative itself by forward mode; or "auto", "jvp" where the loss allows it.
      momentum, b1, b2, eps: β of "momentum"; Adam's β₁, β₂ and ε.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      factored_updates: Leaves updates as keys, for :func:`lorenza_optax.apply_updates` in the same
        ``jit``; for "sgd" only.
      moment_dtype: None (float32), "bfloat16" or "int8", as in :func:`lorenza_optax.lorenza`.
      probe_batch_size: Probes evaluated at once; 1 is one evaluation after the other, None is all.
      axis_name: Mapped axis over which ``value_fn`` is per device: slopes are averaged over it.
      seed: Seed of the directions.

    Returns:
      ``optax.chain(scale_by_mezo(...), add_decayed_weights, scale_by_learning_rate)``. Its
      ``update(None, state, params, value_fn=loss, ...)`` needs ``value_fn``, with a loss that gives
      the same value for the same arguments (dropout keys are arguments).

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`; without ``value_fn``; from
        ``scale_by_mezo`` for "conservative", which needs the learning rate.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.mezo(1e-3)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> loss = lambda params: jnp.sum(params["kernel"] ** 2)
      >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
      >>> print(updates["kernel"].shape)
      (16, 8)

    References:
      Malladi et al., `MeZO <https://arxiv.org/abs/2305.17333>`_, 2023; Zhang et al., `A benchmark
      <https://arxiv.org/abs/2402.11592>`_, 2024
    """
    arguments = locals()
    if variant != "conservative":
        return with_learning_rate(_build, **arguments)
    step = with_learning_rate(_build, **arguments | {"variant": "sgd"})
    return optax.chain(step, best_of_three(axis_name))


def _build(
    variant: str, momentum: Any, b1: Any, b2: Any, eps: Any, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    check_choice("variant", variant, VARIANTS)
    if variant == "conservative":
        raise ValueError("variant='conservative' needs the rate: use mezo(learning_rate, ...).")
    if axes["factored_updates"] and variant != "sgd":
        raise ValueError(f"factored_updates=True is for variant='sgd' only, got {variant!r}.")
    inner = {
        "sgd": optax.identity,
        "sign": optax.scale_by_sign,
        "momentum": lambda: optax.trace(momentum),
        "adam": lambda: scale_by_adam(b1, b2, eps),
    }
    return by_forward_passes(inner[variant](), **axes)


scale_by_mezo = without_learning_rate(mezo, _build)
