"""Fira: GaLore, with the rest of the gradient added back at the scale that Adam gave its part."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.compose import by_backprop, with_learning_rate, without_learning_rate
from lorenza_optax._plan.selection import Rank
from lorenza_optax._residual.residual import FIRA, FIRA_AS_PUBLISHED

__all__ = ["fira", "scale_by_fira"]


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    update_proj_gap: int = 200,
    *,
    scale: optax.ScalarOrSchedule = 0.25,
    scale_added: bool = True,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
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
    r"""Fira: what :func:`galore` drops is added, scaled column by column as Adam scaled its part.

    .. math::
      \hat g_t = P^\top G_t, \quad N_t = \mathrm{Adam}(\hat g_t), \quad
      \phi_j = \frac{\lVert N_{:j} \rVert}{\lVert \hat g_{:j} \rVert}, \quad
      S_t = (G_t - P \hat g_t)\, \mathrm{diag}(\phi), \\
      W_{t+1} = W_t - \gamma (\alpha (P N_t + S_t) + \lambda W_t) ,

    with S limited to 1.01 times its norm one update before. Columns run along the side that is
    not compressed. It keeps 2 r max(m, n) + r min(m, n) + 1 numbers a matrix. φ is 0 where the
    subspace holds less than a thousandth of a column: what is left there is round-off.

    The published code limits S before Adam's bias is corrected, which differs in the first
    thousand updates, and adds ε = 1e-6 to the root before that. Its α is not a factor of S, see
    ``scale_added``. Selection, sides and signs are as in :func:`galore`.

    Args:
      learning_rate: Step size γ, a float or a schedule; 1e-2 in the paper's runs on C4, which
        are of ``scale_added=False``.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`.
      update_proj_gap: T, in updates.
      scale: α, factor of the projected leaves' updates.
      scale_added: False for the published code's α P N + (G - α P ĝ) diag(φ), which is the same
        for α = 1: a small α then makes the update mostly S.
      b1: Adam's β₁.
      b2: Adam's β₂.
      eps: Adam's ε.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      subspace: "svd" or "randomized_svd".
      proj_type: "std" (the shorter side is compressed), "reverse_std", "left" or "right".
      moment_dtype: None (float32), "bfloat16" or "int8", as in :func:`lorenza_optax.lorenza`.
      weight_dimension_numbers: Which axes form the matrix of which leaf, likewise.
      gradient_transform: Applied to the gradient before it is projected.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Of the sketches.

    Returns:
      ``optax.chain(scale_by_fira(...), add_decayed_weights, scale_by_learning_rate)``, used as
      :func:`galore`'s.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.fira(1e-2, rank=4)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"].shape)
      (16, 8)

    References:
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    return with_learning_rate(_build, **locals())


def _build(
    b1: Any, b2: Any, eps: Any, scale_added: bool, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    residual = FIRA if scale_added else FIRA_AS_PUBLISHED
    return by_backprop(scale_by_adam(b1, b2, eps), residual=residual, **axes)


scale_by_fira = without_learning_rate(fira, _build)
