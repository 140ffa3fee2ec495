"""What a state says of where to look for the ascent, for all ways of asking for a gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._ascent.ascent import (
    Ascent,
    AscentConfig,
    adaptive,
    along_moments,
    by_probes,
    in_gradient,
)
from lorenza_optax._ascent.directions import Directions, Probe, full_space, in_subspace
from lorenza_optax._ascent.gradient import (
    AdaptiveAscentState,
    FullSpaceAscentState,
    GradientAscentState,
    draw_probes,
)
from lorenza_optax._base.calls import without_aux
from lorenza_optax._base.checks import value_at
from lorenza_optax._base.mesh import whole
from lorenza_optax._factored.landscape import Displacement, Landscape, Subspaces
from lorenza_optax._inner.inner import FIRST_MOMENTS, first_moment
from lorenza_optax._plan.matrix_view import MatrixView

__all__ = [
    "Surroundings",
    "applied",
    "bound_loss",
    "check_moments",
    "chosen_ascent",
    "full_paths",
    "full_space_ascent",
    "loss_of",
    "of_state",
]


class Surroundings(NamedTuple):
    """Where the ascent may be looked for.

    Attributes:
      subspaces: Of the projected leaves.
      partners: K ([b,] p, l) by path, for probes; else empty.
      rows: Rows ([b,] r, l) close to the leading right singular vectors, of any length.
      moments: First moments, of projected leaves in their subspaces; empty if there are none.
      draw: directions -> this step's probes.
      full_space: Which ascent over all leaves the state is of, see :func:`full_space_ascent`.
      ready: Whether there are subspaces yet.
    """

    subspaces: Subspaces
    partners: Mapping[str, jax.Array]
    rows: Mapping[str, jax.Array]
    moments: Displacement
    draw: Callable[[Directions], Probe]
    full_space: str | None
    ready: Any


def bound_loss(value_fn: Callable[..., Any], extra_args: Mapping[str, Any]) -> Callable[[Any], Any]:
    """``value_fn`` of the parameters alone: it gets those of ``extra_args`` that it names."""
    named = inspect.signature(value_fn).parameters
    kwargs = {name: value for name, value in extra_args.items() if name in named}
    return lambda at: value_fn(at, **kwargs)


def applied(
    function: Callable[..., Any] | None, /, *args: Any, **kwargs: Any
) -> Callable[[Any], Any] | None:
    """A function of the parameters and more as one of the parameters alone; None for None."""
    return None if function is None else lambda at: function(at, *args, **kwargs)


def loss_of(
    value_fn: Callable[..., Any], has_aux: bool, /, *args: Any, **kwargs: Any
) -> Callable[[Any], Any]:
    """``value_fn`` of the parameters alone, for functions that have the argument ``has_aux``."""

    def loss(at: Any) -> Any:
        result = value_fn(at, *args, **kwargs)
        return result if has_aux else without_aux(result)

    return loss


def full_space_ascent(state: Any) -> str | None:
    """The ascent over all leaves that a state is of, by AdaZo-SAM, SAM or ASAM; else None."""
    kinds = {
        FullSpaceAscentState: "zo",
        GradientAscentState: "gradient",
        AdaptiveAscentState: "adaptive",
    }
    return kinds.get(type(state.ascent))


def of_state(config: AscentConfig, views: Mapping[str, MatrixView], state: Any) -> Surroundings:
    """What one state with the views of its projected leaves says."""
    in_full = full_space_ascent(state)
    low = whole(first_moment(getattr(state, "projected", ())) or {})
    full = first_moment(getattr(state, "others", ())) or {}
    q, r = whole((getattr(state, "q", {}), getattr(state, "r", {})))
    projectors = {path: view.projector(q.get(path), r.get(path)) for path, view in views.items()}
    rows = {}
    for path, view in views.items():
        stored = view.partner(q[path], r[path]) if path in q and path in r else None
        rank = projectors[path].shape[-1]
        # The moment's rows have the whole rank; probes may have needed fewer.
        if path in low and (stored is None or stored.shape[-2] < rank):
            stored = low[path]
        if stored is None:
            continue  # nothing is known, and no refresh from sketches asks
        missing = rank - stored.shape[-2]
        rows[path] = jnp.pad(stored, [*[(0, 0)] * (stored.ndim - 2), (0, missing), (0, 0)])

    def draw(directions: Directions) -> Probe:
        return draw_probes(directions, state.ascent, state.count, config)

    return Surroundings(
        Subspaces(views, projectors),
        _partners(config, views, q, r, state, low) if config.ascent == "zo" and not in_full else {},
        rows,
        Displacement(low, full),
        draw,
        in_full,
        jnp.ones((), bool) if in_full or not views else state.last_refresh >= 0,
    )


def _partners(
    config: AscentConfig, views: Mapping[str, MatrixView], q: Any, r: Any, state: Any, moments: Any
) -> dict[str, jax.Array]:
    """The rows K that probes are made of."""
    partners = {}
    for path, view in views.items():
        if config.never_perturbs:
            continue
        if config.probe_factors == "momentum":
            rows = moments[path][..., : config.probe_rank, :]
            rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
            if not config.scale_probes:
                norms = jnp.linalg.norm(rows, axis=-1, keepdims=True)
                rows = jnp.where(norms > 0, rows / jnp.where(norms > 0, norms, 1), 0)
        else:
            rows = view.partner(q[path], r[path])[..., : config.probe_rank, :]
            if config.scale_probes:
                values = whole(state.singular_values[path])[..., : rows.shape[-2], None]
                rows = values * rows.astype(jnp.promote_types(rows.dtype, values.dtype))
        partners[path] = rows
    return partners


def full_paths(
    config: AscentConfig, around: Surroundings, arrays: Mapping[str, jax.Array]
) -> frozenset[str]:
    """Leaves that are displaced in full."""
    if config.never_perturbs:
        return frozenset()
    if around.full_space:
        return frozenset(arrays)
    return frozenset(set(arrays) - set(around.subspaces.views)) if config.moves_all else frozenset()


def chosen_ascent(
    near: Landscape,
    config: AscentConfig,
    around: Surroundings,
    arrays: Mapping[str, jax.Array],
    count: jax.Array,
) -> Ascent | None:
    """The ascent that was asked for; None if no step is ever perturbed."""
    if config.never_perturbs:
        return None
    mu = value_at(config.mu, count)
    if around.full_space == "gradient":
        return in_gradient(near, around.subspaces, arrays, config)
    if around.full_space == "adaptive":
        scaled = adaptive(arrays, value_at(config.eta, count))
        return in_gradient(near, around.subspaces, arrays, config, scaled)
    if around.full_space:
        directions = full_space(arrays)
        return by_probes(near, directions, lambda: around.draw(directions), mu, config)
    if not around.subspaces.views:
        return None
    if config.ascent == "zo":
        directions = in_subspace(around.subspaces, around.partners)
        return by_probes(near, directions, lambda: around.draw(directions), mu, config)
    if config.ascent == "subspace":
        return in_gradient(near, around.subspaces, arrays, config)
    if not jax.tree.leaves(around.moments):
        raise ValueError(
            f"ascent={config.ascent!r} needs a first moment, and the optimizer that opt_state is of"
            f" keeps none under any of the names {', '.join(FIRST_MOMENTS)}."
        )
    check_moments(around)
    return along_moments(near, around.subspaces, around.moments, mu, config)


def check_moments(around: Surroundings) -> None:
    """Raises unless all projected leaves have a first moment in their subspace."""
    if lacking := sorted(set(around.subspaces.views) - set(around.moments.low)):
        raise ValueError(
            "An ascent along first moments needs those of all projected leaves, and this optimizer"
            f" keeps none in the subspace of {lacking[0]!r}"
            + (f" and {len(lacking) - 1} others" if len(lacking) > 1 else "")
            + ": use one that does, such as lorenza or methods.galore."
        )
    for path, view in around.subspaces.views.items():
        found = around.moments.low[path].shape
        needed = (*view.batch, around.subspaces.projectors[path].shape[-1], view.free)
        if found != needed:
            raise ValueError(
                f"The first moment of leaf {path!r}, whose shape is {view.shape}, has shape {found}"
                f" and not {needed}: give momentum_sam (or perturbed_value_and_grad) the proj_type"
                " and weight_dimension_numbers that lorenza was given."
            )
