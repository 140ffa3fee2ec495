"""The arrays of one update: refresh if due, project, inner optimizer, lift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._config import LowRankConfig
from lorenza_optax._gradient import ROUNDING, SKETCH, step_key
from lorenza_optax._inner import load_moments, store_moments
from lorenza_optax._plan import ProjectionPlan
from lorenza_optax._refresh import is_due
from lorenza_optax._residual import RESIDUALS, keeps_norm
from lorenza_optax._subspace import align_signs, new_factors, project
from lorenza_optax._transport import transport

__all__ = ["LowRankState", "examples", "low_rank_step"]

Arrays = dict[str, jax.Array]


class LowRankState(NamedTuple):
    """State of a low-rank transformation. Dicts are keyed by a leaf's path, as in the plan.

    They never have the container or a box of the parameters, so no sharding or metadata of a
    parameter can end up on a low-rank array, and any checkpointer saves them.

    Attributes:
      count: Updates so far, skipped ones included, int32.
      last_refresh: The count at the last refresh that succeeded, -1 for none, int32.
      skipped: Updates skipped because the gradient was not finite, int32.
      q: Left factors Q ([b,] m, r), zero before the first refresh. Only those that project or
        that the ascent needs.
      r: Right factors R ([b,] r, n), likewise.
      projected: Inner state of the projected leaves; moments ([b,] r, l).
      others: Inner state of the other leaves; moments in the leaf's shape.
      residual_norms: One number a matrix for residual rules that limit growth, else empty.
      gradient_transform: State of ``gradient_transform``, else empty.
      captured_energy: Share of the squared gradient norm of the projected leaves that lay in
        their subspaces at the last update, float32.
      ascent: What the ascent keeps: seed, ``value``, ``ascent_norm``, ``perturbed``.
    """

    count: Any
    last_refresh: Any
    skipped: Any
    q: Any
    r: Any
    projected: Any
    others: Any
    residual_norms: Any
    gradient_transform: Any
    captured_energy: Any
    ascent: Any


def examples(plan: ProjectionPlan, leaves: Arrays) -> tuple[Arrays, Arrays]:
    """Zeros like what the inner optimizer sees: low-rank gradients, and the other leaves'."""
    low = {
        path: jnp.zeros(leaf.low_rank_shape, leaf.compute_dtype)
        for path, leaf in plan.projected.items()
    }
    others = {
        path: jnp.zeros_like(leaves[path], leaf.compute_dtype) for path, leaf in plan.others.items()
    }
    return low, others


def low_rank_step(
    config: LowRankConfig,
    plan: ProjectionPlan,
    gradients: Arrays,
    targets: Arrays,
    state: LowRankState,
    proposed: LowRankState,
    scale: jax.typing.ArrayLike,
    extra_args: dict[str, Any],
) -> tuple[Arrays, LowRankState]:
    """Steps 3 and 4 of an update.

    Args:
      config: The method.
      plan: Its plan for these leaves.
      gradients: The gradient by path.
      targets: Arrays with the dtypes that the updates shall have.
      state: The state before the update.
      proposed: The same with what the gradient's source and ``gradient_transform`` changed.
      scale: Factor of the projected leaves' updates.
      extra_args: Keyword arguments for the inner optimizer.

    Returns:
      Updates by path (zero if the gradient is not finite), and the state after the update.
    """
    wide = {path: g.astype(plan.leaves[path].compute_dtype) for path, g in gradients.items()}
    energy = {path: jnp.sum(jnp.square(g)) for path, g in wide.items()}
    # Refuses inf and nan, and also what would overflow in a second moment.
    usable = jnp.isfinite(_total(energy.values()))
    wide = {path: jnp.where(usable, g, 0) for path, g in wide.items()}

    matrices = {path: leaf.matrix.matrix(wide[path]) for path, leaf in plan.projected.items()}
    low_zeros, others_zeros = examples(plan, wide)
    initial = config.inner.init(low_zeros)
    moments = load_moments(state.projected, initial)
    current = (state.q, state.r, moments, jnp.zeros((), bool))
    if matrices:
        due = usable & is_due(state.count, state.last_refresh, config.update_proj_gap)
        current = jax.lax.cond(
            due, lambda: _refresh(config, plan, matrices, state, moments, initial), lambda: current
        )
    q, r, moments, refreshed = current

    projectors = _projectors(plan, q, r)
    oriented = {path: plan.leaves[path].matrix.orient(g) for path, g in matrices.items()}
    low = {path: project(projectors[path], g) for path, g in oriented.items()}
    inner_update: Callable[..., Any] = config.inner.update
    inner_low, projected = inner_update(low, moments, None, **extra_args)
    inner_rest, others = inner_update(
        {path: wide[path] for path in plan.others},
        load_moments(state.others, config.inner.init(others_zeros)),
        None,
        **extra_args,
    )

    updates, norms = {}, {}
    for path, target in targets.items():
        leaf = plan.leaves[path]
        if leaf.view is None:
            full = inner_rest[path]
        else:
            norm = state.residual_norms.get(path)
            whole, norms[path] = RESIDUALS[config.residual](
                oriented[path], projectors[path], low[path], inner_low[path], norm
            )
            full = scale * leaf.view.leaf(leaf.view.orient(whole))
        updates[path] = jnp.where(usable, full, 0).astype(target.dtype)

    captured = _total(jnp.sum(jnp.square(g)) for g in low.values())
    total = _total(energy[path] for path in matrices)
    dtype = config.stored_moment_dtype()
    key = step_key(state.ascent.seed, state.count, ROUNDING)
    changed = proposed._replace(
        projected=store_moments(projected, dtype, jax.random.fold_in(key, 0)),
        others=store_moments(others, dtype, jax.random.fold_in(key, 1)),
        residual_norms=norms if keeps_norm(config.residual) else {},
        captured_energy=(captured / jnp.where(total > 0, total, 1)).astype(jnp.float32),
    )
    unchanged = state._replace(q=(), r=())
    kept = jax.tree.map(
        lambda new, old: jnp.where(usable, new, old), changed._replace(q=(), r=()), unchanged
    )
    return updates, kept._replace(
        count=optax.safe_increment(state.count),
        last_refresh=jnp.where(refreshed, state.count, state.last_refresh),
        skipped=jnp.where(usable, state.skipped, optax.safe_increment(state.skipped)),
        q=q,
        r=r,
        ascent=proposed.ascent,
    )


def _refresh(
    config: LowRankConfig,
    plan: ProjectionPlan,
    matrices: Arrays,
    state: LowRankState,
    moments: Any,
    initial: Any,
) -> tuple[Any, ...]:
    """New factors from the gradient, and the moments carried over to them."""
    key = step_key(state.ascent.seed, state.count, SKETCH)
    old = _projectors(plan, state.q, state.r)
    q, r, overlaps = {}, {}, {}
    for path, matrix in matrices.items():
        new_q, new_r = new_factors(config.subspace, matrix, config.rank, key)
        projector = plan.leaves[path].matrix.projector(new_q, new_r)
        overlap = project(projector, old[path].astype(projector.dtype))
        q[path], r[path], overlaps[path] = align_signs(new_q, new_r, overlap)
    carried = transport(config.moment_transport, moments, initial, overlaps, config.decays)
    new = (
        {path: q[path].astype(kept.dtype) for path, kept in state.q.items()},
        {path: r[path].astype(kept.dtype) for path, kept in state.r.items()},
        carried,
    )
    # A decomposition that does not converge gives nan; it stays due, like any failed refresh.
    succeeded = jnp.isfinite(_total(jnp.sum(factor) for factor in (*q.values(), *r.values())))
    kept = jax.tree.map(lambda n, o: jnp.where(succeeded, n, o), new, (state.q, state.r, moments))
    return (*kept, succeeded)


def _projectors(plan: ProjectionPlan, q: Arrays, r: Arrays) -> Arrays:
    return {
        path: leaf.matrix.projector(q.get(path), r.get(path))
        for path, leaf in plan.projected.items()
    }


def _total(numbers: Any) -> jax.Array:
    return sum(numbers, jnp.zeros((), jnp.float32))
