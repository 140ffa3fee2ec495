"""The gradient at the ascent point: what both ways of asking for it have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._ascent import (
    AscentConfig,
    displace,
    estimate_ascent,
)
from lorenza_optax._calls import check_scalar
from lorenza_optax._checks import value_at
from lorenza_optax._directions import Directions, Probe
from lorenza_optax._paths import leaves_by_path

__all__ = [
    "FullSpaceAscentState",
    "SubspaceAscentState",
    "draw_probes",
    "gradient_in_update",
    "initial_ascent_state",
    "step_key",
    "value_and_grad_at_ascent",
    "without_ascent",
]

# Salts that are folded into a step's key, so that its uses are independent.
PROBE, SKETCH, ROUNDING = range(3)


class SubspaceAscentState(NamedTuple):
    """What an ascent in the subspace keeps.

    Attributes:
      seed: Key data that each step's key is derived from, uint32 (2,).
      value: The loss at the perturbed point, float32; 0 before the first ``value_fn``.
      ascent_norm: ‖A‖ of the last perturbed step, float32; 0 where there was no ascent.
      perturbed: Whether the last update was made at a perturbed point.
    """

    seed: Any
    value: Any
    ascent_norm: Any
    perturbed: Any


class FullSpaceAscentState(NamedTuple):
    """What an ascent in the full space keeps; fields as in :class:`SubspaceAscentState`."""

    seed: Any
    value: Any
    ascent_norm: Any
    perturbed: Any


AscentState = SubspaceAscentState | FullSpaceAscentState


def initial_ascent_state(kind: type[Any], seed: int) -> Any:
    """A fresh :class:`SubspaceAscentState` or :class:`FullSpaceAscentState`."""
    return kind(
        seed=jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
        value=jnp.zeros((), jnp.float32),
        ascent_norm=jnp.zeros((), jnp.float32),
        perturbed=jnp.zeros((), bool),
    )


def without_ascent(state: AscentState) -> AscentState:
    """The ascent's state after an update on a gradient from outside."""
    return state._replace(ascent_norm=jnp.zeros((), jnp.float32), perturbed=jnp.zeros((), bool))


def step_key(seed: jax.Array, count: jax.Array, salt: int) -> jax.Array:
    """The key of one use in one step: a function of the seed and the count, kept nowhere."""
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, count), salt)


def draw_probes(
    directions: Directions, state: AscentState, count: jax.Array, config: AscentConfig
) -> Probe:
    """The probes of update ``count``: the same whichever way the gradient is asked for."""
    return directions.draw(step_key(state.seed, count, PROBE), config.num_probes)


def _evaluation_point(loss: Callable[[Any], Any], params: Any, paths: frozenset[str]) -> Any:
    """The parameters with perturbed leaves in at least float32, so that ε is not rounded away.

    A displacement is smaller than a bfloat16 step of most weights. Where a mixture of dtypes
    does not go through the loss (a scan's carry must keep its dtype), all leaves are widened.
    """
    arrays = leaves_by_path(params)
    treedef = jax.tree.structure(params)
    wide = {
        path: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        for path, leaf in arrays.items()
    }
    mixed = {path: wide[path] if path in paths else leaf for path, leaf in arrays.items()}
    if all(leaf.dtype == mixed[path].dtype for path, leaf in arrays.items()):
        return params
    jax.eval_shape(loss, params)  # what is wrong with the loss itself is raised as it is
    failure: Exception | None = None
    for candidate in (mixed, wide):
        point = jax.tree.unflatten(treedef, list(candidate.values()))
        try:
            jax.eval_shape(loss, point)
            return point
        except TypeError as error:
            failure = error
    raise TypeError(
        "value_fn does not accept float32 parameters, which a perturbation needs: in"
        f" {', '.join(sorted({str(leaf.dtype) for leaf in arrays.values()}))} it would be rounded"
        " away. Let it cast its activations where it needs a fixed dtype (a scan's carry), or"
        " pass rho=0."
    ) from failure


def _varying(leaf: jax.Array, axis_name: Any) -> jax.Array:
    """Marks a leaf as different on each device of a mapped axis.

    ``shard_map`` sums the gradient of what it knows to be replicated over the axis; the mean
    that is meant would then be of sums.
    """
    axes = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    known = getattr(jax.typeof(leaf), "vma", frozenset())
    missing = tuple(axis for axis in axes if axis not in known)
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf


def value_and_grad_at_ascent(
    loss: Callable[[Any], Any],
    params: Any,
    directions: Directions,
    probes: Probe,
    config: AscentConfig,
    *,
    count: jax.Array,
    ready: jax.typing.ArrayLike,
    has_aux: bool = False,
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """The loss and its gradient at θ + ε, with ε = ρ A / ‖A‖.

    One backward pass, always. The forward passes that find A are made on perturbed steps only.

    Args:
      loss: Parameters to a scalar, or with ``has_aux`` to (scalar, aux).
      params: θ.
      directions: Where A is looked for.
      probes: The stacked probes of this step, members of ``directions``.
      config: The ascent's configuration.
      count: Updates made so far: the argument of schedules, and of ``perturb_every``.
      ready: Whether there is a subspace yet.
      has_aux: Whether ``loss`` returns auxiliary output too.

    Returns:
      ``(value or (value, aux), gradients, ‖A‖, perturbed)``; the gradients have the dtypes of
      ``params``.
    """

    def checked(at: Any) -> Any:
        result = loss(at)
        check_scalar(result, has_aux)
        return result

    def scalar(at: Any) -> jax.Array:
        return checked(at)[0] if has_aux else checked(at)

    point, norm, perturbed = params, jnp.zeros((), jnp.float32), jnp.zeros((), bool)
    if directions.paths and not config.never_perturbs:
        rho, mu = value_at(config.rho, count), value_at(config.mu, count)
        perturbed = jnp.asarray(ready) & (jnp.asarray(rho) != 0)
        perturbed &= count % config.perturb_every == 0
        center = _evaluation_point(checked, params, directions.paths)
        weights, norm = jax.lax.cond(
            perturbed,
            lambda: estimate_ascent(scalar, center, directions, probes, mu, config),
            lambda: (directions.combine(jnp.zeros(config.num_probes), probes).weights, norm),
        )
        perturbed &= norm > 0
        ascent = Probe(weights, None if probes.keys is None else probes.keys[:, 0])
        point = displace(center, directions.direction(ascent.scaled(rho)), 1)
    if config.axis_name is not None:
        point = jax.tree.map(lambda leaf: _varying(leaf, config.axis_name), point)
    value, grads = jax.value_and_grad(checked, has_aux=has_aux)(point)
    if config.axis_name is not None:
        grads = jax.lax.pmean(grads, config.axis_name)
        mean = jax.lax.pmean(value[0] if has_aux else value, config.axis_name)
        value = (mean, value[1]) if has_aux else mean
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    return value, grads, norm, perturbed


def gradient_in_update(
    value_fn: Callable[..., Any],
    extra_args: Mapping[str, Any],
    params: Any,
    state: AscentState,
    directions: Directions,
    config: AscentConfig,
    *,
    count: jax.Array,
    ready: jax.typing.ArrayLike,
) -> tuple[Any, AscentState]:
    """The gradient at the ascent point for an ``update`` that was given ``value_fn``.

    Args:
      value_fn: The user's loss; it gets those of ``extra_args`` that it names, as in Optax.
      extra_args: The keyword arguments of ``update``.
      params: θ.
      state: The ascent's state.
      directions: Where A is looked for.
      config: The ascent's configuration.
      count: Updates made so far.
      ready: Whether there is a subspace yet.

    Returns:
      The gradient, and the state with what was found; a loss that is not finite leaves the
      last value in it.
    """
    named = inspect.signature(value_fn).parameters
    kwargs = {name: value for name, value in extra_args.items() if name in named}
    value, gradients, norm, perturbed = value_and_grad_at_ascent(
        lambda at: value_fn(at, **kwargs),
        params,
        directions,
        draw_probes(directions, state, count, config),
        config,
        count=count,
        ready=ready,
    )
    value = value.astype(jnp.float32)
    return gradients, state._replace(
        value=jnp.where(jnp.isfinite(value), value, state.value),
        ascent_norm=norm,
        perturbed=perturbed,
    )
