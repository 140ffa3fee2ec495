"""The gradient by forward passes alone, in the subspaces and in full for the other leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._checks import value_at
from lorenza_optax._config import LowRankConfig
from lorenza_optax._gradient import PROBE, after_ascent, step_key, varying
from lorenza_optax._in_update import surroundings_of
from lorenza_optax._landscape import Displacement, landscape
from lorenza_optax._mesh import in_auto_mode
from lorenza_optax._paths import leaves_by_path, path_hash
from lorenza_optax._plan import ProjectionPlan
from lorenza_optax._probes import slopes_along
from lorenza_optax._state import LowRankState
from lorenza_optax._step import Prepared, prepare_low
from lorenza_optax._surroundings import bound_loss

__all__ = ["zeroth_order_gradient"]

Arrays = Mapping[str, jax.Array]


def zeroth_order_gradient(
    config: LowRankConfig,
    plan: ProjectionPlan,
    state: LowRankState,
    params: Any,
    value_fn: Callable[..., Any],
    extra_args: Mapping[str, Any],
) -> tuple[Prepared, Any]:
    r"""The estimated gradient, and the state of the slopes that it was made of.

    With directions :math:`D_j`, P N_j on projected leaves and Gaussians on the others,

    .. math::
      \hat g = \frac1q \sum_j d_j N_j \ (\text{others: } \frac1q \sum_j d_j z_j), \quad
      d_j = \frac{f(\theta + \mu D_j) - f(\theta - \mu D_j)}{2 \mu} .

    Directions are made of a key each time that they are needed, a few numbers a direction.
    """
    around = surroundings_of(config, plan, state)
    params = varying(params, config.ascent)
    arrays = leaves_by_path(params)
    near = landscape(
        bound_loss(value_fn, extra_args),
        params,
        around.subspaces,
        full_paths=frozenset(plan.others),
        keep_factored=config.ascent.factored,
    )
    partners = _partners(plan, state)

    def displacement(key: jax.Array) -> Displacement:
        def draw(key: jax.Array, partners: Arrays) -> Displacement:
            return _direction(config, plan, partners, key)

        like = Displacement(
            {path: jnp.asarray(state.count) for path in plan.projected},
            {path: arrays[path] for path in plan.others},
        )
        return in_auto_mode(draw, key, partners, like=like)

    number = config.ascent.num_probes
    keys = jax.random.split(step_key(state.ascent.seed, state.count, PROBE), number)
    mu = value_at(config.ascent.mu, state.count)
    slopes, value = slopes_along(near, displacement, keys, mu, config.ascent)
    near.warn()

    def add(total: Displacement, one: tuple[jax.Array, jax.Array]) -> tuple[Displacement, None]:
        slope, key = one
        more = displacement(key)
        return jax.tree.map(
            lambda t, x: t + (slope / number).astype(x.dtype) * x, total, more
        ), None

    shapes = jax.eval_shape(displacement, keys[0])
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if number == 1:
        gradient, _ = add(start, (slopes[0], keys[0]))
    else:
        gradient, _ = jax.lax.scan(add, start, (slopes, keys))
    assert config.zeroth_order is not None
    low = {
        path: config.zeroth_order.weight(plan.leaves[path]) * g for path, g in gradient.low.items()
    }
    prepared = prepare_low(config, plan, low, dict(gradient.full), state)
    # Gaussians are finite: to look at them all would keep them all in memory.
    prepared = prepared._replace(usable=jnp.all(jnp.isfinite(slopes)))
    norm = jnp.sqrt(jnp.mean(jnp.square(slopes))).astype(jnp.float32)
    new = after_ascent(state.ascent, value, norm, jnp.zeros((), bool))
    return prepared, new


def _partners(plan: ProjectionPlan, state: LowRankState) -> dict[str, jax.Array]:
    return {
        path: leaf.matrix.partner(state.q[path], state.r[path])
        for path, leaf in plan.projected.items()
        if path in state.q and path in state.r
    }


def _direction(
    config: LowRankConfig, plan: ProjectionPlan, partners: Arrays, key: jax.Array
) -> Displacement:
    assert config.zeroth_order is not None
    of_normal, shape, *_ = config.zeroth_order

    def normal(path: str, shape: tuple[int, ...]) -> jax.Array:
        own = jax.random.fold_in(key, path_hash(path))
        return jax.random.normal(own, shape, plan.leaves[path].compute_dtype)

    low = {
        path: of_normal(normal(path, shape(leaf)), partners.get(path), leaf)
        for path, leaf in plan.projected.items()
    }
    return Displacement(low, {path: normal(path, leaf.shape) for path, leaf in plan.others.items()})
