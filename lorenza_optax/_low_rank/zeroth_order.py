"""The gradient by forward passes alone, in the subspaces and in full for the other leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent.directions import normal_by_path
from lorenza_optax._ascent.gradient import PROBE, after_ascent, step_key, varying
from lorenza_optax._ascent.probes import slopes_along
from lorenza_optax._ascent.surroundings import bound_loss
from lorenza_optax._base.checks import value_at
from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._base.noise import Noise, is_large, plus_noise
from lorenza_optax._base.paths import leaves_by_path, path_hash
from lorenza_optax._factored.landscape import Displacement, landscape
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.in_update import surroundings_of
from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._low_rank.step import Prepared, prepare_low
from lorenza_optax._low_rank.update import apply_updates
from lorenza_optax._plan.plan import ProjectionPlan

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
    arrays = leaves_by_path(params)  # what is made of them is the same on all devices
    near = landscape(
        bound_loss(value_fn, extra_args),
        varying(params, config.ascent),
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
            {p: Noise(count, count) if is_large(leaf.shape) else arrays[p]
             for p, leaf in plan.others.items()},
        )  # fmt: skip
        return in_auto_mode(draw, key, partners, like=like)

    number = config.ascent.num_probes
    keys = jax.random.split(step_key(state.ascent.seed, state.count, PROBE), number)
    mu = value_at(config.ascent.mu, state.count)
    slopes, value = slopes_along(near, displacement, keys, mu, config.ascent)
    near.warn(can_form_all=False)

    def drawn(key: jax.Array) -> Displacement:
        low, full = displacement(key)
        return Displacement(low, {p: z for p, z in full.items() if not isinstance(z, Noise)})

    def add(total: Displacement, one: tuple[jax.Array, jax.Array]) -> tuple[Displacement, None]:
        slope, key = one
        weighted = lambda t, x: t + (slope / number).astype(t.dtype) * x  # noqa: E731
        return jax.tree.map(weighted, total, drawn(key)), None

    shapes = jax.eval_shape(drawn, keys[0])
    gradient = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if number == 1:
        gradient, _ = add(gradient, (slopes[0], keys[0]))
    else:
        gradient, _ = jax.lax.scan(add, gradient, (slopes, keys))
    assert config.zeroth_order is not None
    weight = config.zeroth_order.weight
    low = {path: weight(plan.leaves[path]) * g for path, g in gradient.low.items()}
    noises = {
        path: _noise(path, keys, slopes / number)
        for path in plan.others
        if path not in gradient.full
    }
    others = dict(gradient.full)
    if not config.keeps_noise:
        for path, noise in noises.items():
            zeros = jnp.zeros_like(arrays[path], plan.leaves[path].compute_dtype)
            others[path] = plus_noise(zeros, noise)
        noises = {}
    prepared = prepare_low(config, plan, low, others, state)
    # Gaussians are finite and below 10: to look at them all would keep them all in memory.
    usable = jnp.isfinite(100 * jnp.sum(jnp.square(slopes)))
    prepared = prepared._replace(usable=usable, noises=noises)
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
    large = {path for path, leaf in plan.others.items() if is_large(leaf.shape)}
    small = {p: leaf for p, leaf in plan.leaves.items() if p not in large}
    normal = normal_by_path(
        key,
        {p: shape(leaf) if p in plan.projected else leaf.shape for p, leaf in small.items()},
        {p: leaf.compute_dtype for p, leaf in small.items()},
    )
    low = {p: of_normal(normal[p], partners.get(p), leaf) for p, leaf in plan.projected.items()}
    full = {}
    for path, leaf in plan.others.items():
        one = jnp.ones(1, leaf.compute_dtype)
        full[path] = _noise(path, key[None], one) if path in large else normal[path]
    return Displacement(low, full)


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
