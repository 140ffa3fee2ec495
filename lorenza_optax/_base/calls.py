"""Checks of a call of ``update`` and of what the user's loss returns, made while tracing."""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._base.paths import has_masked_nodes, shape_differences

__all__ = [
    "INSTEAD",
    "WITHOUT_GRADIENTS",
    "check_call",
    "check_scalar",
    "check_shapes",
    "is_given",
    "without_aux",
    "wrapper_around",
]

INSTEAD = (
    "take the gradient outside with lorenza_optax.perturbed_value_and_grad(value_fn, ...)"
    "(params, ..., opt_state=opt_state) and pass it to update without value_fn"
)

WITHOUT_GRADIENTS = (
    "use the method by itself, close value_fn over the parameters that shall stay as they are, and"
    " give it the others"
)

# Wrappers that hand on gradients or counts of their own, and not those of this call.
_WRAPPERS = ("MultiSteps", "apply_if_finite", "mechanize")


def is_given(updates: Any, params: Any) -> bool:
    """Whether ``update`` was given a gradient: not None, nor the parameters for want of one.

    ``nnx.Optimizer.update`` must be given something.
    """
    leaves, own = jax.tree.leaves(updates), jax.tree.leaves(params)
    same = len(leaves) == len(own) and all(a is b for a, b in zip(leaves, own, strict=True))
    return bool(leaves) and not same


def check_call(updates: Any, params: Any, value_fn: Any, instead: str = INSTEAD) -> None:
    """Raises where ``update`` lacks an argument, or would not take the gradient that is meant.

    What to do inside a wrapper that does not go with ``value_fn`` is said by ``instead``.
    """
    if value_fn is None:
        if updates is None:
            raise ValueError(
                "update got neither gradients nor value_fn=. Call update(gradients, state, params),"
                " or update(None, state, params, value_fn=loss, ...) with what the loss names."
            )
        if params is None and hasattr(updates, "projected"):
            raise ValueError("update needs params when it is given SubspaceGradients.")
        return
    if params is None:
        raise ValueError("update(..., value_fn=...) needs params: the point to perturb.")
    _refuse_in_wrappers(params, instead)


def check_shapes(leaves: Mapping[str, Any], gradients: Any) -> None:
    """Raises unless gradients have the shapes of the leaves of a plan."""
    for path, needed, found in shape_differences(dict(leaves), gradients):
        found, needed = ("nothing" if shape is None else shape for shape in (found, needed))
        raise ValueError(
            f"The gradient has {found} for leaf {path!r}, where the parameters have {needed}."
        )


def _refuse_in_wrappers(params: Any, instead: str) -> None:
    """Raises inside a wrapper that does not hand on all that the gradient depends on.

    ``masked`` and ``partition`` show a part of the parameters only; ``MultiSteps``,
    ``apply_if_finite`` and ``mechanize`` act on gradients that are ignored here. The former are
    seen in the parameters, the latter only on the call stack, while the update is traced.
    """
    if has_masked_nodes(params):
        wrapper = "optax.masked or optax.partition"
    else:
        wrapper = wrapper_around(_WRAPPERS)
    if wrapper:
        raise ValueError(
            f"update(..., value_fn=...) does not work inside {wrapper}, which does not hand on"
            f" all that the gradient depends on. Instead, {instead}."
        )


def wrapper_around(names: Container[str]) -> str:
    """Which of these functions of Optax is on the call stack, "" for none."""
    frame = sys._getframe(1)
    while frame is not None:
        function = frame.f_code.co_qualname.split(".")[0]
        if frame.f_globals.get("__name__", "").startswith("optax.") and function in names:
            return f"optax.{function}"
        frame = frame.f_back
    return ""


def without_aux(result: Any) -> Any:
    """What a loss returned that was not said to return more; raises where it did."""
    if isinstance(result, tuple):
        raise TypeError(
            "The loss must return a scalar, got a tuple: pass has_aux=True if it is (value, aux)."
        )
    return result


def check_scalar(value: Any, has_aux: bool) -> None:
    """Raises unless an (abstract) result of the user's function is a real scalar."""
    if has_aux:
        if not isinstance(value, tuple) or len(value) != 2:
            raise TypeError(f"With has_aux=True value_fn must return (value, aux), got {value}.")
        value = value[0]
    elif isinstance(value, tuple):
        raise TypeError(
            "value_fn must return a scalar, got a tuple. For auxiliary output,"
            f" {INSTEAD.replace('value_fn, ...', 'value_fn, has_aux=True, ...')}."
        )
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        found = f"{dtype} of shape {shape}" if dtype is not None else type(value).__name__
        raise TypeError(f"value_fn must return a real scalar, got {found}: take the mean.")
