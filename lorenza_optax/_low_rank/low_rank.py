"""The one transformation that every low-rank method is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent.gradient import (
    SubspaceGradients,
    with_finite_value,
    without_ascent,
)
from lorenza_optax._base.calls import (
    INSTEAD,
    WITHOUT_GRADIENTS,
    check_call,
    check_shapes,
    is_given,
)
from lorenza_optax._base.checks import value_at
from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._base.noise import Noise
from lorenza_optax._base.paths import leaves_by_path, with_arrays
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.fit import check_same_tree
from lorenza_optax._low_rank.in_update import (
    full_gradient_in_update,
    subspace_gradient_in_update,
    surroundings_of,
)
from lorenza_optax._low_rank.random_subspace import closed, opened
from lorenza_optax._low_rank.state import LowRankState, initial_state
from lorenza_optax._low_rank.step import complete, prepare, prepare_low
from lorenza_optax._low_rank.update import LowRankUpdate, RandomUpdate
from lorenza_optax._low_rank.zeroth_order import zeroth_order_gradient
from lorenza_optax._plan.plan import ProjectionPlan

__all__ = ["low_rank"]


def low_rank(config: LowRankConfig) -> optax.GradientTransformationExtraArgs:
    """Updates by an optimizer that sees the gradient in a low-rank subspace only.

    The order of one update: (1) the perturbation ε from the subspace in the state, (2) one
    backward pass at θ + ε, (3) a new subspace from that gradient if one is due, and the inner
    state carried over, (4) project, inner optimizer, lift, scale.

    Args:
      config: A choice on each axis.

    Returns:
      A transformation with state :class:`LowRankState`.
    """
    stage = config.gradient_transform
    stage = None if stage is None else optax.with_extra_args_support(stage)

    def init(params: Any) -> LowRankState:
        return initial_state(config, stage, params)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, LowRankState]:
        if config.prefers_given and is_given(updates, params):
            value_fn = None  # a stage in front may have changed the gradient, or taken SAM's
        zeroth_order = config.zeroth_order is not None
        if zeroth_order and value_fn is None:
            raise ValueError(
                "This optimizer estimates the gradient from values of the loss: call"
                " update(None, state, params, value_fn=loss, ...). Gradients are of no use to it."
            )
        check_call(updates, params, value_fn, WITHOUT_GRADIENTS if zeroth_order else INSTEAD)
        params = with_arrays(params)
        in_subspaces = isinstance(updates, SubspaceGradients)
        tree = params if in_subspaces or updates is None else updates
        plan = config.plan(tree if params is None else params)
        check_same_tree(config, plan, state)
        before, state = state, opened(config, plan, state)

        # What each kind of gradient hands on, and how it is prepared from that.
        ascent_state, stage_state = without_ascent(state.ascent), state.gradient_transform
        arrays: Any
        source: Callable[..., Any]
        if zeroth_order:
            assert value_fn is not None  # as seen above
            *arrays, ascent_state = zeroth_order_gradient(
                config, plan, state, params, value_fn, extra_args
            )
            source = lambda given, _: (given[0], {}, None)  # noqa: E731
        elif value_fn is not None and not config.needs_full_gradient:
            *arrays, ascent_state = subspace_gradient_in_update(
                config, plan, state, params, value_fn, extra_args
            )
            source = lambda given, _: (given[0], {}, given[1])  # noqa: E731
        elif in_subspaces:
            config.check_accumulates()
            _check_gradients(plan, updates)
            arrays = list(updates)
            source = lambda g, state: (prepare_low(config, plan, g[0], g[1], state), {}, None)  # noqa: E731
        else:
            arrays = updates
            if value_fn is None:
                check_shapes(plan.leaves, updates)
            else:
                around = surroundings_of(config, plan, state)
                arrays, ascent_state = full_gradient_in_update(
                    config.ascent, around, state, params, value_fn, extra_args
                )
            if stage is not None:
                arrays, stage_state = stage.update(arrays, stage_state, params, **extra_args)
            arrays = leaves_by_path(arrays)
            source = lambda given, state: (*prepare(config, plan, given, state), None)  # noqa: E731

        targets = leaves_by_path(tree if params is None else params)
        traced = {name: value for name, value in extra_args.items() if _is_arrays(value)}
        static = {name: value for name, value in extra_args.items() if name not in traced}

        def step(
            arrays: Any, targets: Any, state: Any, proposed: Any, scale: Any, more: Any
        ) -> Any:
            prepared, oriented, new = source(arrays, state)
            arguments = (targets, state, proposed, scale, {**more, **static})
            return complete(config, plan, prepared, oriented, new, *arguments)

        new_updates, new_state = in_auto_mode(
            step,
            arrays,
            targets,
            state,
            state._replace(
                ascent=with_finite_value(ascent_state, state.ascent),
                gradient_transform=stage_state,
            ),
            jnp.asarray(value_at(config.scale, state.count)),
            traced,
            like=(_like_updates(config, plan, targets, state), state),
        )
        new_state = closed(config, before, new_state)
        ordered = []
        for path in leaves_by_path(tree):
            value, dtype = new_updates[path], targets[path].dtype
            if isinstance(value, Noise):
                value = RandomUpdate(0.0, dtype, plan.leaves[path].shape, value)
            elif isinstance(value, tuple):
                value = LowRankUpdate(0.0, dtype, plan.leaves[path].matrix, *value)
            ordered.append(value)
        return jax.tree.unflatten(jax.tree.structure(tree), ordered), new_state

    # For subspace_value_and_grad, which takes gradients as this transformation will want them.
    update.config = config  # pyright: ignore[reportFunctionMemberAccess]
    return optax.GradientTransformationExtraArgs(init, update)


def _like_updates(
    config: LowRankConfig, plan: ProjectionPlan, targets: dict[str, Any], state: LowRankState
) -> dict[str, Any]:
    """Arrays with the shardings of the updates: a parameter's, or replicated factors."""
    if not config.factored_updates:
        return targets
    like = targets | dict.fromkeys(plan.projected, (state.count, state.count))
    if config.keeps_noise:
        like |= dict.fromkeys(plan.others, Noise(state.count, state.count))
    return like


def _is_arrays(value: Any) -> bool:
    return all(isinstance(leaf, (jax.Array, float, int)) for leaf in jax.tree.leaves(value))


def _check_gradients(plan: ProjectionPlan, gradients: SubspaceGradients) -> None:
    """Raises unless gradients in subspaces are those of this plan."""
    expected = {path: leaf.low_rank_shape for path, leaf in plan.projected.items()}
    expected |= {path: leaf.shape for path, leaf in plan.others.items()}
    found = {path: g.shape for tree in gradients for path, g in tree.items()}
    for path in sorted({*expected, *found}):
        if expected.get(path) != found.get(path):
            raise ValueError(
                f"SubspaceGradients have {found.get(path, 'nothing')} for leaf {path!r}, where this"
                f" optimizer needs {expected.get(path, 'nothing')}: give subspace_value_and_grad"
                " the same rank, proj_type and weight_dimension_numbers."
            )
