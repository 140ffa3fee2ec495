"""COSMOS: Adam in a tracked eigenbasis, Newton-Schulz on the rest of the momentum."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.compose import by_backprop, with_learning_rate, without_learning_rate
from lorenza_optax._plan.selection import Rank
from lorenza_optax._residual.eigenbasis import adam_and_muon
from lorenza_optax._subspace.subspace import POWER_ITERATION

__all__ = ["cosmos", "scale_by_cosmos"]


def cosmos(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 64,
    *,
    gamma: jax.typing.ArrayLike = 0.2,
    scale: optax.ScalarOrSchedule = 1.0,
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    proj_type: str = "std",
    weight_dimension_numbers: Any = None,
    gradient_transform: optax.GradientTransformation | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""COSMOS: Adam in the leading eigenvectors P of G Gᵀ, and Muon's step outside of them.

    With G (k, l) the gradient, its compressed side first, and U(X) = X / ‖X‖:

    .. math::
      M \leftarrow \beta_1 M + (1 - \beta_1) G, \quad
      P \leftarrow \mathrm{QR}(\beta_2 P S + (1 - \beta_2) G G^\top P), \\
      S \leftarrow P^\top (\beta_2 P_{old} S P_{old}^\top + (1 - \beta_2) G G^\top) P, \quad
      V \leftarrow \beta_2 V + (1 - \beta_2) (P^\top G)^2, \\
      A = P \frac{P^\top M / (1 - \beta_1^t)}{\sqrt{(V + \epsilon) / (1 - \beta_2^t)}}, \quad
      B = \sqrt{k}\, U(\mathrm{NS}(M - P P^\top M)), \\
      W \leftarrow W - \eta \big(\alpha \sqrt{k}\, U(A + \gamma \sqrt{l}\, B) + \lambda W\big) ,

    P at every update, first from the SVD of G. It keeps k l + r (k + l) + r² numbers a matrix: M
    is of full size. Where M lies in the subspace up to round-off, B is 0. Leaves that are not
    projected take Adam, with the same β and ε.

    The published code comes in versions which differ from the paper and from each other: M
    without the factor 1 - β₁ and with Nesterov's mix; ε outside the root (inside, 1e-8 is a floor
    of 1e-4 under √V: 1e-16 is nearer to them); and steps of norm √(k l) times about 0.1, by
    which an entry moves alike in every shape, where by the paper's √k it moves by η / √l. They
    leave matrices of more than 10000 rows, such as an untied head, to Adam: so does
    ``weight_dimension_numbers=select_leaves(exclude="^head/")``.

    Args:
      learning_rate: Step size η, a float or a schedule.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`; the paper's 64.
      gamma: γ, the share of what is outside the subspace; the paper's 0.2.
      scale: α, factor of the projected leaves' updates.
      b1: β₁; the paper's 0.95.
      b2: β₂; likewise.
      eps: ε.
      weight_decay: Decoupled weight decay λ.
      mask: Optax's weight-decay mask.
      proj_type: "std" (the shorter side is compressed), "reverse_std", "left" or "right". Of the
        published code's versions one compresses the inputs, "left", and one the outputs, "right".
        With "std" the QR is cheapest, and the norm √k of a step Muon's.
      weight_dimension_numbers: As in :func:`lorenza_optax.lorenza`.
      gradient_transform: Applied to the gradient before it is projected.
      axis_name: Mapped axis over which ``value_fn`` is per device.

    Returns:
      ``optax.chain(scale_by_cosmos(...), add_decayed_weights, scale_by_learning_rate)``. Its
      ``update`` takes gradients; or None and ``value_fn``, and then takes them itself.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.cosmos(1e-3, rank=4)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"].shape)
      (16, 8)

    References:
      Liu et al., `COSMOS <https://arxiv.org/abs/2502.17410>`_, 2025
    """
    return with_learning_rate(_build, **locals())


def _build(
    gamma: Any, b1: Any, b2: Any, eps: Any, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    return by_backprop(
        optax.identity(),
        inner_others=scale_by_adam(b1, b2, eps),
        update_proj_gap=1,
        subspace=POWER_ITERATION,
        subspaces=(POWER_ITERATION,),
        power_decay=b2,
        residual=adam_and_muon(gamma, b1, b2, eps),
        **axes,
    )


scale_by_cosmos = without_learning_rate(cosmos, _build)
