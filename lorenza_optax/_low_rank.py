"""The one transformation that every low-rank method is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._calls import check_call
from lorenza_optax._checks import value_at
from lorenza_optax._config import LowRankConfig
from lorenza_optax._directions import Directions, full_space, in_subspace
from lorenza_optax._gradient import (
    FullSpaceAscentState,
    SubspaceAscentState,
    gradient_in_update,
    initial_ascent_state,
    without_ascent,
)
from lorenza_optax._inner import check_inner, store_moments
from lorenza_optax._mesh import in_auto_mode
from lorenza_optax._paths import leaves_by_path
from lorenza_optax._plan import ProjectionPlan
from lorenza_optax._residual import keeps_norm
from lorenza_optax._step import LowRankState, examples, low_rank_step
from lorenza_optax._transport import check_rotatable

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
        if isinstance(params, _PLACEHOLDER):
            return _placeholder_state(config, stage, params)
        plan = config.plan(params)
        if not config.in_full_space:
            plan.warn()
        low, others = examples(plan, leaves_by_path(params))
        for example in filter(None, (low, others)):
            check_inner(config.inner, example)
        projected = config.inner.init(low)
        if config.moment_transport == "rotate":
            check_rotatable(config.inner, projected, jax.tree.map(jnp.shape, low))
        q, r = _empty_factors(config, plan)
        norms = {path: jnp.zeros(leaf.matrix.batch) for path, leaf in plan.projected.items()}
        kind = FullSpaceAscentState if config.in_full_space else SubspaceAscentState
        dtype = config.stored_moment_dtype()
        return LowRankState(
            count=jnp.zeros((), jnp.int32),
            last_refresh=jnp.full((), -1, jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            q=q,
            r=r,
            projected=store_moments(projected, dtype, None),
            others=store_moments(config.inner.init(others), dtype, None),
            residual_norms=norms if keeps_norm(config.residual) else {},
            gradient_transform=() if stage is None else stage.init(params),
            captured_energy=jnp.zeros((), jnp.float32),
            ascent=initial_ascent_state(kind, config.seed),
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, LowRankState]:
        check_call(updates, params, value_fn)
        plan = config.plan(updates if params is None else params)
        _check_same_tree(config, plan, state)
        if value_fn is not None:
            updates, ascent_state = gradient_in_update(
                value_fn,
                extra_args,
                params,
                state.ascent,
                directions(plan, state, leaves_by_path(params)),
                config.ascent,
                count=state.count,
                ready=config.in_full_space or state.last_refresh >= 0,
            )
        else:
            ascent_state = without_ascent(state.ascent)
        gradients, stage_state = updates, state.gradient_transform
        if stage is not None:
            gradients, stage_state = stage.update(updates, stage_state, params, **extra_args)

        leaves = leaves_by_path(gradients)
        targets = leaves if params is None else leaves_by_path(params)
        traced = {name: value for name, value in extra_args.items() if _is_arrays(value)}
        static = {name: value for name, value in extra_args.items() if name not in traced}

        def step(*args: Any) -> Any:
            *arrays, more = args
            return low_rank_step(config, plan, *arrays, extra_args={**more, **static})

        new_updates, new_state = in_auto_mode(
            step,
            leaves,
            targets,
            state,
            state._replace(ascent=ascent_state, gradient_transform=stage_state),
            jnp.asarray(value_at(config.scale, state.count)),
            traced,
            like=(targets, state),
        )
        ordered = [new_updates[path] for path in leaves_by_path(updates)]
        return jax.tree.unflatten(jax.tree.structure(updates), ordered), new_state

    def directions(
        plan: ProjectionPlan, state: LowRankState, params: dict[str, jax.Array]
    ) -> Directions:
        if config.in_full_space:
            return full_space(params)
        if config.ascent.never_perturbs:
            return in_subspace({}, {}, {}, params)
        views = {path: leaf.matrix for path, leaf in plan.projected.items()}
        return in_subspace(views, state.q, state.r, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_arrays(value: Any) -> bool:
    return all(isinstance(leaf, (jax.Array, float, int)) for leaf in jax.tree.leaves(value))


def _empty_factors(
    config: LowRankConfig, plan: ProjectionPlan
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    q, r = {}, {}
    for path, leaf in plan.projected.items():
        view, dtype = leaf.matrix, config.factor_dtype or leaf.dtype
        if config.stores_both_factors or view.compressed == "left":
            q[path] = jnp.zeros((*view.batch, view.m, leaf.rank), dtype)
        if config.stores_both_factors or view.compressed == "right":
            r[path] = jnp.zeros((*view.batch, leaf.rank, view.n), dtype)
    return q, r


def _check_same_tree(config: LowRankConfig, plan: ProjectionPlan, state: LowRankState) -> None:
    """Raises where a state was made for other leaves or another rank."""
    expected = jax.eval_shape(lambda: _empty_factors(config, plan))
    for name, now, then in zip("qr", expected, (state.q, state.r), strict=True):
        for path in sorted({*now, *then}):
            shapes = [tree[path].shape if path in tree else "nothing" for tree in (now, then)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"The state holds {shapes[1]} as factor {name} of leaf {path!r}, where these"
                    f" parameters and arguments need {shapes[0]}: it was made by init for other"
                    " parameters or with another rank, proj_type or rho."
                )


def _capture_placeholder() -> type:
    """The class of the tree that ``optax.tree.map_params`` calls ``init`` with."""
    seen = []
    optax.tree.map_params(lambda params: seen.append(params) or params, lambda leaf: leaf, 0)
    return type(seen[0])


_PLACEHOLDER = _capture_placeholder()


def _placeholder_state(config: LowRankConfig, stage: Any, params: Any) -> LowRankState:
    """A state for ``optax.tree.map_params`` in which nothing passes for a copy of the params.

    Low-rank arrays have neither the shape nor the tree of the parameters, so a parameter's
    sharding must not be mapped on them: one leaf stands for each whole field.
    """
    kind = FullSpaceAscentState if config.in_full_space else SubspaceAscentState
    one_leaf_each = LowRankState(*[0] * len(LowRankState._fields))
    return one_leaf_each._replace(
        gradient_transform=() if stage is None else stage.init(params),
        ascent=kind(*[0] * len(kind._fields)),
    )
