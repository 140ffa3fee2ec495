"""The gradient by forward passes alone, in the subspaces and in full for the other leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._checks import value_at
from lorenza_optax._config import LowRankConfig
from lorenza_optax._gradient import PROBE, after_ascent, step_key, varying
from lorenza_optax._in_update import surroundings_of
from lorenza_optax._landscape import Displacement, landscape
from lorenza_optax._mesh import in_auto_mode
from lorenza_optax._noise import Noise, plus_noise
from lorenza_optax._paths import leaves_by_path, path_hash
from lorenza_optax._plan import ProjectionPlan
from lorenza_optax._probes import slopes_along
from lorenza_optax._state import LowRankState
from lorenza_optax._step import Prepared, prepare_low
from lorenza_optax._surroundings import bound_loss
from lorenza_optax._update import apply_updates

__all__ = ["best_of_three", "zeroth_order_gradient"]

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
        noisy=True,
    )
    partners = _partners(plan, state)

    def displacement(key: jax.Array) -> Displacement:
        def draw(key: jax.Array, partners: Arrays) -> Displacement:
            return _direction(config, plan, partners, key)

        count = jnp.asarray(state.count)
        like = Displacement(
            dict.fromkeys(plan.projected, count),
            {path: Noise(count, count) for path in plan.others},
        )
        return in_auto_mode(draw, key, partners, like=like)

    number = config.ascent.num_probes
    keys = jax.random.split(step_key(state.ascent.seed, state.count, PROBE), number)
    mu = value_at(config.ascent.mu, state.count)
    slopes, value = slopes_along(near, displacement, keys, mu, config.ascent)
    near.warn(can_form_all=False)

    def add(total: Arrays, one: tuple[jax.Array, jax.Array]) -> tuple[Arrays, None]:
        slope, key = one
        more = displacement(key).low
        return {p: t + (slope / number).astype(t.dtype) * more[p] for p, t in total.items()}, None

    shapes = jax.eval_shape(displacement, keys[0])
    gradient = {path: jnp.zeros(low.shape, low.dtype) for path, low in shapes.low.items()}
    if number == 1:
        gradient, _ = add(gradient, (slopes[0], keys[0]))
    else:
        gradient, _ = jax.lax.scan(add, gradient, (slopes, keys))
    assert config.zeroth_order is not None
    low = {path: config.zeroth_order.weight(plan.leaves[path]) * g for path, g in gradient.items()}
    noises, others = {path: _noise(path, keys, slopes / number) for path in plan.others}, {}
    if not config.keeps_noise:
        for path, leaf in plan.others.items():
            zeros = jnp.zeros_like(arrays[path], leaf.compute_dtype)
            others[path] = plus_noise(zeros, noises.pop(path))
    prepared = prepare_low(config, plan, low, others, state)
    # Gaussians are finite: to look at them all would keep them all in memory.
    prepared = prepared._replace(usable=jnp.all(jnp.isfinite(slopes)), noises=noises)
    size = jnp.sqrt(jnp.mean(jnp.square(slopes))).astype(jnp.float32)
    size = jnp.where(jnp.isfinite(size), size, 0)
    new = after_ascent(state.ascent, value, size, jnp.zeros((), bool))
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
    one = jnp.ones(1, jnp.float32)
    return Displacement(low, {path: _noise(path, key[None], one) for path in plan.others})


def _noise(path: str, keys: jax.Array, weights: jax.Array) -> Noise:
    own = jax.vmap(lambda key: jax.random.fold_in(key, path_hash(path)))(keys)
    return Noise(own, weights)


def best_of_three(axis_name: Any) -> optax.GradientTransformationExtraArgs:
    """A stage behind the learning rate: of θ, θ + u and θ - u the first with the smallest loss.

    ``axis_name`` is the mapped axis over which the loss is per device.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, value_fn: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        if value_fn is None:
            raise ValueError("variant='conservative' compares losses: pass value_fn to update.")
        loss = bound_loss(value_fn, extra_args)

        def at(factor: jax.Array) -> jax.Array:
            steps = jax.tree.map(lambda u: factor.astype(u.dtype) * u, updates)
            value = loss(apply_updates(params, steps))
            return value.astype(jnp.promote_types(value.dtype, jnp.float32))

        factors = jnp.array([0.0, 1.0, -1.0])
        losses = jax.lax.map(at, factors)
        if axis_name is not None:
            losses = jax.lax.pmean(losses, axis_name)
        best = factors[jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))]
        return jax.tree.map(lambda u: best.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
