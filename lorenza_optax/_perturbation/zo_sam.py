"""SAM by forward passes in the full space: a chain stage, and with Adam behind it AdaZo-SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent.ascent import AscentConfig
from lorenza_optax._ascent.gradient import (
    FullSpaceAscentState,
    initial_ascent_state,
    without_ascent,
)
from lorenza_optax._ascent.surroundings import of_state
from lorenza_optax._base.calls import check_call
from lorenza_optax._base.checks import check_int, check_not_injected
from lorenza_optax._base.paths import leaves_by_path, with_arrays
from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.arguments import with_decay
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.in_update import full_gradient_in_update
from lorenza_optax._low_rank.low_rank import low_rank
from lorenza_optax._plan.plan import shape_and_dtype

__all__ = ["ZoSamState", "adazo_sam", "ascent_stage", "zo_sam_perturbation"]


class ZoSamState(NamedTuple):
    """State of :func:`zo_sam_perturbation`, :func:`methods.sam` and :func:`methods.asam`.

    Attributes:
      count: Updates so far, int32.
      ascent: ``value`` (the loss at the perturbed point), ``ascent_norm`` and ``perturbed``; for
        :func:`zo_sam_perturbation` the seed too. Its type tells which of them it is for.
    """

    count: Any
    ascent: Any


def zo_sam_perturbation(
    rho: optax.ScalarOrSchedule = 0.05,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    estimator: str = "auto",
    probe_batch_size: int | None = None,
    perturb_every: int = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the one at a sharpness-aware point found by forward passes.

    With standard Gaussian directions :math:`P_j` over all parameters, regenerated from a key
    and never stored,

    .. math::
      d_j = \frac{f(\theta + \mu P_j) - f(\theta - \mu P_j)}{2\mu}, \quad
      A = \frac1q \sum_{j=1}^q d_j P_j, \quad
      g = \nabla f\Big(\theta + \rho \frac{A}{\lVert A \rVert}\Big).

    The first stage of a chain: whatever comes in is ignored if ``value_fn`` is given to
    ``update``, and passed on if it is not.

    Args:
      rho: Radius ρ of the perturbation in the Frobenius norm over all leaves, in units of the
        parameters; a schedule may give it. Negative descends instead.
      mu: Smoothing radius μ of the differences; unused by ``estimator="jvp"``.
      num_probes: Number q of directions.
      estimator: "jvp" takes d_j exactly in forward mode, "central" and "forward" by
        differences; "auto" is "jvp", or "central" where the loss has no forward-mode rule.
      probe_batch_size: How many probes are evaluated at once; None for all.
      perturb_every: Perturb each k-th step only.
      axis_name: Mapped axis over which the loss is per device (``shard_map``, ``pmap``): slopes
        and gradients are averaged over it. None where the loss is that of the whole batch.
      seed: Seed of the directions.

    Returns:
      A transformation whose ``update`` takes ``value_fn`` and those of the other extra
      arguments that ``value_fn`` names.

    Raises:
      ValueError, TypeError: For arguments out of range; and from ``update`` where ``value_fn``
        is given inside ``masked``, ``partition``, ``MultiSteps`` or ``apply_if_finite``.

    Examples:
      >>> import jax.numpy as jnp, optax, lorenza_optax
      >>> loss = lambda params: jnp.sum(params["w"] ** 2)
      >>> tx = optax.chain(
      ...     lorenza_optax.zo_sam_perturbation(rho=0.05),
      ...     optax.clip_by_global_norm(1.0),
      ...     optax.adamw(1e-1),
      ... )
      >>> params = {"w": jnp.ones(4)}
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, state = tx.update(None, state, params, value_fn=loss)
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(loss(params) < 2))
      True

    References:
      Refael, Arbel, Lindenbaum, Tirer, `LORENZA <https://arxiv.org/abs/2502.19571>`_, 2025
    """
    config = AscentConfig(
        rho, mu, num_probes, "zo", estimator, probe_batch_size, perturb_every, axis_name
    )
    check_int("seed", seed, 0)
    return ascent_stage(config, lambda: initial_ascent_state(FullSpaceAscentState, seed))


def ascent_stage(
    config: AscentConfig, initial: Callable[[], Any]
) -> optax.GradientTransformationExtraArgs:
    """The chain stage that replaces what comes in by the gradient at θ + ε.

    Args:
      config: The ascent's configuration.
      initial: () -> the ascent's state at first, whose type tells which ascent it is.
    """

    def init(params: Any) -> ZoSamState:
        for path, leaf in leaves_by_path(params).items():
            shape_and_dtype(path, leaf)  # or raises
        return ZoSamState(jnp.zeros((), jnp.int32), initial())

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ZoSamState]:
        check_call(updates, params, value_fn)
        count = optax.safe_increment(state.count)
        if value_fn is None:
            return updates, ZoSamState(count, without_ascent(state.ascent))
        gradients, ascent_state = full_gradient_in_update(
            config, of_state(config, {}, state), state, with_arrays(params), value_fn, extra_args
        )
        return gradients, ZoSamState(count, ascent_state)

    return optax.GradientTransformationExtraArgs(init, update)


def adazo_sam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    estimator: str = "auto",
    probe_batch_size: int | None = None,
    perturb_every: int = 1,
    moment_dtype: Any = None,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaZo-SAM: Adam on the gradient at an ascent point found by forward passes.

    The full-space sibling of :func:`lorenza`: the perturbation of :func:`zo_sam_perturbation`,
    then Adam with decoupled weight decay. It keeps Adam's state; a gradient that is not
    finite leaves it as it is and gives a zero update (only weight decay acts).

    Args:
      learning_rate: Step size γ, a float or a schedule.
      rho: Radius ρ of the perturbation, as in :func:`zo_sam_perturbation`.
      mu: Smoothing radius μ.
      num_probes: Number q of directions.
      b1: Decay β₁ of the first moment.
      b2: Decay β₂ of the second moment.
      eps: ε of Adam, outside the root.
      weight_decay: Decoupled weight decay λ, a float or a schedule.
      mask: Optax's weight-decay mask.
      estimator: As in :func:`zo_sam_perturbation`, likewise the next two.
      probe_batch_size: How many probes are evaluated at once.
      perturb_every: Perturb each k-th step only.
      moment_dtype: "float32" (None), "bfloat16" or "int8", as in :func:`lorenza`.
      axis_name: Mapped axis over which the loss is per device.
      seed: Seed of the directions.

    Returns:
      The transformation. ``update`` takes ``value_fn``; or take the gradient with
      :func:`perturbed_value_and_grad`.

    Raises:
      ValueError, TypeError: As :func:`zo_sam_perturbation`.

    Examples:
      >>> import jax.numpy as jnp, optax, lorenza_optax
      >>> loss = lambda params: jnp.sum(params["w"] ** 2)
      >>> tx = lorenza_optax.adazo_sam(1e-1)
      >>> params = {"w": jnp.ones(4)}
      >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
      >>> print(bool(loss(optax.apply_updates(params, updates)) < loss(params)))
      True

    References:
      Refael, Arbel, Lindenbaum, Tirer, `LORENZA <https://arxiv.org/abs/2502.19571>`_, 2025
    """
    check_not_injected("mask", mask)
    config = LowRankConfig(
        rank=1,
        update_proj_gap=1,
        inner=optax.with_extra_args_support(scale_by_adam(b1, b2, eps)),
        ascent=AscentConfig(
            rho, mu, num_probes, "zo", estimator, probe_batch_size, perturb_every, axis_name
        ),
        in_full_space=True,
        moment_dtype=moment_dtype,
        seed=seed,
    )
    return with_decay(low_rank(config), weight_decay, mask, learning_rate)
