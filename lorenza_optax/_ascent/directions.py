"""The directions in which an ascent is looked for.

A direction is a linear function of a few numbers, its weights: in the subspace of LORENZA
u ↦ Q diag(u) R over all projected leaves, in full space w ↦ Σ_j w_j N(key_j), regenerated from
keys and never stored. Estimating the ascent (ascent.py) needs nothing else of either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._base.paths import path_hash
from lorenza_optax._factored.landscape import Displacement, Rows, Subspaces, multiplied
from lorenza_optax._linalg.decompositions import matmul, total

__all__ = [
    "Directions",
    "Probe",
    "displacement_norm",
    "full_space",
    "in_subspace",
    "normal_by_path",
]


class Probe(NamedTuple):
    """A direction by its coordinates.

    Attributes:
      weights: What the direction is linear in: a dict by path of ([b,] p) arrays in the
        subspace, (j,) in full space.
      keys: Keys that the direction is regenerated from, (j,); None in the subspace.
    """

    weights: Any
    keys: jax.Array | None

    def scaled(self, factor: jax.typing.ArrayLike) -> Probe:
        scaled = jax.tree.map(lambda w: (factor * w).astype(w.dtype), self.weights)
        return self._replace(weights=scaled)


class Directions(NamedTuple):
    """A family of directions.

    Attributes:
      draw: (key, q) -> q random probes, stacked on a leading axis.
      displacement: probe -> the move of the parameters, in at least float32.
      combine: (slopes (q,), q stacked probes) -> the probe (1/q) Σ_j d_j P_j.
      norm: probe -> Frobenius norm of its displacement over all leaves.
      keys: What draws the probes -> keys of the direction that combines them, (j,) or None.
    """

    draw: Callable[[jax.Array, int], Probe]
    displacement: Callable[[Probe], Displacement]
    combine: Callable[[jax.Array, Probe], Probe]
    norm: Callable[[Probe], jax.Array]
    keys: Callable[[Callable[[], Probe]], jax.Array | None]


def in_subspace(subspaces: Subspaces, partners: Mapping[str, jax.Array]) -> Directions:
    """LORENZA's directions Q diag(u) R, in the oriented view P diag(u) K.

    Args:
      subspaces: The projectors P ([b,] k, r).
      partners: The other factor K ([b,] p, l) of each leaf, p <= r, orthonormal rows or rows of
        any other length that they shall be weighted with.
    """

    def draw(key: jax.Array, num_probes: int) -> Probe:
        shapes = {path: (num_probes, *k.shape[:-1]) for path, k in partners.items()}
        dtypes = {path: _at_least_float32(k) for path, k in partners.items()}
        return Probe(normal_by_path(key, shapes, dtypes), None)

    def displacement(probe: Probe) -> Displacement:
        low = {}
        for path, k in partners.items():
            low[path] = Rows(probe.weights[path], k)
            # With fewer rows (`probe_rank`) they are multiplied out, and filled up with zeros.
            if missing := subspaces.projectors[path].shape[-1] - k.shape[-2]:
                rows = multiplied(low[path])
                low[path] = jnp.pad(rows, [*[(0, 0)] * (rows.ndim - 2), (0, missing), (0, 0)])
        return Displacement(low, {})

    def combine(slopes: jax.Array, probes: Probe) -> Probe:
        def mean(u: jax.Array) -> jax.Array:
            return jnp.tensordot(slopes.astype(u.dtype), u, axes=1) / slopes.shape[0]

        return Probe(jax.tree.map(mean, probes.weights), None)

    def norm(probe: Probe) -> jax.Array:
        return displacement_norm(displacement(probe), subspaces)

    return Directions(draw, displacement, combine, norm, lambda _: None)


def displacement_norm(move: Displacement, subspaces: Subspaces) -> jax.Array:
    """Frobenius norm over all leaves, without forming P N."""
    squares = [
        _squared_norm(multiplied(low), subspaces.projectors[path]) for path, low in move.low.items()
    ]
    squares += [jnp.sum(full * full) for full in move.full.values()]
    return jnp.sqrt(total(squares))


def _squared_norm(low: jax.Array, projector: jax.Array) -> jax.Array:
    """‖P N‖² = tr Nᵀ (PᵀP) N; for factors kept in float32 that is ‖N‖²."""
    if jnp.finfo(projector.dtype).bits >= 32:
        return jnp.sum(low * low)
    # Rounded to bfloat16 the factors are orthonormal to 1e-2 only.
    projector = projector.astype(low.dtype)
    gram = matmul(projector.swapaxes(-1, -2), projector)
    return jnp.sum(low * matmul(gram, low))


def full_space(params: Mapping[str, jax.Array]) -> Directions:
    """AdaZo-SAM's directions: a standard Gaussian over all leaves, regenerated from its key."""

    def draw(key: jax.Array, num_probes: int) -> Probe:
        keys = jax.random.split(key, num_probes)
        return Probe(jnp.ones((num_probes, 1), jnp.float32), keys[:, None])

    shapes = {path: leaf.shape for path, leaf in params.items()}
    dtypes = {path: _at_least_float32(leaf) for path, leaf in params.items()}

    def build(weights: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        def add(total: Any, one: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            weight, key = one
            noise = normal_by_path(key, shapes, dtypes)
            return {p: total[p] + weight.astype(x.dtype) * x for p, x in noise.items()}, None

        start = {path: jnp.zeros(shapes[path], dtypes[path]) for path in params}
        if keys.shape[0] == 1:
            return add(start, (weights[0], keys[0]))[0]
        return jax.lax.scan(add, start, (weights, keys))[0]  # one direction at a time in memory

    def displacement(probe: Probe) -> Displacement:
        return Displacement({}, in_auto_mode(build, *probe, like=dict(params)))

    def combine(slopes: jax.Array, probes: Probe) -> Probe:
        assert probes.keys is not None
        weights = slopes.astype(jnp.float32) / slopes.shape[0] * probes.weights[:, 0]
        return Probe(weights, probes.keys[:, 0])

    def norm(probe: Probe) -> jax.Array:
        return displacement_norm(displacement(probe), Subspaces({}, {}))

    def keys(draw: Callable[[], Probe]) -> jax.Array:
        found = draw().keys
        assert found is not None
        return found[:, 0]

    return Directions(draw, displacement, combine, norm, keys)


def normal_by_path(
    key: jax.Array,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, jnp.dtype],
    made_into: Callable[[jax.Array], jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """Gaussians that depend on the key, the path and the shape, whatever other leaves there are.

    Equal shapes are drawn in one call: on a CPU each generator in a program takes 0.1 s or
    more to compile. With ``made_into`` what each is made into, one after the other, for what needs
    memory and time to compile.
    """
    groups: dict[Any, list[str]] = {}
    for path in shapes:
        groups.setdefault((shapes[path], dtypes[path]), []).append(path)
    drawn = {}
    for (shape, dtype), paths in groups.items():
        if not math.prod(shape):
            drawn |= {path: jnp.zeros(shape, dtype) for path in paths}
            continue
        hashes = jnp.asarray([path_hash(path) for path in paths], jnp.uint32)
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(hashes)

        def draw(one: jax.Array) -> jax.Array:
            normal = jax.random.normal(one, shape, dtype)  # noqa: B023
            return normal if made_into is None else made_into(normal)

        # In a loop of two halves: what a loop makes XLA keeps, and otherwise it repeats the fifty
        # instructions of a Gaussian in every fusion that reads a leaf's part of them.
        at_once = max(1, len(paths) // 2) if made_into is None else None
        normals = jax.lax.map(draw, keys, batch_size=at_once)
        drawn |= dict(zip(paths, normals, strict=True))
    return {path: drawn[path] for path in shapes}


def _at_least_float32(leaf: jax.Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)
