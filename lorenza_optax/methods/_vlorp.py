"""VLoRP: ProjFactor in a random subspace of a gradient whose vectors are cut to pieces."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.compose import by_backprop, with_learning_rate, without_learning_rate
from lorenza_optax._plan.selection import Rank
from lorenza_optax._residual.proj_factor import proj_factor

__all__ = ["scale_by_vlorp", "vlorp"]


def vlorp(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 1,
    update_proj_gap: int = 100,
    *,
    granularity: float = 256,
    scale: optax.ScalarOrSchedule = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    eps_in_root: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    moment_transport: str = "keep",
    proj_type: str = "std",
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    gradient_transform: optax.GradientTransformation | None = None,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""VLoRP: many small projections of the gradient in place of one, and ProjFactor.

    Each vector of k = min(m, n) entries is cut into c pieces, which are compressed alike: with
    l = max(m, n), G becomes (k / c, l c), and

    .. math::
      \hat g_t = P^\top G_t, \quad m \leftarrow \beta_1 m + (1 - \beta_1) \hat g_t, \quad
      O = P \hat g_t, \quad \hat V = \rho \kappa^\top / 1^\top \rho, \\
      W_{t+1} = W_t - \gamma \Big( \alpha \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
      \frac{P m}{\sqrt{\hat V} + \varepsilon} + \lambda W_t \Big) ,

    where P is of N(0, 1/r), drawn anew every T updates from the seed and never kept, and ρ and κ
    are running means, with β₂, of the sums of rows and columns of O ∘ O in the shape of the
    weight. It keeps r l c + m + n numbers a matrix. In the paper c = 256 with r = 1 is among
    the best at a budget r c of 256.

    Bias and ε are as in the published code: the paper's text corrects by 1 - β₂ᵗ without the root,
    and has ε inside the root, where 1e-6 is a floor of 1e-3 under √V̂. In that code ``scale``
    is a factor of ĝ, V̂ with it, and cancels: its 0.25 is 1.0 here.

    Args:
      learning_rate: Step size γ, a float or a schedule; 2e-5 in the paper's fine-tuning.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`, of one piece; so are those without a
        note. Leaves of which the pieces have no more than r entries run Adam.
      update_proj_gap: T, in updates; 30 to 100 in the published runs.
      granularity: c, which must divide k; below 1, 1 / c vectors make one and l must be divisible.
        Leaves that it does not fit run Adam, with a warning; where weight_dimension_numbers
        choose them it raises.
      scale: α, factor of the projected leaves' updates.
      b1: β₁.
      b2: β₂.
      eps: ε, also that of Adam, which runs on the other leaves.
      eps_in_root: True for √(V̂ + ε), as in the paper's text.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      moment_transport: What becomes of m when P changes: "keep" as published, "reset" or "rotate"
        (m ← P_newᵀ P_old m). Sums and count stay.
      proj_type: Which side is compressed: "std" (the shorter), "reverse_std", "left" or "right".
      moment_dtype: Dtype in which m is kept.
      weight_dimension_numbers: Which axes form the matrix of which leaf.
      gradient_transform: Applied to the gradient before it is projected.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Seed of P.

    Returns:
      ``optax.chain(scale_by_vlorp(...), add_decayed_weights, scale_by_learning_rate)``, used as
      :func:`galore`'s. To sum gradients ([b,] r, l c) over micro-batches, see
      :func:`lorenza_optax.subspace_value_and_grad`.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.vlorp(1e-2, rank=1, granularity=4)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"].shape, state[0].projected.ema["kernel"].shape)
      (16, 8) (1, 64)

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
    axes |= {"subspace": "gaussian", "subspaces": ("gaussian",)}
    return by_backprop(inner, inner_others=others, residual=residual, **axes)


scale_by_vlorp = without_learning_rate(vlorp, _build)
