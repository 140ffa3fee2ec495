"""MeZO and its variants: zeroth order along Gaussians over all parameters."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._checks import check_choice
from lorenza_optax._compose import by_forward_passes, with_learning_rate, without_learning_rate
from lorenza_optax._zeroth_order import best_of_three

__all__ = ["mezo", "scale_by_mezo"]

VARIANTS = ("sgd", "sign", "momentum", "adam", "conservative")


def mezo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    variant: str = "sgd",
    estimator: str = "central",
    momentum: jax.typing.ArrayLike = 0.9,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    factored_updates: bool = False,
    moment_dtype: Any = None,
    probe_batch_size: int | None = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""x"""
    arguments = locals()
    if variant != "conservative":
        return with_learning_rate(_build, **arguments)
    step = with_learning_rate(_build, **arguments | {"variant": "sgd"})
    return optax.chain(step, best_of_three(axis_name))


def _build(
    variant: str, momentum: Any, b1: Any, b2: Any, eps: Any, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    check_choice("variant", variant, VARIANTS)
    if variant == "conservative":
        raise ValueError(
            "variant='conservative' compares losses after whole steps, and for those it needs the"
            " learning rate: use mezo(learning_rate, variant='conservative')."
        )
    if axes["factored_updates"] and variant != "sgd":
        raise ValueError(
            f"factored_updates=True needs updates that are multiples of what was drawn;"
            f" variant={variant!r} makes others."
        )
    inner = {
        "sgd": optax.identity,
        "sign": optax.scale_by_sign,
        "momentum": lambda: optax.trace(momentum),
        "adam": lambda: optax.scale_by_adam(b1, b2, eps),
    }
    return by_forward_passes(inner[variant](), **axes)


scale_by_mezo = without_learning_rate(mezo, _build)
