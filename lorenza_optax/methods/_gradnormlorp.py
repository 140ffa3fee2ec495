"""GradNormLoRP: a weight as magnitude times direction, and GaLore on the direction."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.compose import by_backprop, with_learning_rate, without_learning_rate
from lorenza_optax._plan.selection import Rank
from lorenza_optax._weight_norm.weight_normalized import WeightNormalizedState, weight_normalized

__all__ = ["WeightNormalizedState", "gradnormlorp", "scale_by_gradnormlorp"]


def gradnormlorp(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    update_proj_gap: int = 250,
    *,
    scale: optax.ScalarOrSchedule = 0.25,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_before_correction: bool = False,
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
    r"""GradNormLoRP: each column of a matrix as g v / ‖v‖, Adam on g and GaLore on v.

    .. math::
      W_{:j} = g_j \frac{v_{:j}}{\lVert v_{:j} \rVert}, \quad
      v \leftarrow v - \gamma \alpha P \, \mathrm{Adam}(P^\top \nabla_v), \quad
      g \leftarrow g - \gamma \, \mathrm{Adam}(\nabla_g),

    with P as in :func:`galore`, from ∇_v. Rows of W are inputs and columns outputs, of each
    stacked layer and each head its own; other leaves take Adam. Of v and g only what W itself
    does not show is kept, ‖v‖ with the sign of g: with Adam on g three numbers a column beside
    :func:`galore`'s state. So whatever else changes W changes g and the direction: weight decay
    is of g. A column of zeros first moves against its gradient.

    The published code differs: it keeps v, as large as W; it resets g to ‖v‖ at the start of
    each update, which forgets all that g has learned; its ∇_v lacks the projection on what is
    orthogonal to v; and it splits all other leaves, too, a bias as one column. Selection and sides
    are as in :func:`galore`.

    Args:
      learning_rate: Step size γ, a float or a schedule; 1e-2 in the published runs on C4. W is
        not linear in g and v, so γ acts inside: :func:`scale_by_gradnormlorp` takes it too, and
        needs the same γ behind it. Where a schedule is 0 nothing moves.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`.
      update_proj_gap: T, in updates; 250 in the published runs on C4, 500 on GLUE.
      scale: α, factor of v's steps alone; likewise 0.25, and 4 on GLUE at r = 4.
      b1: Adam's β₁.
      b2: Adam's β₂.
      eps: Adam's ε.
      eps_before_correction: As in :func:`galore`; the published code does, with ε = 1e-6.
      weight_decay: Decoupled weight decay λ of W.
      mask: Optax's weight-decay mask.
      subspace: "svd" or "randomized_svd".
      proj_type: As in :func:`galore`.
      moment_dtype: Likewise; moments of g are float32.
      weight_dimension_numbers: Which axes form the matrix of which leaf.
      gradient_transform: Applied to the gradient of W.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Of the sketches.

    Returns:
      ``optax.chain(scale_by_gradnormlorp(...), add_decayed_weights, scale_by_learning_rate)``.
      Its ``update`` needs ``params``, and takes gradients or ``value_fn``; its state is a
      :class:`WeightNormalizedState`.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.gradnormlorp(1e-2, rank=4)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(state[0].lengths["kernel"].shape)
      (8,)

    References:
      Huang et al., `GradNormLoRP <https://arxiv.org/abs/2412.19616>`_, 2024
    """
    return with_learning_rate(functools.partial(_build, learning_rate), **locals())


def _build(
    learning_rate: Any,
    *,
    b1: Any,
    b2: Any,
    eps: Any,
    eps_before_correction: bool,
    gradient_transform: Any,
    **axes: Any,
) -> optax.GradientTransformationExtraArgs:
    adam = scale_by_adam(b1, b2, eps, eps_before_correction=eps_before_correction)
    of_direction = by_backprop(adam, factored_updates=True, **axes)
    return weight_normalized(of_direction, adam, learning_rate, gradient_transform)


scale_by_gradnormlorp = without_learning_rate(gradnormlorp, _build, ("weight_decay", "mask"))
