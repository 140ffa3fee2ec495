"""Subspaces that are drawn and not computed: they need no gradient, and often no memory.

A Gaussian projector is a function of the seed and of the count at its refresh, so it is kept
nowhere: :func:`opened` puts it into the state at the beginning of an update, and :func:`closed`
takes it out at the end. Everything between sees a state like any other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._ascent.directions import normal_by_path
from lorenza_optax._ascent.gradient import SKETCH, step_key
from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._inner.inner import load_moments, store_moments
from lorenza_optax._inner.transport import transport
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._plan.plan import ProjectionPlan
from lorenza_optax._subspace.refresh import is_due
from lorenza_optax._subspace.subspace import RANDOM, project

__all__ = ["closed", "opened"]

Arrays = dict[str, jax.Array]


def opened(config: LowRankConfig, plan: ProjectionPlan, state: LowRankState) -> LowRankState:
    """The state with projectors in it: new ones if they are due, and moments carried over."""
    if config.subspace not in RANDOM or not plan.projected:
        return state
    kept = (state.q, state.r, state.projected, state.count, state.last_refresh, state.ascent.seed)
    replicated = dict.fromkeys(plan.projected, state.count)
    factors = (state.q, state.r)
    if not config.keeps_projectors:
        factors = tuple(
            {path: state.count for path in replicated if _projects(plan, path) == side}
            for side in ("left", "right")
        )
    q, r, projected, last_refresh = in_auto_mode(
        lambda *args: _opened(config, plan, *args),
        *kept,
        like=(*factors, state.projected, state.count),
    )
    return state._replace(q=q, r=r, projected=projected, last_refresh=last_refresh)


def closed(config: LowRankConfig, before: LowRankState, after: LowRankState) -> LowRankState:
    """The state as it is kept. After an update that was skipped a refresh is due as before."""
    if config.subspace not in RANDOM:
        return after
    if not config.keeps_projectors:
        after = after._replace(q={}, r={})
    used = after.skipped == before.skipped
    opened_fields = ("q", "r", "projected", "last_refresh")
    old, new = ({name: getattr(s, name) for name in opened_fields} for s in (before, after))
    return after._replace(**jax.tree.map(lambda n, o: jnp.where(used, n, o), new, old))


def _projects(plan: ProjectionPlan, path: str) -> str:
    return plan.leaves[path].matrix.compressed


def _opened(
    config: LowRankConfig,
    plan: ProjectionPlan,
    q: Arrays,
    r: Arrays,
    projected: Any,
    count: jax.Array,
    last_refresh: jax.Array,
    seed: jax.Array,
) -> tuple[Arrays, Arrays, Any, jax.Array]:
    due = is_due(count, last_refresh, config.update_proj_gap)
    now = jnp.where(due, count, last_refresh)
    if config.keeps_projectors:
        new_q, new_r = jax.lax.cond(
            due, lambda: _drawn(config, plan, q, r, step_key(seed, now, SKETCH)), lambda: (q, r)
        )
    else:
        new_q, new_r = _drawn(config, plan, q, r, step_key(seed, now, SKETCH))

    def carry() -> Any:
        old = (q, r)
        if not config.keeps_projectors:
            old = _drawn(config, plan, q, r, step_key(seed, last_refresh, SKETCH))
        overlaps = {}
        for path, leaf in plan.projected.items():
            view = leaf.matrix
            p, p_old = (view.projector(a.get(path), b.get(path)) for a, b in ((new_q, new_r), old))
            factor = RANDOM[config.subspace].overlap(view.compressed_size, leaf.rank)
            overlaps[path] = factor * project(p, p_old.astype(leaf.compute_dtype))
        like = {
            path: jnp.zeros(leaf.low_rank_shape, leaf.compute_dtype)
            for path, leaf in plan.projected.items()
        }
        initial = config.inner.init(like)
        moments = load_moments(projected, initial)
        moved = transport(config.moment_transport, moments, initial, overlaps, config.decays)
        return store_moments(moved, config.stored_moment_dtype(), None)

    if config.moment_transport != "keep":
        projected = jax.lax.cond(due & (last_refresh >= 0), carry, lambda: projected)
    return new_q, new_r, projected, now


def _drawn(
    config: LowRankConfig, plan: ProjectionPlan, q: Arrays, r: Arrays, key: jax.Array
) -> tuple[Arrays, Arrays]:
    """New projectors; and partners K with orthonormal rows where they are kept."""
    kind = RANDOM[config.subspace]
    shapes, dtypes = {}, {}
    for path, leaf in plan.projected.items():
        view = leaf.matrix
        shapes[path, "p"] = (*view.batch, view.compressed_size, leaf.rank)
        if path in q and path in r:
            shapes[path, "k"] = (*view.batch, view.free, leaf.rank)
        dtypes |= dict.fromkeys([(path, "p"), (path, "k")], leaf.compute_dtype)
    factors = normal_by_path(
        key,
        {"/".join(name): shape for name, shape in shapes.items()},
        {"/".join(name): dtypes[name] for name in shapes},
        kind.of_normal if kind.is_kept else None,
    )
    if not kind.is_kept:
        factors = {name: kind.of_normal(normal) for name, normal in factors.items()}
    new_q, new_r = {}, {}
    for path, leaf in plan.projected.items():
        view, dtype = leaf.matrix, config.factor_dtype or leaf.dtype
        p = factors[f"{path}/p"]
        both = (path, "k") in shapes
        k = factors[f"{path}/k"].mT if both else p[..., :1, :]
        if not config.keeps_projectors:
            dtype = leaf.compute_dtype
        left, right = view.product(p.astype(dtype), k.astype(dtype))
        if both or view.compressed == "left":
            new_q[path] = left
        if both or view.compressed == "right":
            new_r[path] = right
    return new_q, new_r
