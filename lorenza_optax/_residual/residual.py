"""The whole update of a leaf: the inner update lifted, and what happens outside the subspace.

A rule sees all projected leaves at once, in the oriented view, and may keep arrays of its own
between updates; how large they are it says in letters, one a dimension, as in ``"kl"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._plan.plan import ProjectionPlan
from lorenza_optax._subspace.subspace import lift

__all__ = [
    "DISCARD",
    "FIRA",
    "FIRA_AS_PUBLISHED",
    "SUMO",
    "Kept",
    "Residual",
    "Situation",
    "complement",
    "each_leaf",
    "kept",
    "limit_growth",
    "outside",
]

FIRA_LIMIT = 1.01
# A column of which the subspace holds less than this share tells nothing of its scale: what is
# left of it is round-off, and φ was seen to reach 1e6.
FIRA_LEAST_SHARE = 1e-3
SUMO_LIMIT = 1.1
OUTSIDE_LEAST = 64  # times the dtype's epsilon

Arrays = dict[str, jax.Array]
Memory = dict[str, Arrays]


class Kept(NamedTuple):
    """An array that a rule keeps, zero at first.

    Attributes:
      shape: Its shape.
      axes: What each dimension is: b, k (compressed), l (not compressed), r, or "-" for none.
      dtype: Its dtype.
    """

    shape: tuple[int, ...]
    axes: str
    dtype: Any


class Situation(NamedTuple):
    """What a rule knows of an update; dicts by path of arrays in the oriented view.

    Attributes:
      plan: The leaves.
      gradients: G ([b,] k, l); empty where the rule does not need them.
      projectors: P ([b,] k, r).
      low: ĝ = Pᵀ G ([b,] r, l).
      inner: N, the inner optimizer's update ([b,] r, l).
      memory: What the rule kept, by name and path.
      step: Number of this update among those that were not skipped, from 1.
      refreshed: Whether the subspaces are new.
      key: A key of this update, for rules that draw.
      scale: The factor of the projected leaves' updates.
    """

    plan: ProjectionPlan
    gradients: Arrays
    projectors: Arrays
    low: Arrays
    inner: Arrays
    memory: Memory
    step: jax.Array
    refreshed: jax.Array
    key: jax.Array
    scale: jax.typing.ArrayLike


class Residual(NamedTuple):
    """A rule.

    Attributes:
      update: situation -> (whole updates ([b,] k, l) by path, new memory).
      memory: plan -> what it keeps, by name and path.
      needs_gradient: Whether it needs the full gradient.
      needs_orthonormal: Whether it makes sense for orthonormal P only: others have no
        complement G - P Pᵀ G.
      applies_scale: Whether ``scale`` is in its updates already.
    """

    update: Callable[[Situation], tuple[Arrays, Memory]]
    memory: Callable[[ProjectionPlan], dict[str, dict[str, Kept]]] = lambda plan: {}
    needs_gradient: bool = True
    needs_orthonormal: bool = True
    applies_scale: bool = False


def kept(**axes: str) -> Callable[[ProjectionPlan], dict[str, dict[str, Kept]]]:
    """Arrays a leaf by name, from the letters of their dimensions; a stack has b in front."""

    def memory(plan: ProjectionPlan) -> dict[str, dict[str, Kept]]:
        found: dict[str, dict[str, Kept]] = {name: {} for name in axes}
        for path, leaf in plan.projected.items():
            view = leaf.matrix
            sizes = {"k": view.compressed_size, "l": view.free, "r": leaf.rank}
            batch = "b" if view.batch else ""
            for name, letters in axes.items():
                shape = (*view.batch, *(sizes[letter] for letter in letters))
                found[name][path] = Kept(shape, batch + letters, leaf.compute_dtype)
        return found

    return memory


def each_leaf(
    rule: Callable[..., Any], **arguments: Any
) -> Callable[[Situation], tuple[Arrays, Memory]]:
    """A rule for all leaves from one for a leaf.

    It is called as rule(G, P, ĝ, N, step=, **memory, **arguments) and returns the update, or
    the update and a dict of what it keeps.
    """

    def update(now: Situation) -> tuple[Arrays, Memory]:
        wholes: Arrays = {}
        memory: Memory = {name: {} for name in now.memory}
        for path, projector in now.projectors.items():
            own = {name: arrays[path] for name, arrays in now.memory.items()}
            found = rule(
                now.gradients.get(path),
                projector,
                now.low[path],
                now.inner[path],
                step=now.step,
                **own,
                **arguments,
            )
            wholes[path], new = found if isinstance(found, tuple) else (found, {})
            for name, value in new.items():
                memory[name][path] = value.astype(own[name].dtype)
        return wholes, memory

    return update


def _discard(gradient: Any, projector: jax.Array, low: Any, inner: jax.Array, step: Any) -> Any:
    """P N."""
    del gradient, low, step
    return lift(projector, inner)


def _fira(
    gradient: jax.Array,
    projector: jax.Array,
    low: jax.Array,
    inner: jax.Array,
    step: Any,
    norm: jax.Array,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The rule of ``FIRA``; ``norm`` is that of the scaled complement one update ago."""
    del step
    low_norm = jnp.linalg.norm(low, axis=-2, keepdims=True)
    inner_norm = jnp.linalg.norm(inner, axis=-2, keepdims=True)
    whole_norm = jnp.linalg.norm(gradient, axis=-2, keepdims=True)
    held = low_norm > FIRA_LEAST_SHARE * whole_norm
    phi = jnp.where(held, inner_norm / jnp.where(held, low_norm, 1), 0)
    added, norm = limit_growth(phi * (gradient - lift(projector, low)), norm, FIRA_LIMIT)
    return lift(projector, inner) + added, {"norm": norm}


def _sumo(
    gradient: jax.Array,
    projector: jax.Array,
    low: jax.Array,
    inner: jax.Array,
    step: Any,
    norm: jax.Array,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The rule of ``SUMO``; ``norm`` is that of O one update ago."""
    del step
    inner, norm = limit_growth(inner, norm, SUMO_LIMIT)
    return gradient - lift(projector, low - inner), {"norm": norm}


def _complement(
    gradient: jax.Array,
    projector: jax.Array,
    low: jax.Array,
    inner: jax.Array,
    step: Any,
    factor: float,
) -> jax.Array:
    del step
    return factor * gradient + lift(projector, inner - factor * low)


def limit_growth(matrix: jax.Array, before: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    """Scales a matrix down if its norm exceeds ``limit`` times the norm before, if any."""
    norm = jnp.linalg.norm(matrix, axis=(-2, -1))
    exceeds = (before > 0) & (norm > limit * before)
    factor = jnp.where(exceeds, limit * before / jnp.where(exceeds, norm, 1), 1)
    return matrix * factor[..., None, None], norm * factor


def outside(matrix: jax.Array, projector: jax.Array, low: jax.Array) -> jax.Array:
    """X - P low for low = Pᵀ X, a matrix each; zero where that is round-off.

    A rule that brings what it is given to a fixed norm would make a whole step of it. Of X within
    the subspace there remained up to 1.3e-6 of the norm in float32 (512 × 2048, r = 256), and
    2e-3 where P is kept in bfloat16.
    """
    rest = matrix - lift(projector, low)
    eps = [jnp.finfo(array.dtype).eps for array in (matrix, projector)]
    least = float(max(OUTSIDE_LEAST * eps[0], eps[1] / 2))
    norms = [jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) for x in (rest, matrix)]
    return jnp.where(norms[0] > least * norms[1], rest, 0)


DISCARD = Residual(each_leaf(_discard), needs_gradient=False, needs_orthonormal=False)
"""P N: GaLore and LORENZA drop the complement."""

FIRA = Residual(each_leaf(_fira), kept(norm=""))
r"""P N + φ ∘ (G - P Pᵀ G), with φ_j = ‖N_:j‖ / ‖ĝ_:j‖ a column, its growth limited to 1.01.

φ_j is 0 where the subspace holds less than a thousandth of a column's norm.
Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024."""


def _fira_as_published(now: Situation) -> tuple[Arrays, Memory]:
    """α P in place of P, wherever it lifts."""
    projectors = {path: (now.scale * p).astype(p.dtype) for path, p in now.projectors.items()}
    return FIRA.update(now._replace(projectors=projectors))


FIRA_AS_PUBLISHED = Residual(_fira_as_published, FIRA.memory, applies_scale=True)
"""α P N + φ ∘ (G - α P Pᵀ G): what its code makes of a scale α."""

SUMO = Residual(each_leaf(_sumo), kept(norm=""))
"""G - P (ĝ - O), with O the inner update, its growth limited to 1.1 an update.

Refael, Smorodinsky, Tirer, Lindenbaum, `SUMO <https://arxiv.org/abs/2505.24749>`_, 2025."""


def complement(factor: Any) -> Residual:
    """P N + c (G - P ĝ): a constant share of what the projection loses, whatever P is."""
    return Residual(each_leaf(_complement, factor=factor), needs_orthonormal=False)
