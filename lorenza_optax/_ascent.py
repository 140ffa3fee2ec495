"""Where the loss rises: the ascent direction, estimated by forward passes along probes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._checks import check_choice, check_int, check_number
from lorenza_optax._directions import Directions, Probe
from lorenza_optax._paths import leaves_by_path

__all__ = ["AscentConfig", "displace", "estimate_ascent"]

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
