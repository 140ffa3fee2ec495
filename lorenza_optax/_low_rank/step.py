"""The arrays of one update: refresh if due, project, inner optimizer, lift."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent.gradient import RESIDUAL, ROUNDING, SKETCH, step_key
from lorenza_optax._base.noise import Noise
from lorenza_optax._linalg.decompositions import total
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.inner_step import Turn, inner_step
from lorenza_optax._low_rank.partial_refresh import (
    displaced,
    in_turn,
    moved_on,
    refresh_some,
    standing_still,
)
from lorenza_optax._low_rank.renewal import (
    NewSubspaces,
    from_gradient,
    projectors_of,
    unchanged,
)
from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._low_rank.widening import narrow, project_in_turn, read_again, wide
from lorenza_optax._plan.plan import ProjectionPlan
from lorenza_optax._residual.residual import DISCARD, Situation
from lorenza_optax._subspace.refresh import is_due
from lorenza_optax._subspace.sketch import WARM_UP
from lorenza_optax._subspace.subspace import RANDOM, lift, project

__all__ = [
    "Prepared",
    "complete",
    "prepare",
    "prepare_low",
]

Arrays = dict[str, jax.Array]


class Prepared(NamedTuple):
    """A gradient in the subspaces, and what is to be done with it.

    Attributes:
      low: ĝ = Pᵀ G ([b,] r, l) by path; of no use where not ``usable``.
      others: The other leaves' gradients by path.
      subspaces: (q, r, singular_values) that ``low`` is in, as the state keeps them.
      overlaps: P_newᵀ P_old by path, where a refresh moves the inner state; else empty.
      changed: Whether the inner state has to follow the subspaces.
      refreshed: Whether the subspaces are new.
      usable: Whether the gradient is finite.
      captured_energy: See :class:`LowRankState`.
      overlap: Likewise, ``subspace_overlap``.
      displacement: Likewise.
      noises: In place of ``others`` where their gradients are left as noise.
    """

    low: Arrays
    others: Arrays
    subspaces: tuple[Any, Any, Any]
    overlaps: Arrays
    changed: Any
    refreshed: Any
    usable: Any
    captured_energy: Any
    overlap: Any
    displacement: Any
    noises: dict[str, Noise]


def prepare(
    config: LowRankConfig, plan: ProjectionPlan, gradients: Arrays, state: LowRankState
) -> tuple[Prepared, Arrays]:
    """Refreshes the subspaces from a full gradient if that is due, and projects.

    Returns:
      What was prepared, and the gradient of the projected leaves in the oriented view.
    """
    energy = {path: jnp.sum(jnp.square(g)) for path, g in wide(plan, gradients).items()}
    gradients = read_again(plan, gradients)
    widened = wide(plan, gradients)
    usable = _is_usable(config, plan, energy.values())
    matrices = {path: leaf.matrix.matrix(widened[path]) for path, leaf in plan.projected.items()}
    in_turns = narrow(plan, gradients)
    new = unchanged(plan, state)
    first = usable & (state.last_refresh < 0)
    switched: Arrays = {}
    if matrices and (config.stagger or config.displacement):
        key = step_key(state.ascent.seed, state.count, SKETCH)
        if config.stagger:
            chosen = in_turn(config, plan, state.count)
        else:
            old_projectors = projectors_of(plan, state.q, state.r)
            still = standing_still(config, plan, old_projectors, matrices, state)
            switched = {path: usable & one for path, one in still.items()}
            chosen = displaced(plan, switched)
        # A gradient that is not finite loses its turn.
        chosen = [one._replace(stop=jnp.where(usable, one.stop, one.start)) for one in chosen]

        def some() -> NewSubspaces:
            subspaces, overlap, refreshed = refresh_some(config, plan, matrices, state, chosen, key)
            return new._replace(subspaces=subspaces, overlap=overlap, refreshed=refreshed)

        new = jax.lax.cond(first, lambda: from_gradient(config, plan, state, matrices, True), some)
    elif matrices and config.subspace not in RANDOM:
        due = usable & is_due(state.count, state.last_refresh, config.update_proj_gap)
        new = from_gradient(config, plan, state, matrices | in_turns, due)
    subspaces = new.subspaces
    projectors = projectors_of(plan, *subspaces[:2])
    oriented = {path: plan.leaves[path].matrix.orient(g) for path, g in matrices.items()}
    low = {
        path: project_in_turn(plan.leaves[path], projectors[path], in_turns[path])
        if path in in_turns
        else project(projectors[path], g)
        for path, g in oriented.items()
    }
    captured = total(jnp.sum(jnp.square(g)) for g in low.values())
    whole = total(energy[path] for path in matrices)
    share = (captured / jnp.where(whole > 0, whole, 1)).astype(jnp.float32)
    if config.subspace in RANDOM:
        share = state.captured_energy
    others = {path: widened[path] for path in plan.others}
    displacement = state.displacement
    if switched:
        switched = {path: one | first for path, one in switched.items()}
        displacement = moved_on(switched, low, state)
    moves = config.moment_transport != "keep" and config.subspace not in RANDOM
    overlaps = new.overlaps if moves else {}
    prepared = Prepared(
        low, others, subspaces, overlaps, new.changed, new.refreshed, usable, share, new.overlap,
        displacement, {},
    )  # fmt: skip
    return prepared, oriented


def prepare_low(
    config: LowRankConfig,
    plan: ProjectionPlan,
    low: Arrays,
    others: Arrays,
    state: LowRankState,
) -> Prepared:
    """The same from a gradient that is in the subspaces already."""
    low = {path: g.astype(plan.leaves[path].compute_dtype) for path, g in low.items()}
    others = {path: g.astype(plan.leaves[path].compute_dtype) for path, g in others.items()}
    energy = [jnp.sum(g * g) for g in (*low.values(), *others.values())]
    usable = _is_usable(config, plan, energy)
    old = (state.q, state.r, state.singular_values)
    no = jnp.zeros((), bool)
    shares = (state.captured_energy, state.subspace_overlap)
    return Prepared(low, others, old, {}, no, no, usable, *shares, state.displacement, {})


def _is_usable(
    config: LowRankConfig, plan: ProjectionPlan, energy: Iterable[jax.Array]
) -> jax.Array:
    """Refuses inf and nan, and also what would overflow in a second moment."""
    largest = total(energy)
    if config.subspace in RANDOM:  # P Pᵀ G may be up to 4 k times as large as G
        k = max((leaf.matrix.compressed_size for leaf in plan.projected.values()), default=1)
        largest *= (4.0 * k) ** 2
    return jnp.isfinite(largest)


def complete(
    config: LowRankConfig,
    plan: ProjectionPlan,
    prepared: Prepared,
    oriented: Arrays,
    new: NewSubspaces | None,
    targets: Arrays,
    state: LowRankState,
    proposed: LowRankState,
    scale: jax.typing.ArrayLike,
    extra_args: dict[str, Any],
) -> tuple[dict[str, Any], LowRankState]:
    """Runs the inner optimizer and lifts: step 4 of an update.

    Args:
      config: The method.
      plan: Its plan for these leaves.
      prepared: The gradient in the subspaces.
      oriented: The full gradient of the projected leaves, for residual rules; else empty.
      new: Subspaces for the next update, if they were chosen without waiting for the gradient.
      targets: Arrays with the dtypes that the updates shall have.
      state: The state before the update.
      proposed: The same with what the gradient's source and ``gradient_transform`` changed.
      scale: Factor of the projected leaves' updates.
      extra_args: Keyword arguments for the inner optimizer.

    Returns:
      Updates by path (zero if the gradient is not finite), with ``factored_updates`` as pairs
      ([b,] m, r), ([b,] r, n) of projected leaves; and the state after the update.
    """
    usable = prepared.usable
    zeroed = lambda tree: {path: jnp.where(usable, g, 0) for path, g in tree.items()}  # noqa: E731
    prepared = prepared._replace(low=zeroed(prepared.low), others=zeroed(prepared.others))
    projectors = projectors_of(plan, *prepared.subspaces[:2])
    key = step_key(state.ascent.seed, state.count, ROUNDING)
    keys = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    before = Turn(prepared.overlaps, prepared.changed) if prepared.overlaps else None
    subspaces, overlap, refreshed = prepared.subspaces, prepared.overlap, prepared.refreshed
    after = None
    if new is not None:
        subspaces, overlaps, overlap, refreshed, changed = new
        after = Turn(overlaps, changed, state.count - state.skipped < WARM_UP)
    inner_low, projected = inner_step(
        config, plan, config.inner, prepared.low, state.projected, usable, keys[0], extra_args,
        before, after,
    )  # fmt: skip
    inner_rest, others = inner_step(
        config, plan, config.others_inner, prepared.others, state.others, usable, keys[1],
        extra_args,
    )  # fmt: skip

    updates: dict[str, Any] = {}
    wholes, memory = {}, state.residual
    if config.residual is not DISCARD:
        wholes, memory = config.residual.update(
            Situation(
                plan,
                oriented,
                projectors,
                prepared.low,
                inner_low,
                state.residual,
                jnp.asarray(optax.safe_increment(state.count - state.skipped)),
                prepared.refreshed | prepared.changed,
                step_key(state.ascent.seed, state.count, RESIDUAL),
                scale,
            )
        )
    for path, target in targets.items():
        leaf = plan.leaves[path]
        if path in prepared.noises:
            assert config.zeroth_order is not None
            keys, weights = prepared.noises[path].scaled(config.zeroth_order.others_factor or 0)
            updates[path] = Noise(keys, jnp.where(usable, weights, 0))
            continue
        if leaf.view is None:
            updates[path] = jnp.where(usable, inner_rest[path], 0).astype(target.dtype)
            continue
        inner = jnp.where(usable, scale * inner_low[path], 0).astype(inner_low[path].dtype)
        if config.factored_updates:
            updates[path] = leaf.view.product(projectors[path].astype(inner.dtype), inner)
            continue
        if path in wholes:
            factor = 1.0 if config.residual.applies_scale else scale
            whole = jnp.where(usable, factor * wholes[path], 0)
        else:
            whole = lift(projectors[path], inner)
        updates[path] = leaf.view.leaf(leaf.view.orient(whole)).astype(target.dtype)

    changed = proposed._replace(
        residual=memory,
        displacement=prepared.displacement,
        captured_energy=prepared.captured_energy,
        subspace_overlap=overlap,
    )
    settled = dict(zip(("q", "r", "singular_values"), subspaces, strict=True))
    settled |= {"projected": projected, "others": others}
    empty = dict.fromkeys(settled, ())
    kept = jax.tree.map(
        lambda new, old: jnp.where(usable, new, old),
        changed._replace(**empty),
        state._replace(**empty),
    )
    return updates, kept._replace(
        count=optax.safe_increment(state.count),
        last_refresh=jnp.where(refreshed, state.count, state.last_refresh),
        skipped=jnp.where(usable, state.skipped, optax.safe_increment(state.skipped)),
        ascent=proposed.ascent,
        **settled,
    )
