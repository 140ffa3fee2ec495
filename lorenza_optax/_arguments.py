"""From the arguments that all of LORENZA's factories share to a transformation."""

from __future__ import annotations

from typing import Any

import optax

from lorenza_optax._ascent import AscentConfig
from lorenza_optax._checks import check_transformation
from lorenza_optax._config import LowRankConfig
from lorenza_optax._low_rank import low_rank

__all__ = ["STRUCTURAL_ARGS", "scale_by", "with_decay"]

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


def scale_by(
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
    axis_name: Any,
    **axes: Any,
) -> optax.GradientTransformationExtraArgs:
    """The transformation from the arguments of :func:`scale_by_lorenza` and a residual rule."""
    config = AscentConfig(
        rho, mu, num_probes, ascent, estimator, probe_batch_size, perturb_every, axis_name
    )
    check_transformation("base_optimizer", base_optimizer)
    inner = optax.scale_by_adam(b1, b2, eps) if base_optimizer is None else base_optimizer
    return low_rank(
        LowRankConfig(
            inner=optax.with_extra_args_support(inner),
            decays=(b1, b2) if base_optimizer is None else None,
            ascent=config,
            **axes,
        )
    )


def with_decay(
    scaled: optax.GradientTransformationExtraArgs, weight_decay: Any, mask: Any, learning_rate: Any
) -> optax.GradientTransformationExtraArgs:
    """The transformation with decoupled weight decay and a learning rate behind it."""
    return optax.chain(
        scaled,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
