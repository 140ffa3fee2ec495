"""Flora: momentum in a random subspace, normalized as Adafactor does."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._base.checks import check_choice, check_int
from lorenza_optax._inner.rules import interpolated_ema
from lorenza_optax._low_rank.compose import (
    at_rest_while_zero,
    by_backprop,
    in_float32,
    with_learning_rate,
    without_learning_rate,
)
from lorenza_optax._plan.selection import Rank
from lorenza_optax._residual.residual import complement

__all__ = ["flora", "scale_by_flora"]


def flora(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    update_proj_gap: int = 1000,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    decay_rate: jax.typing.ArrayLike = 0.8,
    min_dim_size_to_factor: int = 128,
    normalize: str = "after",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    proj_type: str = "std",
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    gradient_transform: optax.GradientTransformation | None = None,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Flora: momentum kept in a random subspace that changes every T updates; then Adafactor.

    .. math::
      m \leftarrow P_{new}^\top P_{old}\, m \text{ every } T, \quad
      m \leftarrow \beta m + (1 - \beta) P^\top G_t, \quad
      D_t = \beta P m + (1 - \beta) G_t, \\
      U_t = D_t / \sqrt{\hat V_t}, \quad
      W_{t+1} = W_t - \gamma \Big( \frac{\max(\mathrm{RMS}(W_t), 10^{-3})}
      {\max(1, \mathrm{RMS}(U_t))} U_t + \lambda W_t \Big) ,

    where P is of N(0, 1/r), drawn from the seed and never kept, and V̂ is Adafactor's factored
    mean of D². It keeps r max(m, n) + m + n numbers a matrix; of a leaf that is too small to
    factor, m n for V. The last three steps are Optax's and take a leaf, such as a stack of
    layers, as a whole.

    The published codes normalize G first and take m and D of that, ``normalize="before"``, so
    their learning rates belong to it. They differ in whether D has m from before or after it takes
    G; that in JAX does not carry m over a switch, and compresses the outputs of a square, where
    that in PyTorch compresses the inputs, as here, and scales weight decay as it does the step.

    Args:
      learning_rate: Step size γ, relative to the parameters, a float or a schedule.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`. The published code projects only matrices
        with min(m, n) of at least 128 and max(m, n) of at most four times that: a function
        ``rank=lambda path, shape: ...`` that is 0 for others does so.
      update_proj_gap: T, in updates; the paper's κ of 1000.
      b1: β.
      decay_rate: V's decay is 1 - t^-decay_rate, as in ``optax.adafactor``.
      min_dim_size_to_factor: V is factored where a leaf has two dimensions of at least this.
      normalize: "after" as above or, as in the published codes, "before": m and D are then of
        G / √V̂, with V̂ of G.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      proj_type: "std" (the shorter side is compressed), "reverse_std", "left" or "right".
      moment_dtype: None (float32), "bfloat16" or "int8", of m.
      weight_dimension_numbers: Which axes form the matrix of which leaf, for m.
      gradient_transform: Applied to the gradient before all else.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Seed of P.

    Returns:
      ``optax.chain(scale_by_flora(...), add_decayed_weights, scale_by_learning_rate)``, used as
      :func:`galore`'s; ``update`` needs ``params``.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.flora(1e-2, rank=4)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"].shape)
      (16, 8)

    References:
      Hao, Cao, Mou, `Flora <https://arxiv.org/abs/2402.03293>`_, 2024
    """
    return with_learning_rate(_build, **locals())


def _build(
    b1: Any, decay_rate: Any, min_dim_size_to_factor: int, normalize: str, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    check_choice("normalize", normalize, ("after", "before"))
    check_int("min_dim_size_to_factor", min_dim_size_to_factor, 1)
    rms = optax.scale_by_factored_rms(True, decay_rate, 0, min_dim_size_to_factor)
    behind = [rms, optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()]
    if normalize == "before":
        given = axes["gradient_transform"] or optax.identity()
        axes["gradient_transform"] = optax.chain(given, in_float32(behind.pop(0)))
    axes |= {"subspace": "gaussian", "subspaces": ("gaussian",)}
    axes |= {"moment_transport": "rotate", "residual": complement(1 - b1)}
    momentum = by_backprop(interpolated_ema(b1), **axes)
    return optax.chain(momentum, at_rest_while_zero(in_float32(optax.chain(*behind))))


scale_by_flora = without_learning_rate(flora, _build)
