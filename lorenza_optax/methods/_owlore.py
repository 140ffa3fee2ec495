"""OwLore: GaLore on a few layers at a time, sampled by how many outliers they have."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

from lorenza_optax._base.checks import check_constant
from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._layerwise.layer_stacks import outlier_ratios
from lorenza_optax._layerwise.layerwise import LayerwiseState, layerwise
from lorenza_optax._low_rank.compose import without_learning_rate
from lorenza_optax._plan.selection import Rank

__all__ = ["LayerwiseState", "owlore", "scale_by_owlore"]


def owlore(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    update_proj_gap: int = 100,
    *,
    num_layers: int = 5,
    sampling_interval: int = 50,
    outlier_multiple: float = 13.0,
    layer_scores: Any = None,
    layers: str | None = None,
    scale: optax.ScalarOrSchedule = 1.0,
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
    r"""OwLore: GaLore on a few layers at a time, those with many outliers more often.

    .. math::
      p_\ell \propto \frac{1}{\lvert W_\ell \rvert} \lvert \{ w \in W_\ell :
      \lvert w \rvert > M \operatorname{mean} \lvert W_\ell \rvert \} \rvert, \quad
      W_\ell \leftarrow W_\ell - \gamma \alpha P \, \mathrm{Adam}(P^\top G_\ell)
      \text{ for the } k \text{ layers drawn from } p

    every κ updates, without replacement, where W_ℓ are a layer's projected matrices as they are
    then (p is uniform where none has an outlier); leaves outside the layers are trained always.
    State is kept for k layers only and begins anew with a subspace of their next gradient. The
    published code keeps the state of all layers ever drawn, and reads p from a file for one model,
    with shares above 1 / M, which this formula cannot give, or in percent (see ``layer_scores``).

    Layers may be stacked (scanned) or lie in subtrees of their own. What is saved is state: the
    gradient is still taken of all layers, by ``jax.grad`` if it comes from outside.

    Args:
      learning_rate: Step size γ; 3e-4 in the published runs.
      rank: Rank r, as in :func:`lorenza_optax.lorenza`; 256 in the published runs.
      update_proj_gap: T, in updates since the last draw; the published 100.
      num_layers: k; the published 5.
      sampling_interval: κ, in updates; the published 50.
      outlier_multiple: M; 13 in the name of the published file. No normal number is so large.
      layer_scores: p (L,) up to a factor, by the layers' numbers, in place of shares of outliers.
      layers: None to find the layers: stacks along a batch axis of
        ``weight_dimension_numbers``, with all that lies beside them, or else subtrees that
        differ in one number of their path. Or a regular expression on paths, such as
        ``r"blocks/(\d+)/"`` with a group for that number, or ``"^blocks/"`` for stacks.
      scale: α, factor of the projected leaves' updates.
      b1: Adam's β₁.
      b2: Adam's β₂.
      eps: Adam's ε.
      eps_before_correction: As in :func:`galore`.
      weight_decay: Decoupled weight decay λ of what is trained.
      mask: Optax's weight-decay mask.
      subspace: "svd" or "randomized_svd".
      proj_type: As in :func:`galore`, likewise the next two.
      moment_dtype: Dtype in which moments are kept.
      weight_dimension_numbers: Which axes form the matrix of which leaf.
      gradient_transform: Applied to gradients with zeros for layers that are not trained.
      axis_name: Mapped axis over which ``value_fn`` is per device.
      seed: Seed of the draws.

    Returns:
      ``optax.chain(scale_by_owlore(...), scale_by_learning_rate)``; weight decay is in the
      first. Its ``update`` needs ``params``; its state is a :class:`LayerwiseState`.

    Raises:
      ValueError, TypeError: As :func:`lorenza_optax.lorenza`; at ``init`` if no layers are found.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.methods.owlore(1e-3, rank=4, num_layers=2)
      >>> params = {"layers": [{"kernel": jnp.ones((16, 8))} for _ in range(6)]}
      >>> print(tx.init(params)[0].layers.projected.mu["layers/N/kernel"].shape)
      (2, 4, 16)

    References:
      Li et al., `OwLore <https://arxiv.org/abs/2405.18380>`_, 2024
    """
    choices = {name: value for name, value in locals().items() if name != "learning_rate"}
    return optax.chain(_build(**choices), optax.scale_by_learning_rate(learning_rate))


def _build(
    b1: Any, b2: Any, eps: Any, eps_before_correction: bool, outlier_multiple: Any, **choices: Any
) -> optax.GradientTransformationExtraArgs:
    check_constant("outlier_multiple", outlier_multiple, 0)
    inner = scale_by_adam(b1, b2, eps, eps_before_correction=eps_before_correction)
    odds = functools.partial(outlier_ratios, multiple=outlier_multiple)
    return layerwise(inner, odds, **choices)


scale_by_owlore = without_learning_rate(owlore, _build, ("learning_rate",))
