"""Where the loss rises: probes, the estimators of their slopes, and the ascent direction.

A direction is a linear function of a few numbers, its weights: in the subspace of LORENZA
u ↦ Q diag(u) R over all projected leaves, in full space w ↦ Σ_j w_j N(key_j), regenerated from
keys and never stored. Estimating the ascent needs nothing else of either.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._checks import check_choice, check_int, check_number
from lorenza_optax._linalg import matmul
from lorenza_optax._matrix_view import MatrixView
from lorenza_optax._mesh import in_auto_mode
from lorenza_optax._plan import leaves_by_path, path_hash

__all__ = ["AscentConfig", "Directions", "Probe", "estimate_ascent", "full_space", "in_subspace"]

ASCENTS = ("zo", "none")
ESTIMATORS = ("auto", "jvp", "central", "forward")

Loss = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class AscentConfig:
    """What the user chose about the ascent; checked when it is made."""

    rho: Any = 0.05
    mu: Any = 1e-3
    num_probes: int = 1
    ascent: str = "zo"
    estimator: str = "auto"
    probe_batch_size: int | None = None
    perturb_every: int = 1
    axis_name: Any = None

    def __post_init__(self) -> None:
        check_number("rho", self.rho)
        check_number("mu", self.mu, above=0.0)
        check_int("num_probes", self.num_probes, 1)
        check_choice("ascent", self.ascent, ASCENTS)
        check_choice("estimator", self.estimator, ESTIMATORS)
        if self.probe_batch_size is not None:
            check_int("probe_batch_size", self.probe_batch_size, 1)
        check_int("perturb_every", self.perturb_every, 1)

    @property
    def never_perturbs(self) -> bool:
        """Whether it is known before tracing that no step is perturbed."""
        return self.ascent == "none" or (isinstance(self.rho, (int, float)) and self.rho == 0)


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

    Equal shapes are drawn in one call: a generator in the program for each of 168 leaves made
    up most of its compile time.
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


def displace(params: Any, direction: Mapping[str, jax.Array], factor: jax.typing.ArrayLike) -> Any:
    """θ + factor · direction, in the dtype of the direction where that is wider."""
    arrays = leaves_by_path(params)
    moved = [
        leaf + (factor * direction[path]).astype(direction[path].dtype)
        if path in direction
        else leaf
        for path, leaf in arrays.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), moved)


def estimate_ascent(
    loss: Loss,
    params: Any,
    directions: Directions,
    probes: Probe,
    mu: Any,
    config: AscentConfig,
) -> tuple[Any, jax.Array]:
    r"""The weights of the estimated ascent direction, scaled to norm 1; forward passes only.

    .. math::
      d_j = \frac{f(\theta + \mu P_j) - f(\theta - \mu P_j)}{2 \mu}, \qquad
      A = \frac{1}{q} \sum_j d_j P_j .

    Args:
      loss: Parameters to a scalar.
      params: θ, with the leaves that are displaced in at least float32.
      directions: The family that the probes are of.
      probes: q stacked probes P_j.
      mu: Smoothing radius μ, in units of the parameters; unused by "jvp".
      config: ``estimator``, ``probe_batch_size``, ``axis_name``.

    Returns:
      Weights of A / ‖A‖, and ‖A‖. Both are zero if A is zero or not finite.
    """
    slopes = _slopes(loss, params, directions, probes, mu, config)
    if config.axis_name is not None:
        slopes = jax.lax.pmean(slopes, config.axis_name)

    # Slopes may be as small as 1e-30: their squares must not vanish before the division.
    largest = jnp.max(jnp.abs(slopes))
    usable = jnp.isfinite(largest) & (largest > 0)
    ascent = directions.combine(jnp.where(usable, slopes / largest, 0), probes)
    norm = directions.norm(ascent)
    usable &= jnp.isfinite(norm * largest) & (norm > 0)
    inverse = jnp.where(usable, 1 / jnp.where(norm > 0, norm, 1), 0)
    ascent_norm = jnp.where(usable, norm * largest, 0).astype(jnp.float32)
    return ascent.scaled(inverse).weights, ascent_norm


def _slopes(
    loss: Loss,
    params: Any,
    directions: Directions,
    probes: Probe,
    mu: Any,
    config: AscentConfig,
) -> jax.Array:
    """d_j for all probes, shape (q,)."""
    # Losses are subtracted in float32, in float64 if there are float64 parameters.
    dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
    float_loss = lambda point: loss(point).astype(dtype)  # noqa: E731

    def evaluate(estimator: str) -> jax.Array:
        base = float_loss(params) if estimator == "forward" else None

        def slope(probe: Probe) -> Any:
            direction = directions.direction(probe)
            if estimator == "jvp":
                return jax.jvp(float_loss, (params,), (_tangent(params, direction),))[1]
            above = float_loss(displace(params, direction, mu))
            if base is not None:
                return (above - base) / mu
            return (above - float_loss(displace(params, direction, -mu))) / (2 * mu)

        if config.probe_batch_size is None or config.probe_batch_size >= config.num_probes:
            return jax.vmap(slope)(probes)
        return jax.lax.map(slope, probes, batch_size=config.probe_batch_size)

    if config.estimator != "auto":
        return evaluate(config.estimator)
    try:
        return evaluate("jvp")
    except Exception as error:
        slopes = evaluate("central")  # an error of the loss itself is raised here
        reason = str(error).split("\n")[0]
        warnings.warn(
            "value_fn cannot be differentiated in forward mode, so estimator='auto' takes"
            f" central differences: {reason} Pass estimator='central' to silence this.",
            stacklevel=2,
        )
        return slopes


def _tangent(params: Any, direction: Mapping[str, jax.Array]) -> Any:
    arrays = leaves_by_path(params)
    tangents = [
        direction[path].astype(leaf.dtype) if path in direction else jnp.zeros_like(leaf)
        for path, leaf in arrays.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), tangents)
