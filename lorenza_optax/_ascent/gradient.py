"""The gradient at the ascent point: what all ways of asking for it have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._ascent.ascent import Ascent, AscentConfig, zero_moves
from lorenza_optax._ascent.directions import Directions, Probe
from lorenza_optax._base.checks import value_at
from lorenza_optax._base.mesh import mark_varying
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._factored.landscape import Displacement, Landscape, Rows, Subspaces

__all__ = [
    "AdaptiveAscentState",
    "FullSpaceAscentState",
    "GradientAscentState",
    "LowRankGradient",
    "NoAscentState",
    "SubspaceAscentState",
    "SubspaceGradients",
    "after_ascent",
    "ascend",
    "draw_probes",
    "full_gradient",
    "initial_ascent_state",
    "like_params",
    "low_rank_gradient",
    "step_key",
    "varying",
    "with_finite_value",
    "without_ascent",
]

# Salts that are folded into a step's key, so that its uses are independent.
PROBE, SKETCH, ROUNDING, START, RESIDUAL, LAYERS, BEGIN = range(7)


class SubspaceAscentState(NamedTuple):
    """What an ascent in the subspace keeps.

    Attributes:
      seed: Key data that each step's key is derived from, uint32 (2,).
      value: The loss at the perturbed point, float32; 0 before the first ``value_fn``.
      ascent_norm: ‖A‖ of the last perturbed step, float32; 0 where there was no ascent.
      perturbed: Whether the last update was made at a perturbed point.
    """

    seed: Any
    value: Any
    ascent_norm: Any
    perturbed: Any


class FullSpaceAscentState(NamedTuple):
    """What an ascent in the full space keeps; fields as in :class:`SubspaceAscentState`."""

    seed: Any
    value: Any
    ascent_norm: Any
    perturbed: Any


class GradientAscentState(NamedTuple):
    """What SAM keeps: nothing is drawn; fields as in :class:`SubspaceAscentState`."""

    value: Any
    ascent_norm: Any
    perturbed: Any


class AdaptiveAscentState(NamedTuple):
    """What ASAM keeps: as :class:`GradientAscentState`, and a kind of its own."""

    value: Any
    ascent_norm: Any
    perturbed: Any


class NoAscentState(NamedTuple):
    """Of a method that never perturbs by itself; fields as in :class:`SubspaceAscentState`."""

    seed: Any
    value: Any
    ascent_norm: Any
    perturbed: Any


DrawingAscentState = SubspaceAscentState | FullSpaceAscentState | NoAscentState
AscentState = DrawingAscentState | GradientAscentState | AdaptiveAscentState


def initial_ascent_state(kind: type[Any], seed: int | None = None) -> Any:
    """A fresh state of one of the kinds above; without a seed of one that keeps none."""
    drawn = {}
    if seed is not None:
        drawn["seed"] = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    return kind(
        **drawn,
        value=jnp.zeros((), jnp.float32),
        ascent_norm=jnp.zeros((), jnp.float32),
        perturbed=jnp.zeros((), bool),
    )


def without_ascent(state: AscentState) -> AscentState:
    """The ascent's state after an update on a gradient from outside."""
    return state._replace(ascent_norm=jnp.zeros((), jnp.float32), perturbed=jnp.zeros((), bool))


def step_key(seed: jax.Array, count: jax.Array, salt: int) -> jax.Array:
    """The key of one use in one step: a function of the seed and the count, kept nowhere."""
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, count), salt)


def draw_probes(
    directions: Directions, state: DrawingAscentState, count: jax.Array, config: AscentConfig
) -> Probe:
    """The probes of update ``count``: the same whichever way the gradient is asked for."""
    return directions.draw(step_key(state.seed, count, PROBE), config.num_probes)


def varying(tree: Any, config: AscentConfig) -> Any:
    """A tree of arrays, marked where the loss is per device."""
    if config.axis_name is None:
        return tree
    return jax.tree.map(lambda leaf: mark_varying(leaf, config.axis_name), tree)


def ascend(
    ascent: Ascent | None,
    config: AscentConfig,
    *,
    count: jax.Array,
    ready: jax.typing.ArrayLike,
) -> tuple[Displacement, jax.Array, jax.Array]:
    """The move ε = ρ A / ‖A‖ of update ``count``; what finds A runs on perturbed steps only.

    Args:
      ascent: The way to find A; None if no step is ever perturbed.
      config: The ascent's configuration.
      count: Updates made so far: the argument of schedules, and of ``perturb_every``.
      ready: Whether there is a subspace yet.

    Returns:
      (ε, ‖A‖, whether this step is perturbed); ε has no leaves if ``ascent`` is None.
    """
    if ascent is None:
        return Displacement({}, {}), jnp.zeros((), jnp.float32), jnp.zeros((), bool)
    rho = value_at(config.rho, count)
    perturbed = jnp.asarray(ready) & (jnp.asarray(rho) != 0)
    perturbed &= count % config.perturb_every == 0
    # Drawn apart: XLA compiles one kernel for all fusions that are alike, and those that read a
    # leaf's own part of what was drawn for all would all be different.
    shapes = jax.eval_shape(ascent.draw)
    none_drawn = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    drawn = jax.lax.cond(perturbed, ascent.draw, lambda: none_drawn)
    nothing = (ascent.zero, jnp.zeros((), jnp.float32))
    coordinates, norm = jax.lax.cond(perturbed, lambda: ascent.find(drawn), lambda: nothing)
    return ascent.displacement(coordinates, rho), norm, perturbed & (norm > 0)


def _mean(tree: Any, config: AscentConfig) -> Any:
    return tree if config.axis_name is None else jax.lax.pmean(tree, config.axis_name)


def _mean_value(near: Landscape, value: Any, config: AscentConfig) -> Any:
    return (_mean(value[0], config), value[1]) if near.has_aux else _mean(value, config)


def full_gradient(
    near: Landscape, move: Displacement, config: AscentConfig
) -> tuple[Any, dict[str, jax.Array]]:
    """The loss at θ + ε and its gradient by all leaves, one backward pass."""

    def loss(leaves: dict[str, jax.Array]) -> Any:
        return near.at(move, leaves)

    value, gradient = jax.value_and_grad(loss, has_aux=near.has_aux)(near.leaves)
    return _mean_value(near, value, config), _mean(gradient, config)


class LowRankGradient(NamedTuple):
    """A gradient of which projected leaves have only what lies in their subspace.

    Attributes:
      low: ĝ = Pᵀ G ([b,] r, l) of projected leaves, in the oriented view.
      others: The gradients of the other leaves.
      sketches: G Ω ([b,] k, s) of projected leaves where Ω was given, else empty.
    """

    low: dict[str, jax.Array]
    others: dict[str, jax.Array]
    sketches: dict[str, jax.Array]


def low_rank_gradient(
    near: Landscape,
    subspaces: Subspaces,
    move: Displacement,
    config: AscentConfig,
    columns: Mapping[str, jax.Array] | None = None,
) -> tuple[Any, LowRankGradient]:
    """The loss at θ + ε and its gradient by N in W + P N: none has the size of a projected leaf.

    Args:
      near: The loss near θ.
      subspaces: The projectors P ([b,] k, r).
      move: ε; without leaves it is zero.
      config: ``axis_name``.
      columns: Ωᵀ ([b,] s, l) by path; if given, G Ω comes from the same backward pass.
    """
    still = zero_moves(near, subspaces)
    # Without a perturbation P N is known to be zero, and only its derivative is evaluated.
    # Rows stay as they are, and the derivative is by what is added to them.
    fixed = {path: low for path, low in move.low.items() if isinstance(low, Rows)}
    around = {path: zeros if path in fixed else move.low.get(path, zeros)
              for path, zeros in still.items()}  # fmt: skip
    low = varying(around, config)
    others = {path: leaf for path, leaf in near.leaves.items() if path not in still}
    zeros = {}
    for path, rows in (columns or {}).items():
        projector = subspaces.projectors[path]
        zeros[path] = jnp.zeros((*projector.shape[:-1], rows.shape[-2]), rows.dtype)
    zeros = varying(zeros, config)

    def loss(low: Any, others: Any, zeros: Any) -> Any:
        products = {path: [(subspaces.projectors[path], low[path])] for path in fixed}
        for path, zero in zeros.items():
            products.setdefault(path, []).append((zero, (columns or {})[path]))
        return near.at(
            Displacement({**low, **fixed}, move.full),
            {**near.leaves, **others},
            vanishes=not move.low,
            products=products,
        )

    value, gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=near.has_aux)(low, others, zeros)
    return _mean_value(near, value, config), LowRankGradient(*_mean(gradient, config))


def after_ascent(
    state: AscentState, value: jax.Array, norm: jax.Array, perturbed: jax.Array
) -> AscentState:
    """The state with what was found."""
    return state._replace(value=value.astype(jnp.float32), ascent_norm=norm, perturbed=perturbed)


def with_finite_value(new: AscentState, old: AscentState) -> AscentState:
    """Where a loss that is not finite skips the step, it leaves the last one in the state."""
    return new._replace(value=jnp.where(jnp.isfinite(new.value), new.value, old.value))


class SubspaceGradients(NamedTuple):
    """A gradient in the subspaces, for ``update``; sums of several are one too.

    Attributes:
      projected: ĝ by path: Qᵀ G ([b,] r, n) or, where the right side is compressed, (G Rᵀ)ᵀ
        ([b,] r, m).
      others: The full gradients of the leaves that are not projected, by path.
    """

    projected: Any
    others: Any


def like_params(gradient: Mapping[str, jax.Array], params: Any) -> Any:
    """A gradient by path as a tree like the parameters, in their dtypes."""
    leaves = [gradient[path].astype(leaf.dtype) for path, leaf in leaves_by_path(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
