"""From the choices of a named method to its transformation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent.ascent import AscentConfig
from lorenza_optax._base.checks import check_choice, check_not_injected, check_transformation
from lorenza_optax._low_rank.arguments import with_decay
from lorenza_optax._low_rank.config import Coordinates, LowRankConfig
from lorenza_optax._low_rank.low_rank import low_rank
from lorenza_optax._subspace.subspace import SUBSPACES

__all__ = [
    "at_rest_while_zero",
    "by_backprop",
    "by_forward_passes",
    "in_float32",
    "with_learning_rate",
    "without_learning_rate",
]

Build = Callable[..., optax.GradientTransformationExtraArgs]
_BEHIND = ("weight_decay", "mask", "learning_rate")


def with_learning_rate(build: Build, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """A method with its weight decay and learning rate behind it, from all its arguments."""
    check_not_injected("mask", arguments.get("mask"))
    decay, mask, rate = (arguments.pop(name) for name in _BEHIND)
    factored = arguments.get("factored_updates", False)
    return with_decay(build(**arguments), decay, mask, rate, factored)


def without_learning_rate(
    method: Callable[..., Any], build: Build, behind: Sequence[str] = _BEHIND
) -> Build:
    """``scale_by_NAME`` from ``NAME``: its signature without what is behind it in the chain."""
    whole = inspect.signature(method)
    name = method.__name__
    own = [p for p in whole.parameters.values() if p.name not in behind]
    left_out = " and ".join(n.replace("_", " ") for n in behind if n != "mask")
    signature = whole.replace(parameters=own)

    def scale_by(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return build(**bound.arguments)

    scale_by.__name__ = scale_by.__qualname__ = f"scale_by_{name}"
    scale_by.__module__ = method.__module__
    scale_by.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    scale_by.__doc__ = f"""Rescales updates: :func:`{name}` without {left_out}.

    Args:
      {", ".join(p.name for p in own)}: As in :func:`{name}`.

    Returns:
      A transformation of the ``scale_by_*`` kind: no sign flip, no learning rate behind it.

    Raises:
      ValueError, TypeError: As :func:`{name}`.

    Examples:
      ``optax.chain(scale_by_{name}(...), optax.scale_by_learning_rate(1e-3))``
    """
    return scale_by


def by_backprop(
    inner: optax.GradientTransformation,
    *,
    subspace: str,
    subspaces: Sequence[str] = tuple(SUBSPACES),
    axis_name: Any = None,
    **axes: Any,
) -> optax.GradientTransformationExtraArgs:
    """A low-rank method that is given gradients, or else takes them itself from ``value_fn``."""
    check_choice("subspace", subspace, subspaces)
    ascent = AscentConfig(rho=0.0, ascent="none", axis_name=axis_name)
    return _low_rank(inner, ascent, subspace=subspace, prefers_given=True, **axes)


def by_forward_passes(
    inner: optax.GradientTransformation,
    *,
    mu: Any,
    num_probes: int,
    estimator: str,
    probe_batch_size: int | None,
    axis_name: Any,
    coordinates: Coordinates | None = None,
    **axes: Any,
) -> optax.GradientTransformationExtraArgs:
    """A zeroth-order method: along P N with these coordinates N, or without them in full space."""
    ascent = AscentConfig(
        rho=0.0,
        mu=mu,
        num_probes=num_probes,
        ascent="none",
        estimator=estimator,
        probe_batch_size=probe_batch_size,
        axis_name=axis_name,
    )
    if coordinates is None:
        axes = {"rank": 1, "update_proj_gap": 1, "in_full_space": True, **axes}
        coordinates = Coordinates(
            lambda normal, *_: normal, lambda leaf: (), lambda leaf: 1.0, others_factor=1.0
        )
    return _low_rank(inner, ascent, zeroth_order=coordinates, **axes)


def _low_rank(
    inner: optax.GradientTransformation, ascent: AscentConfig, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    check_transformation("inner", inner)
    if axes.get("inner_others") is not None:
        axes["inner_others"] = optax.with_extra_args_support(axes["inner_others"])
    inner = optax.with_extra_args_support(inner)
    return low_rank(LowRankConfig(inner=inner, ascent=ascent, **axes))


def in_float32(stage: optax.GradientTransformation) -> optax.GradientTransformation:
    """A stage that computes and keeps its state in float32 at least, whatever the params' dtype."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = stage.update(wide(updates), state, wide(params))
        return jax.tree.map(lambda n, o: n.astype(o.dtype), new, updates), state

    return optax.GradientTransformation(lambda params: stage.init(wide(params)), update)


def at_rest_while_zero(stage: optax.GradientTransformation) -> optax.GradientTransformation:
    """A stage whose state an update of zeros, one that was skipped, leaves as it is."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moves = jnp.asarray([jnp.any(update != 0) for update in jax.tree.leaves(updates)]).any()
        new, after = stage.update(updates, state, params)
        return new, jax.tree.map(lambda n, o: jnp.where(moves, n, o), after, state)

    return optax.GradientTransformation(stage.init, update)
