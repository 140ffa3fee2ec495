"""The directions in which an ascent is looked for.

A direction is a linear function of a few numbers, its weights: in the subspace of LORENZA
u ↦ Q diag(u) R over all projected leaves, in full space w ↦ Σ_j w_j N(key_j), regenerated from
keys and never stored. Estimating the ascent (_ascent.py) needs nothing else of either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._linalg import matmul
from lorenza_optax._matrix_view import MatrixView
from lorenza_optax._mesh import in_auto_mode
from lorenza_optax._paths import path_hash

__all__ = ["Directions", "Probe", "full_space", "in_subspace"]


class Probe(NamedTuple):
    """A direction by its coordinates.

    Attributes:
      weights: What the direction is linear in: a dict by path of ([b,] r) arrays in the
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
      paths: The leaves that they touch.
      draw: (key, q) -> q random probes, stacked on a leading axis.
      direction: probe -> {path: array of the leaf's shape}, in at least float32.
      combine: (slopes (q,), q stacked probes) -> the probe (1/q) Σ_j d_j P_j.
      norm: probe -> Frobenius norm of its direction over all leaves.
    """

    paths: frozenset[str]
    draw: Callable[[jax.Array, int], Probe]
    direction: Callable[[Probe], dict[str, jax.Array]]
    combine: Callable[[jax.Array, Probe], Probe]
    norm: Callable[[Probe], jax.Array]


def in_subspace(
    views: Mapping[str, MatrixView],
    q: Mapping[str, jax.Array],
    r: Mapping[str, jax.Array],
    params: Mapping[str, jax.Array],
) -> Directions:
    """LORENZA's directions Q diag(u) R.

    Args:
      views: The view of each projected leaf, by path.
      q: Left factors ([b,] m, r).
      r: Right factors ([b,] r, n).
      params: The leaves, whose shardings the directions take.
    """

    def draw(key: jax.Array, num_probes: int) -> Probe:
        shapes = {path: (num_probes, *q[path].shape[:-2], q[path].shape[-1]) for path in views}
        dtypes = {path: _at_least_float32(params[path]) for path in views}
        return Probe(_normal_by_path(key, shapes, dtypes), None)

    def build(weights: Any, q: Any, r: Any) -> dict[str, jax.Array]:
        built = {}
        for path, view in views.items():
            u = weights[path]
            scaled = q[path].astype(u.dtype) * u[..., None, :]
            built[path] = view.leaf(matmul(scaled, r[path].astype(u.dtype)))
        return built

    def direction(probe: Probe) -> dict[str, jax.Array]:
        like = {path: params[path] for path in views}
        factors = [{path: f[path] for path in views} for f in (q, r)]
        return in_auto_mode(build, probe.weights, *factors, like=like)

    def combine(slopes: jax.Array, probes: Probe) -> Probe:
        def mean(u: jax.Array) -> jax.Array:
            return jnp.tensordot(slopes.astype(u.dtype), u, axes=1) / slopes.shape[0]

        return Probe(jax.tree.map(mean, probes.weights), None)

    def norm(probe: Probe) -> jax.Array:
        squares = [_squared_norm(u, q[path], r[path]) for path, u in probe.weights.items()]
        return jnp.sqrt(sum(squares, jnp.float32(0)))

    return Directions(frozenset(views), draw, direction, combine, norm)


def _squared_norm(u: jax.Array, q: jax.Array, r: jax.Array) -> jax.Array:
    """‖Q diag(u) R‖² = uᵀ (QᵀQ ∘ RRᵀ) u; for factors kept in float32 that is ‖u‖²."""
    if jnp.finfo(q.dtype).bits >= 32:
        return jnp.sum(u * u)
    # Rounded to bfloat16 the factors are orthonormal to 1e-2 only.
    q, r = q.astype(u.dtype), r.astype(u.dtype)
    gram = matmul(q.swapaxes(-1, -2), q) * matmul(r, r.swapaxes(-1, -2))
    return jnp.sum(u * matmul(gram, u[..., None])[..., 0])


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
            noise = _normal_by_path(key, shapes, dtypes)
            return {p: total[p] + weight.astype(x.dtype) * x for p, x in noise.items()}, None

        start = {path: jnp.zeros(shapes[path], dtypes[path]) for path in params}
        if keys.shape[0] == 1:
            return add(start, (weights[0], keys[0]))[0]
        return jax.lax.scan(add, start, (weights, keys))[0]  # one direction at a time in memory

    def direction(probe: Probe) -> dict[str, jax.Array]:
        return in_auto_mode(build, *probe, like=dict(params))

    def combine(slopes: jax.Array, probes: Probe) -> Probe:
        assert probes.keys is not None
        weights = slopes.astype(jnp.float32) / slopes.shape[0] * probes.weights[:, 0]
        return Probe(weights, probes.keys[:, 0])

    def norm(probe: Probe) -> jax.Array:
        squares = [jnp.sum(leaf * leaf) for leaf in direction(probe).values()]
        return jnp.sqrt(sum(squares, jnp.float32(0)))

    return Directions(frozenset(params), draw, direction, combine, norm)


def _normal_by_path(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, jnp.dtype]
) -> dict[str, jax.Array]:
    """Gaussians that depend on the key, the path and the shape, whatever other leaves there are.

    Equal shapes are drawn in one call: on a CPU each generator in a program takes 0.1 s or
    more to compile.
    """
    groups: dict[Any, list[str]] = {}
    for path in shapes:
        groups.setdefault((shapes[path], dtypes[path]), []).append(path)
    drawn = {}
    for (shape, dtype), paths in groups.items():
        hashes = jnp.asarray([path_hash(path) for path in paths], jnp.uint32)
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(hashes)
        normals = jax.vmap(lambda one: jax.random.normal(one, shape, dtype))(keys)  # noqa: B023
        drawn |= dict(zip(paths, normals, strict=True))
    return {path: drawn[path] for path in shapes}


def _at_least_float32(leaf: jax.Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)
