"""Where the loss rises: what the user chose, and the direction that each choice finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._ascent.directions import Directions, Probe, displacement_norm
from lorenza_optax._ascent.probes import ESTIMATORS, estimate_weights, slopes_along
from lorenza_optax._base.checks import check_choice, check_int, check_number
from lorenza_optax._base.mesh import mark_varying
from lorenza_optax._factored.landscape import Displacement, Landscape, Subspaces

__all__ = [
    "ASCENTS",
    "Ascent",
    "AscentConfig",
    "adaptive",
    "along_moments",
    "by_probes",
    "in_gradient",
    "normalized",
    "zero_moves",
]

ASCENTS = ("zo", "subspace", "momentum", "signed_momentum", "none")
PROBE_FACTORS = ("svd", "momentum")


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
    probe_rank: int | None = None
    probe_factors: str = "svd"
    scale_probes: bool = False
    ascent_fn: Callable[..., Any] | None = None
    factored: bool = True
    eta: Any = 0.01

    def __post_init__(self) -> None:
        check_number("rho", self.rho)
        check_number("mu", self.mu, above=0.0)
        check_int("num_probes", self.num_probes, 1)
        check_choice("ascent", self.ascent, ASCENTS)
        check_choice("estimator", self.estimator, ESTIMATORS)
        if self.probe_batch_size is not None:
            check_int("probe_batch_size", self.probe_batch_size, 1)
        check_int("perturb_every", self.perturb_every, 1)
        if self.probe_rank is not None:
            check_int("probe_rank", self.probe_rank, 1)
        check_choice("probe_factors", self.probe_factors, PROBE_FACTORS)
        check_choice("scale_probes", self.scale_probes, (False, True))
        check_choice("factored", self.factored, (False, True))
        check_number("eta", self.eta)
        if isinstance(self.eta, (int, float)) and self.eta < 0:
            raise ValueError(f"eta must be at least 0, got {self.eta}.")
        if self.ascent_fn is not None and not callable(self.ascent_fn):
            raise TypeError(f"ascent_fn must be a function, got {type(self.ascent_fn).__name__}.")

    @property
    def never_perturbs(self) -> bool:
        """Whether it is known before tracing that no step is perturbed."""
        return self.ascent == "none" or (isinstance(self.rho, (int, float)) and self.rho == 0)

    @property
    def needs_partners(self) -> bool:
        """Whether the second factor of each gradient is kept for the probes."""
        return self.ascent == "zo" and not self.never_perturbs and self.probe_factors == "svd"

    @property
    def needs_moments(self) -> bool:
        """Whether the direction is made of the inner optimizer's first moment."""
        of_probes = self.ascent == "zo" and self.probe_factors == "momentum"
        return of_probes or self.ascent in ("momentum", "signed_momentum")

    @property
    def moves_all(self) -> bool:
        """Whether leaves that are not projected are perturbed too."""
        return self.ascent in ("subspace", "momentum", "signed_momentum")


class Ascent(NamedTuple):
    """A way to find the direction A.

    Attributes:
      draw: () -> random arrays that ``find`` needs.
      find: what was drawn -> (coordinates of A / ‖A‖, ‖A‖), both zero if A is zero or not finite.
      zero: Coordinates of the direction 0.
      displacement: (coordinates, ρ) -> the move ρ A / ‖A‖.
    """

    draw: Callable[[], Any]
    find: Callable[[Any], tuple[Any, jax.Array]]
    zero: Any
    displacement: Callable[[Any, jax.typing.ArrayLike], Displacement]


def by_probes(
    near: Landscape,
    directions: Directions,
    draw: Callable[[], Probe],
    mu: Any,
    config: AscentConfig,
) -> Ascent:
    """The published ascent, in the subspaces or in full space."""

    def displacement(weights: Any, rho: jax.typing.ArrayLike) -> Displacement:
        return directions.displacement(Probe(weights, directions.keys(draw)).scaled(rho))

    def find(drawn: Any) -> tuple[Any, jax.Array]:
        probes = draw() if drawn is None else Probe(drawn, None)
        return estimate_weights(near, directions, probes, mu, config)

    combined = jax.eval_shape(lambda: directions.combine(jnp.zeros(config.num_probes), draw()))
    return Ascent(
        lambda: draw().weights if directions.keys(draw) is None else None,
        find,
        jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), combined.weights),
        displacement,
    )


def in_gradient(
    near: Landscape,
    subspaces: Subspaces,
    arrays: Mapping[str, jax.Array],
    config: AscentConfig,
    scaled: Callable[[Displacement], Displacement] = lambda move: move,
) -> Ascent:
    """The gradient itself: P Pᵀ g on projected leaves, kept factored, and g on the others.

    ``arrays`` is θ as it was before it was marked as varying: what is found is the same on all
    devices. With ``scaled``, a diagonal T, the direction is T² g / ‖T g‖, and ‖T g‖ the norm.
    """
    still = zero_moves(near, subspaces)
    others = {path: leaf for path, leaf in near.leaves.items() if path not in still}

    def find(_: None) -> tuple[Any, jax.Array]:
        def loss(low: Mapping[str, jax.Array], others: Mapping[str, jax.Array]) -> jax.Array:
            return near.value(Displacement(low, {}), {**near.leaves, **others}, vanishes=True)

        at = (still, others)
        if config.axis_name is not None:
            at = jax.tree.map(lambda leaf: mark_varying(leaf, config.axis_name), at)
        gradient = Displacement(*jax.grad(loss, (0, 1))(*at))
        if config.axis_name is not None:
            gradient = jax.lax.pmean(gradient, config.axis_name)
        unit, norm = normalized(scaled(gradient), subspaces)
        return scaled(unit), norm

    zero = _wide(Displacement(still, {path: jnp.zeros_like(arrays[path]) for path in others}))
    return Ascent(lambda: None, find, zero, lambda unit, rho: unit.scaled(rho))


def adaptive(weights: Mapping[str, jax.Array], eta: Any) -> Callable[[Displacement], Displacement]:
    """T = |w| + η of ASAM, for moves in the full space."""

    def scaled(move: jax.Array, weight: jax.Array) -> jax.Array:
        size = jnp.abs(weight.astype(move.dtype)) + jnp.asarray(eta).astype(move.dtype)
        return jnp.where(move == 0, 0, size * move)  # 0 · inf is not 0

    return lambda move: Displacement(
        move.low, {path: scaled(leaf, weights[path]) for path, leaf in move.full.items()}
    )


def along_moments(
    near: Landscape,
    subspaces: Subspaces,
    moments: Displacement,
    mu: Any,
    config: AscentConfig,
) -> Ascent:
    """The first moment; with "signed_momentum" turned uphill by one probe along it."""

    def find(_: None) -> tuple[Any, jax.Array]:
        unit, norm = normalized(moments, subspaces)
        if config.ascent == "signed_momentum":
            slopes, _value = slopes_along(near, lambda _: unit, jnp.zeros(1), mu, config)
            # Where it cannot be told the moment keeps its own sign.
            unit = unit.scaled(jnp.where(slopes[0] < 0, -1, 1))
        return unit, norm

    zero = _wide(jax.tree.map(jnp.zeros_like, moments))
    return Ascent(lambda: None, find, zero, lambda unit, rho: unit.scaled(rho))


def zero_moves(near: Landscape, subspaces: Subspaces) -> dict[str, jax.Array]:
    """N = 0 for each projected leaf, in at least float32."""
    zeros = {}
    for path, view in subspaces.views.items():
        rank = subspaces.projectors[path].shape[-1]
        dtype = jnp.promote_types(near.leaves[path].dtype, jnp.float32)
        zeros[path] = jnp.zeros((*view.batch, rank, view.free), dtype)
    return zeros


def _wide(move: Displacement) -> Displacement:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), move)


def normalized(move: Displacement, subspaces: Subspaces) -> tuple[Displacement, jax.Array]:
    """The move scaled to length 1, and its length; both zero if that is 0 or not finite."""
    move = _wide(move)
    # Squares of entries as small as 1e-30 must not vanish before the division.
    largest = [
        jnp.max(jnp.abs(leaf), initial=0).astype(jnp.float32) for leaf in jax.tree.leaves(move)
    ]
    size = jnp.max(jnp.abs(jnp.stack([jnp.zeros(()), *largest])))  # see `total`
    size = jnp.where(size > 0, size, 1)
    move = jax.tree.map(lambda leaf: (leaf / size).astype(leaf.dtype), move)
    # The norm alone is sure to be nan if an entry is: a maximum may lose it, see `orthonormal`.
    norm = displacement_norm(move, subspaces)
    usable = jnp.isfinite(norm * size) & (norm > 0)
    # 0 · nan is not 0.
    inverse = 1 / jnp.where(norm > 0, norm, 1)
    unit = jax.tree.map(lambda x: jnp.where(usable, x * inverse, 0).astype(x.dtype), move)
    return unit, jnp.where(usable, norm * size, 0).astype(jnp.float32)
