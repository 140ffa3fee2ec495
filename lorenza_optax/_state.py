"""The state of a low-rank transformation, how it begins, and whether it fits its parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._config import LowRankConfig
from lorenza_optax._gradient import (
    START,
    FullSpaceAscentState,
    SubspaceAscentState,
    initial_ascent_state,
    step_key,
)
from lorenza_optax._inner import check_inner, check_stored, store_moments
from lorenza_optax._paths import leaves_by_path
from lorenza_optax._plan import ProjectionPlan
from lorenza_optax._residual import keeps_norm
from lorenza_optax._sketch import random_projectors
from lorenza_optax._transport import check_rotatable

__all__ = ["LowRankState", "check_same_tree", "examples", "initial_state"]

Arrays = dict[str, jax.Array]


class LowRankState(NamedTuple):
    """State of a low-rank transformation. Dicts are keyed by a leaf's path, as in the plan.

    They never have the container or a box of the parameters, so no sharding or metadata of a
    parameter can end up on a low-rank array, and any checkpointer saves them.

    Attributes:
      count: Updates so far, skipped ones included, int32.
      last_refresh: The count at the last refresh that succeeded, -1 for none, int32.
      skipped: Updates skipped because the gradient was not finite, int32.
      q: Left factors Q ([b,] m, r). Only those that project, or that something else needs.
        Before the first refresh zero, or where refreshes are from sketches random.
      r: Right factors R ([b,] r, n), likewise.
      singular_values: Of each gradient at its refresh ([b,] r), if probes are scaled with them.
      projected: Inner state of the projected leaves; moments ([b,] r, l). A moment that is kept
        in 8 bits is a dict: "codes", int8 or uint8 in its shape, and "scales", one a block.
      others: Inner state of the other leaves; moments in the leaf's shape, likewise.
      residual_norms: One number a matrix for residual rules that limit growth, else empty.
      gradient_transform: State of ``gradient_transform``, else empty.
      captured_energy: Share of the squared gradient norm of the projected leaves that lay in
        their subspaces, float32: at the last update with a full gradient, or as estimated at
        the last refresh from sketches.
      subspace_overlap: Share of the new subspaces that lay in the old ones at the last refresh,
        ‖P_newᵀ P_old‖² / r, the mean over all matrices; 0 after the first one, float32.
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
    residual_norms: Any
    gradient_transform: Any
    captured_energy: Any
    subspace_overlap: Any
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


def initial_state(config: LowRankConfig, stage: Any, params: Any) -> LowRankState:
    """The state that ``init`` returns; ``stage`` is the gradient_transform, if any."""
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
    q, r, values = _initial_subspaces(config, plan)
    norms = {path: jnp.zeros(leaf.matrix.batch) for path, leaf in plan.projected.items()}
    kind = FullSpaceAscentState if config.in_full_space else SubspaceAscentState
    dtype = config.stored_moment_dtype()
    return LowRankState(
        count=jnp.zeros((), jnp.int32),
        last_refresh=jnp.full((), -1, jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        q=q,
        r=r,
        singular_values=values,
        projected=store_moments(projected, dtype, None),
        others=store_moments(config.inner.init(others), dtype, None),
        residual_norms=norms if keeps_norm(config.residual) else {},
        gradient_transform=() if stage is None else stage.init(params),
        captured_energy=jnp.zeros((), jnp.float32),
        subspace_overlap=jnp.zeros((), jnp.float32),
        ascent=initial_ascent_state(kind, config.seed),
    )


def _initial_subspaces(
    config: LowRankConfig, plan: ProjectionPlan
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """(q, r, singular_values): zero, but for projectors that sketches are to be taken through."""
    q, r, values = {}, {}, {}
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
        partner = jnp.zeros((*view.batch, config.partner_rank, view.free))
        left, right = view.product(projector.astype(dtype), partner.astype(dtype))
        if config.partner_rank or view.compressed == "left":
            q[path] = left
        if config.partner_rank or view.compressed == "right":
            r[path] = right
        if config.ascent.scale_probes and config.ascent.needs_partners:
            values[path] = jnp.zeros((*view.batch, leaf.rank), jnp.float32)
    return q, r, values


def check_same_tree(config: LowRankConfig, plan: ProjectionPlan, state: LowRankState) -> None:
    """Raises where a state was made for other leaves, another rank, or 8-bit moments or none."""
    for inner in (state.projected, state.others):
        check_stored(inner, config.stored_moment_dtype())
    expected = jax.eval_shape(lambda: _initial_subspaces(config, plan))[:2]
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
