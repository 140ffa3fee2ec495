"""Checks of arguments, made once at construction, and the messages they give."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_INJECTED = (
    " Under optax.inject_hyperparams every number becomes an array unless it is named in"
    " static_args; pass static_args=lorenza_optax.STRUCTURAL_ARGS (for another factory than"
    " lorenza, lorenza_optax.structural_args(factory))."
)


def check_int(name: str, value: Any, minimum: int) -> None:
    """Raises unless ``value`` is a Python int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        hint = _INJECTED if isinstance(value, (jax.Array, np.ndarray)) else ""
        raise TypeError(f"{name} must be an int, got {type(value).__name__}.{hint}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if not any(value is choice or value == choice for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}.")


def check_number(name: str, value: Any, *, above: float | None = None) -> None:
    """Raises unless ``value`` is a finite number (above a bound), a schedule or an array."""
    if callable(value) or isinstance(value, jax.Array):
        return  # a schedule, or injected and perhaps traced: its value is not known here
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.ndarray)):
        raise TypeError(f"{name} must be a float or a schedule, got {type(value).__name__}.")
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}.")
    if above is not None and number <= above:
        raise ValueError(f"{name} must be above {above}, got {number}.")


def check_constant(name: str, value: Any, minimum: float) -> None:
    """Raises unless ``value`` is a number of at least ``minimum``, no schedule."""
    if callable(value):
        raise TypeError(f"{name} must be a number, a schedule cannot change it.")
    check_number(name, value)
    if not isinstance(value, jax.Array) and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_decay(name: str, value: Any) -> None:
    """Raises unless ``value``, the decay rate of a moment, is a number from 0 to below 1."""
    check_constant(name, value, 0)
    if not isinstance(value, jax.Array) and value >= 1:
        raise ValueError(f"{name} must be below 1, got {value}.")


def check_transformation(name: str, value: Any) -> None:
    """Raises unless ``value`` is None or an Optax transformation."""
    if value is not None and not (hasattr(value, "init") and hasattr(value, "update")):
        call = f" Call it: {value.__name__}(...)." if inspect.isfunction(value) else ""
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {type(value).__name__}.{call}"
        )


def check_not_injected(name: str, value: Any) -> None:
    """Raises if ``inject_hyperparams`` has turned a structural argument into an array."""
    if isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must not be an array.{_INJECTED}")


def check_dtype(name: str, dtype: Any, choices: Sequence[str]) -> jnp.dtype | None:
    """Returns the dtype that a name or dtype stands for, or None; raises if not a choice."""
    if dtype is None:
        return None
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in choices:
        raise ValueError(f"{name} must be None or one of {', '.join(choices)}, got {dtype!r}.")
    return resolved


def value_at(value: Any, count: jax.typing.ArrayLike) -> Any:
    """The value of a hyperparameter at a count: a number as it is, a schedule called."""
    return value(count) if callable(value) else value


def check_share(name: str, value: Any) -> None:
    """Raises unless ``value`` is a number above 0 and below 1 that is fixed: it gives shapes."""
    check_not_injected(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}.")
    if not 0 < float(value) < 1:
        raise ValueError(f"{name} must be above 0 and below 1, got {value}.")
