"""SAM and ASAM: the gradient at a point further up the gradient, as a chain stage."""

from __future__ import annotations

from typing import Any

import optax

from lorenza_optax._ascent.ascent import AscentConfig
from lorenza_optax._ascent.gradient import (
    AdaptiveAscentState,
    GradientAscentState,
    initial_ascent_state,
)
from lorenza_optax._perturbation.zo_sam import ascent_stage

__all__ = ["asam", "sam"]


def sam(
    rho: optax.ScalarOrSchedule = 0.05, *, perturb_every: int = 1, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""SAM: replaces the gradient by the one at the point ρ further up the gradient.

    .. math::
      A = \nabla f(\theta), \quad
      g = \nabla f\Big(\theta + \rho \frac{A}{\lVert A \rVert}\Big),

    with the Frobenius norm over all leaves; where A is zero or not finite there is no
    perturbation. A perturbed step takes two gradients, any other step one. Leaves of less than
    32 bits are perturbed in float32.

    The first stage of a chain: whatever comes in is ignored if ``value_fn`` is given to
    ``update``, and passed on if it is not. In front of :func:`lorenza` or :func:`adazo_sam`,
    which take their gradient themselves, it changes nothing; the former's nearest to SAM is
    ``lorenza(..., ascent="subspace")``.

    Args:
      rho: Radius ρ of the perturbation, in units of the parameters; a schedule may give it.
        Negative descends instead.
      perturb_every: Perturb each k-th step only.
      axis_name: Mapped axis over which the loss is per device (``shard_map``, ``pmap``): both
        gradients are averaged over it. (The published runs perturb on each device by its own
        gradient.) None where the loss is that of the whole batch.

    Returns:
      A transformation whose ``update`` takes ``value_fn`` and those of the other extra
      arguments that ``value_fn`` names; or take the gradient with
      :func:`perturbed_value_and_grad`, which needs its state, ``rho``, ``perturb_every`` and
      ``axis_name``. Its state is a :class:`ZoSamState`, ``ascent_norm`` in it is ‖A‖.

    Raises:
      ValueError, TypeError: For arguments out of range; and from ``update`` where ``value_fn``
        is given inside ``masked``, ``partition``, ``MultiSteps`` or ``apply_if_finite``.

    Examples:
      >>> import jax.numpy as jnp, optax, lorenza_optax
      >>> loss = lambda params: jnp.sum(params["w"] ** 2)
      >>> tx = optax.chain(
      ...     lorenza_optax.methods.sam(rho=0.05),
      ...     optax.clip_by_global_norm(1.0),
      ...     optax.adamw(1e-1),
      ... )
      >>> params = {"w": jnp.ones(4)}
      >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
      >>> print(f"{float(state[0].ascent.ascent_norm):.2f} {float(state[0].ascent.value):.2f}")
      4.00 4.20

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    config = AscentConfig(rho, perturb_every=perturb_every, axis_name=axis_name)
    return ascent_stage(config, lambda: initial_ascent_state(GradientAscentState))


def asam(
    rho: optax.ScalarOrSchedule = 0.5,
    eta: optax.ScalarOrSchedule = 0.01,
    *,
    perturb_every: int = 1,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ASAM: SAM with a radius that each parameter's own size is the measure of.

    .. math::
      T = \operatorname{diag}(\lvert\theta\rvert + \eta), \quad
      g = \nabla f\Big(\theta + \rho \frac{T^2 \nabla f(\theta)}{\lVert T \nabla f(\theta) \rVert}
      \Big),

    the steepest way up in :math:`\lVert T^{-1} \varepsilon \rVert \le \rho`. With η = 0 the
    perturbed loss is the same for all scalings of the parameters that leave f as it is.
    The published code leaves T = 1 for what is not called a weight (biases); here T is of all
    leaves, as that law needs. Otherwise as :func:`sam`.

    Args:
      rho: Radius ρ relative to the parameters, some ten times SAM's; or a schedule. < 0 descends.
      eta: η ≥ 0, by which parameters near zero are perturbed too; a schedule may give it.
      perturb_every, axis_name: As in :func:`sam`.

    Returns:
      A transformation as :func:`sam` returns; ``ascent_norm`` in its state is ‖T ∇f(θ)‖, and
      :func:`perturbed_value_and_grad` needs ``eta`` too.

    Raises:
      ValueError, TypeError: As :func:`sam`.

    Examples:
      >>> import jax.numpy as jnp, optax, lorenza_optax
      >>> loss = lambda params: jnp.sum(params["w"])
      >>> tx = optax.chain(lorenza_optax.methods.asam(rho=0.5, eta=0.0), optax.sgd(1e-2))
      >>> params = {"w": jnp.array([3.0, -4.0])}
      >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
      >>> print(f"{float(state[0].ascent.value):.2f}")  # -1 + ρ (9 + 16) / 5
      1.50

    References:
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    config = AscentConfig(rho, perturb_every=perturb_every, axis_name=axis_name, eta=eta)
    return ascent_stage(config, lambda: initial_ascent_state(AdaptiveAscentState))
