"""ProjFactor: Adam with a moment in the subspace and a factored one outside it."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.compose import by_backprop, with_learning_rate, without_learning_rate
from lorenza_optax._plan.selection import Rank
from lorenza_optax._residual.proj_factor import proj_factor
from lorenza_optax._subspace.subspace import RANDOM, SUBSPACES

__all__ = ["projfactor", "scale_by_projfactor"]


def projfactor(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    update_proj_gap: int = 200,
    *,
    scale: optax.ScalarOrSchedule = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    eps_in_root: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    subspace: str = "randomized_svd",
    moment_transport: str = "keep",
    proj_type: str = "std",
    factor_dtype: Any = None,
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    gradient_transform: optax.GradientTransformation | None = None,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""ProjFactor, the optimizer of :func:`vlorp`, in any subspace.

    .. math::
      \hat g_t = P^\top G_t, \quad m \leftarrow \beta_1 m + (1 - \beta_1) \hat g_t, \quad
      \hat V = \text{factored mean of } (P \hat g_t)^2, \quad
      W_{t+1} = W_t - \gamma \Big( \alpha \frac{P \hat m}{\sqrt{\hat V} + \varepsilon}
      + \lambda W_t \Big) .

    GaLore without its second moment in the subspace: it keeps r max(m, n) + r min(m, n) + m + n
    numbers a matrix, about two thirds of GaLore's. Unlike Adam's in the subspace, the second
    moment does not depend on the basis, so a refresh leaves it right.

    Args:
      learning_rate: Step size γ, a float or a schedule.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`; so are those without a note.
      update_proj_gap: T, in updates.
      scale: α, factor of the projected leaves' updates.
      b1: β₁.
      b2: β₂.
      eps: ε, also that of Adam, which runs on the other leaves.
      eps_in_root: As in :func:`vlorp`.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      subspace: "randomized_svd", "svd", or drawn from the seed: "gaussian" (never kept),
        "orthonormal".
      moment_transport: What becomes of m when P changes: "keep", "reset" or "rotate".
      proj_type: Which side is compressed.
      factor_dtype: Dtype in which P is kept.
      moment_dtype: Dtype in which m is kept.
      weight_dimension_numbers: Which axes form the matrix of which leaf.
      gradient_transform: Applied to the gradient before it is projected.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Seed of what is drawn.

    Returns:
      ``optax.chain(scale_by_projfactor(...), add_decayed_weights, scale_by_learning_rate)``, used
      as :func:`galore`'s.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.projfactor(1e-2, rank=4)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"].shape, state[0].residual["rows"]["kernel"].shape)
      (16, 8) (8,)

    References:
      `VLoRP <https://arxiv.org/abs/2505.01744>`_, 2025
    """
    return with_learning_rate(_build, **locals())


def _build(
    b1: Any, b2: Any, eps: Any, eps_in_root: bool, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    residual = proj_factor(b1, b2, eps, eps_in_root)
    others = scale_by_adam(b1, b2, eps)
    inner = optax.ema(b1, debias=False)
    return by_backprop(
        inner, inner_others=others, residual=residual, subspaces=(*SUBSPACES, *RANDOM), **axes
    )


scale_by_projfactor = without_learning_rate(projfactor, _build)
