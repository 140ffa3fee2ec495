"""GaLore: Adam in a subspace from the SVD of the gradient."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.compose import by_backprop, with_learning_rate, without_learning_rate
from lorenza_optax._plan.selection import Rank

__all__ = ["galore", "scale_by_galore"]


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    update_proj_gap: int = 200,
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
    r"""GaLore: Adam in the leading singular subspace of the gradient, renewed every T updates.

    .. math::
      G \approx P \Sigma V^\top \text{ every } T, \quad
      N_t = \mathrm{Adam}(P^\top G_t), \quad
      W_{t+1} = W_t - \gamma (\alpha P N_t + \lambda W_t) .

    It keeps 2 r max(m, n) + r min(m, n) numbers a matrix; the part of the gradient outside the
    subspace is dropped. The decomposition is exact, as published; ``subspace="randomized_svd"``
    costs a small part of it. Moments stay as they are at a refresh, and no singular vector turns
    against the one that it follows; in the published code their signs are as they come.

    That code projects attention and MLP only: the same is
    ``weight_dimension_numbers=select_leaves(exclude="^head/")``, for here an untied head is a
    matrix like others.

    Args:
      learning_rate: Step size γ, a float or a schedule; 1e-2 in the paper's runs on C4.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`.
      update_proj_gap: T, in updates; the paper's 200 (500 in fine-tuning).
      scale: α, factor of the projected leaves' updates; the paper's 0.25 (for fine-tuning 4 at
        r = 4, 2 at r = 8).
      b1: Adam's β₁.
      b2: Adam's β₂.
      eps: Adam's ε.
      eps_before_correction: Add ε to the root of the second moment before its bias is corrected,
        as the published code does, with ε = 1e-6.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      subspace: "svd" or "randomized_svd".
      proj_type: "std" (the shorter side is compressed), "reverse_std", "left" (the rows, which of
        a Flax kernel are the inputs) or "right". In the published code the last two are those of
        PyTorch's (outputs, inputs), the opposite, and "reverse_std" of a square compresses the
        outputs; here, as in ``optax.contrib.galore``, the inputs.
      moment_dtype: None (float32), "bfloat16" or "int8", as in :func:`lorenza_optax.lorenza`.
      weight_dimension_numbers: Which axes form the matrix of which leaf, likewise.
      gradient_transform: Applied to the gradient before it is projected.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Of the sketches.

    Returns:
      ``optax.chain(scale_by_galore(...), add_decayed_weights, scale_by_learning_rate)``. Its
      ``update`` takes gradients; or None and ``value_fn``, and then takes them itself.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.galore(1e-2, rank=4)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"].shape)
      (16, 8)

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024
    """
    return with_learning_rate(_build, **locals())


def _build(
    b1: Any, b2: Any, eps: Any, eps_before_correction: bool, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    inner = scale_by_adam(b1, b2, eps, eps_before_correction=eps_before_correction)
    return by_backprop(inner, **axes)


scale_by_galore = without_learning_rate(galore, _build)
