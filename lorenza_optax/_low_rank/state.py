"""The state of a low-rank transformation, and how it begins."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent.gradient import (
    START,
    FullSpaceAscentState,
    NoAscentState,
    SubspaceAscentState,
    initial_ascent_state,
    step_key,
)
from lorenza_optax._base.mesh import mesh_axes, placed
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._inner.inner import check_inner, store_moments
from lorenza_optax._inner.rules import is_elementwise
from lorenza_optax._inner.transport import check_rotatable
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._plan.plan import ProjectionPlan
from lorenza_optax._residual.residual import Kept, kept
from lorenza_optax._subspace.sketch import random_projectors
from lorenza_optax._subspace.subspace import POWER_ITERATION

__all__ = [
    "LowRankState",
    "examples",
    "initial_state",
    "initial_subspaces",
    "is_placeholder",
    "low_rank_like",
    "of_displacement",
    "zeros_of",
]

Arrays = dict[str, jax.Array]


class LowRankState(NamedTuple):
    """State of a low-rank transformation. Dicts are keyed by a leaf's path, as in the plan.

    They never have the container or a box of the parameters, so no sharding or metadata of a
    parameter can end up on a low-rank array, and any checkpointer saves them.

    Attributes:
      count: Updates so far, skipped ones included, int32.
      last_refresh: The count at the last refresh that succeeded, negative for none, int32.
      skipped: Updates skipped because the gradient was not finite, int32.
      q: Left factors Q ([b,] m, r). Only those that project, or that something else needs.
        Before the first refresh zero, or where refreshes are from sketches random.
      r: Right factors R ([b,] r, n), likewise.
      singular_values: Of each gradient at its refresh ([b,] r), if probes are scaled with them;
        of a power iteration its matrix S ([b,] r, r).
      projected: Inner state of the projected leaves; moments ([b,] r, l). A moment that is kept
        in 8 bits is a dict: "codes", int8 or uint8 in its shape, and "scales", one a block.
      others: Inner state of the other leaves; moments in the leaf's shape, likewise.
      residual: Arrays that the residual rule keeps, by name and path: norms of a rule that
        limits growth, sums of rows and columns of ProjFactor, else empty.
      displacement: Lotus's: ``direction`` ([b,] r, l) and ``age`` ([b]) of each projected leaf
        since its last refresh, else empty.
      gradient_transform: State of ``gradient_transform``, else empty.
      captured_energy: Share of the squared gradient norm of the projected leaves that lay in
        their subspaces, float32: at the last update with a full gradient, or as estimated at
        the last refresh from sketches.
      subspace_overlap: Share of the new subspaces that lay in the old ones at the last refresh,
        ‖P_newᵀ P_old‖² / r, the mean over all matrices; 0 after the first one, float32. Of
        random subspaces neither is computed.
      ascent: What the ascent keeps: seed, ``value``, ``ascent_norm``, ``perturbed``.
    """

    count: Any
    last_refresh: Any
    skipped: Any
    q: Any
    r: Any
    singular_values: Any
    projected: Any
    others: Any
    residual: Any
    displacement: Any
    gradient_transform: Any
    captured_energy: Any
    subspace_overlap: Any
    ascent: Any


def examples(plan: ProjectionPlan, leaves: Arrays) -> tuple[Arrays, Arrays]:
    """Zeros like what the inner optimizer sees: low-rank gradients, and the other leaves'.

    On a mesh with Explicit axes they are sharded as the leaves are, the rank axis never.
    """
    low = {
        path: jnp.zeros(leaf.low_rank_shape, leaf.compute_dtype)
        for path, leaf in plan.projected.items()
    }
    others = {
        path: jnp.zeros_like(leaves[path], leaf.compute_dtype) for path, leaf in plan.others.items()
    }
    return low_rank_like(leaves, plan, low), others


def low_rank_like(leaves: Arrays, plan: ProjectionPlan, low: Arrays) -> Arrays:
    """Low-rank gradients or moments ([b,] r, l), sharded as the leaves are."""
    found = {}
    for path, leaf in plan.projected.items():
        batch, rows, columns = leaf.matrix.mesh_axes(mesh_axes(leaves[path]))
        free = columns if leaf.matrix.compressed == "left" else rows
        found[path] = placed(low[path], (*batch, None, free), leaves[path])
    return found


def _stored(config: LowRankConfig, inner: Any, initial: Any) -> Any:
    """An optimizer's first state, as it is kept."""
    dtype = config.stored_moment_dtype()
    return store_moments(initial, dtype, None, are_zero=is_elementwise(inner))


def initial_state(config: LowRankConfig, stage: Any, params: Any) -> LowRankState:
    """The state that ``init`` returns; ``stage`` is the gradient_transform, if any."""
    if is_placeholder(params):
        return _placeholder_state(config, stage, params)
    plan = config.plan(params)
    if not config.in_full_space:
        plan.warn()
    leaves = leaves_by_path(params)
    low, others = examples(plan, leaves)
    for inner, example in ((config.inner, low), (config.others_inner, others)):
        if example:
            check_inner(inner, example)
    projected = config.inner.init(low)
    if config.moment_transport == "rotate":
        check_rotatable(config.inner, projected, jax.tree.map(jnp.shape, low))
    q, r, values = _sharded_like(leaves, plan, *initial_subspaces(config, plan))
    kind = _ascent_kind(config)
    return LowRankState(
        count=jnp.zeros((), jnp.int32),
        last_refresh=jnp.full((), -1, jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        q=q,
        r=r,
        singular_values=values,
        projected=_stored(config, config.inner, projected),
        others=_stored(config, config.others_inner, config.others_inner.init(others)),
        residual=zeros_of(config.residual.memory(plan), plan, leaves),
        displacement=zeros_of(of_displacement(config, plan), plan, leaves),
        gradient_transform=() if stage is None else stage.init(params),
        captured_energy=jnp.zeros((), jnp.float32),
        subspace_overlap=jnp.zeros((), jnp.float32),
        ascent=initial_ascent_state(kind, config.seed),
    )


def _ascent_kind(config: LowRankConfig) -> type[Any]:
    if config.prefers_given:
        return NoAscentState
    return FullSpaceAscentState if config.in_full_space else SubspaceAscentState


def _sharded_like(leaves: Arrays, plan: ProjectionPlan, *trees: Arrays) -> list[Arrays]:
    """(q, r, singular_values) sharded as the leaves are."""
    found: list[Arrays] = [{} for _ in trees]
    for path, leaf in plan.projected.items():
        batch, rows, columns = leaf.matrix.mesh_axes(mesh_axes(leaves[path]))
        own_axes = ((rows, None), (None, columns), (None,))
        for into, tree, own in zip(found, trees, own_axes, strict=True):
            if path in tree:
                missing = tree[path].ndim - len(batch) - len(own)  # of S, (r, r)
                into[path] = placed(tree[path], (*batch, *own, *[None] * missing), leaves[path])
    return found


def of_displacement(config: LowRankConfig, plan: ProjectionPlan) -> dict[str, dict[str, Kept]]:
    return {} if config.displacement is None else kept(direction="rl", age="")(plan)


def zeros_of(
    specs: dict[str, dict[str, Kept]], plan: ProjectionPlan, leaves: Arrays
) -> dict[str, Arrays]:
    """Arrays that a rule keeps, sharded as the leaves are."""
    found: dict[str, Arrays] = {}
    for name, by_path in specs.items():
        found[name] = {}
        for path, (shape, letters, dtype) in by_path.items():
            view = plan.leaves[path].matrix
            batch, rows, columns = view.mesh_axes(mesh_axes(leaves[path]))
            compressed, free = (rows, columns) if view.compressed == "left" else (columns, rows)
            axes = {"b": (*batch, None)[0], "k": compressed, "l": free}
            own = tuple(axes.get(letter) for letter in letters)
            found[name][path] = placed(jnp.zeros(shape, dtype), own, leaves[path])
    return found


def initial_subspaces(config: LowRankConfig, plan: ProjectionPlan) -> tuple[Arrays, Arrays, Arrays]:
    """(q, r, singular_values).

    They are zero, but for projectors that sketches are to be taken through.
    """
    q, r, values = {}, {}, {}
    if not config.keeps_projectors:
        return q, r, values
    random: dict[str, jax.Array] = {}
    if config.sketches and plan.projected:
        shapes = {
            path: (leaf.matrix.batch, leaf.matrix.compressed_size, leaf.rank)
            for path, leaf in plan.projected.items()
        }
        seed = initial_ascent_state(SubspaceAscentState, config.seed).seed
        random = random_projectors(shapes, step_key(seed, jnp.zeros((), jnp.int32), START))
    for path, leaf in plan.projected.items():
        view, dtype = leaf.matrix, config.factor_dtype or leaf.dtype
        rows = (*view.batch, view.compressed_size, leaf.rank)
        projector = random[path] if path in random else jnp.zeros(rows)
        partner_rank = config.partner_rank(leaf.rank)
        partner = jnp.zeros((*view.batch, partner_rank, view.free))
        left, right = view.product(projector.astype(dtype), partner.astype(dtype))
        if partner_rank or view.compressed == "left":
            q[path] = left
        if partner_rank or view.compressed == "right":
            r[path] = right
        if config.ascent.scale_probes and config.ascent.needs_partners:
            values[path] = jnp.zeros((*view.batch, leaf.rank), jnp.float32)
        if config.subspace == POWER_ITERATION:
            values[path] = jnp.zeros((*view.batch, leaf.rank, leaf.rank), leaf.compute_dtype)
    return q, r, values


def _capture_placeholder() -> type:
    """The class of the tree that ``optax.tree.map_params`` calls ``init`` with."""
    seen = []
    optax.tree.map_params(lambda params: seen.append(params) or params, lambda leaf: leaf, 0)
    return type(seen[0])


_PLACEHOLDER = _capture_placeholder()


def is_placeholder(params: Any) -> bool:
    """Whether ``init`` was called by ``optax.tree.map_params``, with no parameters at all."""
    return isinstance(params, _PLACEHOLDER)


def _placeholder_state(config: LowRankConfig, stage: Any, params: Any) -> LowRankState:
    """A state for ``optax.tree.map_params`` in which nothing passes for a copy of the params.

    Low-rank arrays have neither the shape nor the tree of the parameters, so a parameter's
    sharding must not be mapped on them: one leaf stands for each whole field.
    """
    kind = _ascent_kind(config)
    one_leaf_each = LowRankState(*[0] * len(LowRankState._fields))
    return one_leaf_each._replace(
        gradient_transform=() if stage is None else stage.init(params),
        ascent=kind(*[0] * len(kind._fields)),
    )
