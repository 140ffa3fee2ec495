"""Training a few layers at a time, with state for these alone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorenza_optax._ascent.gradient import BEGIN, LAYERS, step_key
from lorenza_optax._base.calls import check_shapes
from lorenza_optax._base.checks import (
    check_int,
    check_not_injected,
    check_number,
    check_transformation,
    value_at,
)
from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._layerwise.layer_stacks import examples_of, gathered, masked, sampled, scattered
from lorenza_optax._layerwise.layers import Layers, check_pattern, find_layers
from lorenza_optax._linalg.decompositions import total
from lorenza_optax._low_rank.compose import by_backprop
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.fit import OTHERWISE_MADE
from lorenza_optax._low_rank.in_update import given_or_taken_gradient
from lorenza_optax._low_rank.state import LowRankState, is_placeholder
from lorenza_optax._plan.matrix_view import WeightDimensionNumbers
from lorenza_optax._plan.plan import LeafPlan, ProjectionPlan

__all__ = ["LayerwiseState", "layerwise"]

Arrays = dict[str, jax.Array]
Engine = optax.GradientTransformationExtraArgs


class LayerwiseState(NamedTuple):
    """State of :func:`methods.owlore`.

    Attributes:
      count: Updates so far, skipped ones included, int32.
      active: Which layers are trained (k,), ascending, int32.
      weight_decay: State of the weight decay.
      gradient_transform: State of ``gradient_transform``, else empty.
      layers: The :class:`LowRankState` of the trained layers, as stacks (k, ...) whose paths
        have N for a layer's number; it begins anew with each sampling.
      rest: The :class:`LowRankState` of the leaves outside the layers.
    """

    count: Any
    active: Any
    weight_decay: Any
    gradient_transform: Any
    layers: Any
    rest: Any


def layerwise(
    inner: optax.GradientTransformation,
    odds: Callable[[Layers, Arrays], jax.Array],
    *,
    sampling_interval: int,
    num_layers: int,
    layers: str | None,
    layer_scores: Any,
    rank: Any,
    weight_dimension_numbers: Any,
    scale: Any,
    weight_decay: Any,
    mask: Any,
    gradient_transform: optax.GradientTransformation | None,
    **axes: Any,
) -> Engine:
    """Trains ``num_layers`` layers, others every ``sampling_interval`` updates, and the rest.

    A gradient that is not finite, of what is trained, gives a zero update (only weight decay
    acts) and leaves the inner states as they are; layers are sampled by the count all the same.

    Args:
      inner: The optimizer of low-rank gradients, and of leaves that are not projected.
      odds: (layers, leaves) -> numbers (L,) in proportion to which layers are sampled.
      sampling_interval: Updates between samplings.
      num_layers: k.
      layers: Pattern for :func:`find_layers`.
      layer_scores: Numbers (L,) in place of those of ``odds``, or None.
      rank: Of the leaves by their own paths; likewise the next.
      weight_dimension_numbers: Of the leaves.
      scale: Factor of projected leaves' updates, a number or a schedule.
      weight_decay: Of what is trained; behind it comes the learning rate only.
      mask: Optax's weight-decay mask.
      gradient_transform: Sees gradients that are zero in layers which are not trained.
      **axes: Further ones of the low-rank method, as for :func:`by_backprop`.

    Returns:
      A transformation with state :class:`LayerwiseState`.
    """
    check_int("sampling_interval", sampling_interval, 1)
    check_int("num_layers", num_layers, 1)
    check_pattern("layers", layers)
    _check_scores(layer_scores)
    check_not_injected("mask", mask)
    check_transformation("gradient_transform", gradient_transform)
    stage = optax.with_extra_args_support(gradient_transform or optax.identity())
    check_number("weight_decay", weight_decay)
    decay = optax.with_extra_args_support(optax.add_decayed_weights(weight_decay, mask))
    make = functools.partial(by_backprop, inner, **axes)
    whole = make(rank=rank, weight_dimension_numbers=weight_dimension_numbers, scale=scale)
    config: LowRankConfig = whole.update.config  # pyright: ignore

    def found_in(plan: ProjectionPlan) -> Layers:
        found = find_layers(plan, layers)
        if found.number < num_layers:
            raise ValueError(
                f"num_layers={num_layers} exceeds the {found.number} layers that are found, of"
                f" {', '.join(role.name for role in found.roles)}."
            )
        if layer_scores is not None and np.shape(layer_scores) != (found.number,):
            raise ValueError(
                f"layer_scores must have one number for each of the {found.number} layers that are"
                f" found, got shape {np.shape(layer_scores)}."
            )
        return found

    def engines(plan: ProjectionPlan, found: Layers, scale: Any) -> tuple[Engine, Engine]:
        """Those of the stacks of layers and of the rest."""
        roles = {role.name: role for role in found.roles}
        rest = {path: plan.leaves[path] for path in found.outside}
        return (
            make(
                rank={name: role.leaf.rank for name, role in roles.items()},
                weight_dimension_numbers={name: role.numbers for name, role in roles.items()},
                scale=scale,
            ),
            make(
                rank={path: leaf.rank for path, leaf in rest.items()},
                weight_dimension_numbers={path: _numbers(leaf) for path, leaf in rest.items()},
                scale=scale,
            ),
        )

    def init(params: Any) -> LayerwiseState:
        stages = (decay.init(params), stage.init(params))
        if is_placeholder(params):
            return LayerwiseState(0, 0, *stages, whole.init(params), whole.init(params))
        plan, leaves = config.plan(params), leaves_by_path(params)
        plan.warn()
        found = found_in(plan)
        of_layers, of_rest = engines(plan, found, 1.0)
        return LayerwiseState(
            jnp.zeros((), jnp.int32),
            jnp.arange(num_layers, dtype=jnp.int32),
            *stages,
            _quiet_init(of_layers, examples_of(found, num_layers, leaves)),
            _quiet_init(of_rest, {path: leaves[path] for path in found.outside}),
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, LayerwiseState]:
        gradients, ascent = given_or_taken_gradient(
            config.ascent, updates, state.rest, params, value_fn, extra_args
        )
        plan, leaves = config.plan(params), leaves_by_path(params)
        check_shapes(plan.leaves, gradients)
        found = found_in(plan)
        if state.active.shape != (num_layers,):
            raise ValueError(
                f"The state trains {state.active.size} layers at a time, and num_layers="
                f"{num_layers}: it was {OTHERWISE_MADE}."
            )
        of_layers, of_rest = engines(plan, found, value_at(scale, state.count))
        stacked = examples_of(found, num_layers, leaves)
        rest = {path: leaves[path] for path in found.outside}

        due, seed = state.count % sampling_interval == 0, (state.rest.ascent.seed, state.count)

        def draw(leaves: Arrays, seed: jax.Array, count: jax.Array) -> jax.Array:
            scores = odds(found, leaves) if layer_scores is None else jnp.asarray(layer_scores)
            scores = scores.astype(jnp.float32)
            return sampled(step_key(seed, count, LAYERS), scores, num_layers)

        active = jax.lax.cond(
            due, lambda: in_auto_mode(draw, leaves, *seed, like=state.active), lambda: state.active
        )
        of_active = functools.partial(_with_active, found, active)
        inside: Any = state.layers._replace(ascent=ascent._replace(seed=state.layers.ascent.seed))
        fresh = _quiet_init(of_layers, stacked)
        inside = jax.lax.cond(due, lambda: _begun(inside, fresh, *seed), lambda: inside)

        rebuild = jax.tree.structure(gradients).unflatten
        given, stage_state = leaves_by_path(gradients), state.gradient_transform
        if gradient_transform is not None:
            of_trained = of_active(masked, given, like=given)
            seen = rebuild([of_trained[path] for path in given])
            changed, stage_state = stage.update(seen, stage_state, params, **extra_args)
            given = leaves_by_path(changed)
        parts = (of_active(gathered, given, like=stacked), {path: given[path] for path in rest})
        (low, others), usable = _poisoned(parts)
        of_stacks, inside = of_layers.update(low, inside, stacked, **extra_args)
        outside = state.rest._replace(ascent=ascent)
        of_others, outside = of_rest.update(others, outside, rest, **extra_args)
        kept = lambda new, old: jnp.where(usable, new, old)  # noqa: E731
        stage_state = jax.tree.map(kept, stage_state, state.gradient_transform)

        inner_leaves = {path: leaves[path] for role in found.roles for path in role.paths}
        full = leaves_by_path(of_others) | of_active(scattered, of_stacks, like=inner_leaves)
        trained = of_active(masked, leaves, like=leaves)
        new_updates, decay_state = decay.update(
            rebuild([full[path] for path in given]),
            state.weight_decay,
            rebuild([trained[path] for path in given]),
        )
        count = optax.safe_increment(state.count)
        return new_updates, LayerwiseState(count, active, decay_state, stage_state, inside, outside)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_scores(scores: Any) -> None:
    """Raises for scores that are no odds; injected ones may be traced, so that none is known."""
    if scores is None or isinstance(scores, jax.Array):
        return
    numbers = np.asarray(scores, np.float64)
    if not np.all(np.isfinite(numbers)) or np.any(numbers < 0):
        raise ValueError(f"layer_scores must be finite and at least 0, got {scores}.")


def _with_active(
    found: Layers, active: jax.Array, function: Callable[..., Arrays], arrays: Any, like: Arrays
) -> Arrays:
    return in_auto_mode(lambda *args: function(found, *args), arrays, active, like=like)


def _numbers(leaf: LeafPlan) -> WeightDimensionNumbers | None:
    view = leaf.view
    return None if view is None else WeightDimensionNumbers(view.row_axes, view.column_axes)


def _quiet_init(engine: Engine, leaves: Arrays) -> Any:
    """A new state. What there is to be warned of was said of the plan for all leaves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine.init(leaves)


def _begun(
    old: LowRankState, fresh: LowRankState, seed: jax.Array, count: jax.Array
) -> LowRankState:
    """A new state for other layers; what tells of the training as a whole goes on.

    Its own count begins at 0, so that its keys need another seed.
    """
    own = jax.random.key_data(step_key(seed, count, BEGIN))
    return fresh._replace(skipped=old.skipped, ascent=old.ascent._replace(seed=own))


def _poisoned(trees: Any) -> tuple[Any, jax.Array]:
    """Gradients that are nan in all of them if they are not finite in one; and whether not."""
    wide = (g.astype(jnp.promote_types(g.dtype, jnp.float32)) for g in jax.tree.leaves(trees))
    usable = jnp.isfinite(total(jnp.sum(jnp.square(g)) for g in wide))
    return jax.tree.map(lambda g: jnp.where(usable, g, jnp.nan), trees), usable
