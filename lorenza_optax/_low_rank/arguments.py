"""From the arguments that all of LORENZA's factories share to a transformation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent.ascent import AscentConfig
from lorenza_optax._base.checks import check_choice, check_number, check_transformation
from lorenza_optax._inner.rules import scale_by_adam
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.low_rank import low_rank
from lorenza_optax._low_rank.update import Unformed
from lorenza_optax._subspace.subspace import SUBSPACES

__all__ = ["STRUCTURAL_ARGS", "low_rank_config", "scale_by", "structural_args", "with_decay"]

STRUCTURAL_ARGS = (
    "rank",
    "update_proj_gap",
    "num_probes",
    "b1",
    "b2",
    "eps",
    "base_optimizer",
    "mask",
    "proj_type",
    "moment_transport",
    "ascent",
    "estimator",
    "probe_batch_size",
    "perturb_every",
    "probe_rank",
    "probe_factors",
    "scale_probes",
    "ascent_fn",
    "factored",
    "refresh",
    "stagger",
    "factored_updates",
    "gradient_transform",
    "factor_dtype",
    "moment_dtype",
    "weight_dimension_numbers",
    "subspace",
    "axis_name",
    "seed",
)
"""Arguments of :func:`lorenza` that fix the program: the ``static_args`` for
``optax.inject_hyperparams``. Injectable are ``learning_rate``, ``rho``, ``mu``, ``scale`` and
``weight_decay``. Adam's ``b1``, ``b2`` and ``eps`` could be injected, but Optax casts what it
injects to the parameters' dtype, and in bfloat16 0.999 is 1."""


INJECTABLE = ("learning_rate", "rho", "mu", "scale", "weight_decay")


def structural_args(factory: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments of a factory that fix the program: the rest may change in training.

    Args:
      factory: :func:`lorenza`, a function of ``lorenza_optax.methods`` or another one here.

    Returns:
      Their names: the ``static_args`` for ``optax.inject_hyperparams(factory, ...)``.

    Raises:
      TypeError: If ``factory`` is no function.

    Examples:
      >>> import optax, lorenza_optax
      >>> galore = lorenza_optax.methods.galore
      >>> static_args = lorenza_optax.structural_args(galore)
      >>> tx = optax.inject_hyperparams(galore, static_args)(learning_rate=1e-2, rank=4)
      >>> print("rank" in static_args, "learning_rate" in static_args)
      True False
    """
    return tuple(n for n in inspect.signature(factory).parameters if n not in INJECTABLE)


def low_rank_config(
    *,
    rho: Any,
    mu: Any,
    num_probes: int,
    b1: Any,
    b2: Any,
    eps: Any,
    base_optimizer: optax.GradientTransformation | None,
    ascent: str,
    estimator: str,
    probe_batch_size: int | None,
    perturb_every: int,
    probe_rank: int | None,
    probe_factors: str,
    scale_probes: bool,
    ascent_fn: Any,
    factored: bool,
    axis_name: Any,
    **axes: Any,
) -> LowRankConfig:
    """The method from the arguments of :func:`scale_by_lorenza` and a residual rule."""
    config = AscentConfig(
        rho=rho,
        mu=mu,
        num_probes=num_probes,
        ascent=ascent,
        estimator=estimator,
        probe_batch_size=probe_batch_size,
        perturb_every=perturb_every,
        axis_name=axis_name,
        probe_rank=probe_rank,
        probe_factors=probe_factors,
        scale_probes=scale_probes,
        ascent_fn=ascent_fn,
        factored=factored,
    )
    check_transformation("base_optimizer", base_optimizer)
    check_choice("subspace", axes["subspace"], tuple(SUBSPACES))  # others are for methods
    inner = scale_by_adam(b1, b2, eps) if base_optimizer is None else base_optimizer
    return LowRankConfig(
        inner=optax.with_extra_args_support(inner),
        decays=(b1, b2) if base_optimizer is None else None,
        ascent=config,
        **axes,
    )


def scale_by(**arguments: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation from the same arguments."""
    return low_rank(low_rank_config(**arguments))


def with_decay(
    scaled: optax.GradientTransformationExtraArgs,
    weight_decay: Any,
    mask: Any,
    learning_rate: Any,
    factored_updates: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The transformation with decoupled weight decay and a learning rate behind it."""
    check_number("weight_decay", weight_decay)
    decay = optax.add_decayed_weights(weight_decay, None if factored_updates else mask)
    if factored_updates:
        decay = _decay_of_factored(decay)
        decay = decay if mask is None else optax.masked(decay, mask)
    return optax.chain(scaled, decay, optax.scale_by_learning_rate(learning_rate))


def _decay_of_factored(
    decay: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """``optax.add_decayed_weights`` for updates of which some are not multiplied out."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("weight_decay needs params.")
        # What Optax's stage does to an update of 0 for a parameter of 1.
        rate, state = decay.update(jnp.zeros(()), state, jnp.ones(()))

        def add(update: Any, param: Any) -> Any:
            if isinstance(update, Unformed):
                return update.with_decay(rate)
            return update + (rate * param).astype(param.dtype)

        return jax.tree.map(add, updates, params), state

    return optax.GradientTransformation(decay.init, update)
