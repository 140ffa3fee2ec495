"""APOLLO: the gradient itself, scaled as Adam scales a random sketch of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._base.checks import check_choice
from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.compose import by_backprop, with_learning_rate, without_learning_rate
from lorenza_optax._plan.selection import Rank
from lorenza_optax._residual.residual import FIRA_LIMIT, Residual, each_leaf, kept, limit_growth
from lorenza_optax._subspace.subspace import SUBSPACES

__all__ = ["apollo", "scale_by_apollo"]

_AXES = {"channel": -2, "tensor": (-2, -1)}


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    update_proj_gap: int = 200,
    *,
    scale: optax.ScalarOrSchedule = 1.0,
    scale_type: str = "channel",
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    subspace: str = "gaussian",
    proj_type: str = "std",
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    gradient_transform: optax.GradientTransformation | None = None,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO: each column of the gradient, scaled as Adam scales a random projection of it.

    .. math::
      \hat g_t = P^\top G_t, \quad N_t = \mathrm{Adam}(\hat g_t), \quad
      s_j = \frac{\lVert N_{:j} \rVert}{\lVert \hat g_{:j} \rVert}, \quad
      W_{t+1} = W_t - \gamma (\alpha\, G_t\, \mathrm{diag}(s) + \lambda W_t) ,

    with P of N(0, 1/r), drawn anew every T updates from the seed and never kept, and
    G diag(s) limited to 1.01 times its norm one update before. Columns run along the side that
    is not compressed. It keeps 2 r max(m, n) + 1 numbers a matrix. Moments stay as they are when
    P changes.

    APOLLO-Mini is ``apollo(..., rank=1, scale_type="tensor", scale=128 ** 0.5)``.

    The published code takes α² for its ``scale`` (128 for APOLLO-Mini), limits the norm before
    Adam's bias is corrected, adds ε = 1e-6 to the root before that, and 1e-8 to s's denominators;
    here a column of 0 has s = 0. Selection and sides are as in :func:`galore`.

    Args:
      learning_rate: Step size γ, a float or a schedule; 1e-2 in the paper's runs on C4.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`; the paper's is a quarter of min(m, n).
      update_proj_gap: T, in updates; the paper's 200.
      scale: α, factor of the projected leaves' updates; √128 for APOLLO-Mini.
      scale_type: "channel" (a scale s a column) or "tensor" (one scale ‖N‖ / ‖ĝ‖ a matrix).
      b1, b2, eps: Adam's β₁, β₂ and ε.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      subspace: "gaussian"; or "svd" or "randomized_svd", which are kept.
      proj_type: "std" (the shorter side is compressed), "reverse_std", "left" or "right".
      moment_dtype: None (float32), "bfloat16" or "int8", as in :func:`lorenza_optax.lorenza`.
      weight_dimension_numbers: Which axes form the matrix of which leaf, likewise.
      gradient_transform: Applied to the gradient before it is projected.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Seed of P.

    Returns:
      ``optax.chain(scale_by_apollo(...), add_decayed_weights, scale_by_learning_rate)``, used as
      :func:`galore`'s.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> state = lorenza_optax.methods.apollo(1e-2, rank=4).init(params)
      >>> print(state[0].projected.mu["kernel"].shape, state[0].q, state[0].r)
      (4, 16) {} {}

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    return with_learning_rate(_build, **locals())


def _build(
    b1: Any, b2: Any, eps: Any, scale_type: str, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    check_choice("scale_type", scale_type, tuple(_AXES))
    rule = each_leaf(_scaled, axis=_AXES[scale_type])
    axes["residual"] = Residual(rule, kept(norm=""), needs_orthonormal=False)
    axes["subspaces"] = (*SUBSPACES, "gaussian")
    return by_backprop(scale_by_adam(b1, b2, eps), **axes)


def _scaled(
    gradient: Any, projector: Any, low: Any, inner: Any, step: Any, norm: Any, axis: Any
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    del projector, step
    before, after = (jnp.linalg.norm(x, axis=axis, keepdims=True) for x in (low, inner))
    factors = jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 0)
    update, norm = limit_growth(factors * gradient, norm, FIRA_LIMIT)
    return update, {"norm": norm}


scale_by_apollo = without_learning_rate(apollo, _build)
