"""The published ascent: slopes of the loss along random directions, by forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from lorenza_optax._ascent.directions import Directions, Probe
from lorenza_optax._factored.landscape import Displacement, Landscape
from lorenza_optax._factored.traced import equations

__all__ = ["ESTIMATORS", "estimate_weights", "slopes_along"]

ESTIMATORS = ("auto", "jvp", "central", "forward")


def estimate_weights(
    near: Landscape, directions: Directions, probes: Probe, mu: Any, config: Any
) -> tuple[Any, jax.Array]:
    r"""The weights of the estimated ascent direction, scaled to norm 1; forward passes only.

    .. math::
      d_j = \frac{f(\theta + \mu P_j) - f(\theta - \mu P_j)}{2 \mu}, \qquad
      A = \frac{1}{q} \sum_j d_j P_j .

    Args:
      near: The loss near θ.
      directions: The family that the probes are of.
      probes: q stacked probes P_j.
      mu: Smoothing radius μ, in units of the parameters; unused by "jvp".
      config: ``estimator``, ``probe_batch_size``, ``axis_name``.

    Returns:
      Weights of A / ‖A‖, and ‖A‖. Both are zero if A is zero or not finite.
    """
    slopes, _ = slopes_along(near, directions.displacement, probes, mu, config)

    # Slopes may be as small as 1e-30: their squares must not vanish before the division.
    largest = jnp.max(jnp.abs(slopes))
    usable = jnp.isfinite(largest) & (largest > 0)
    ascent = directions.combine(jnp.where(usable, slopes / largest, 0), probes)
    norm = directions.norm(ascent)
    usable &= jnp.isfinite(norm * largest) & (norm > 0)
    inverse = jnp.where(usable, 1 / jnp.where(norm > 0, norm, 1), 0)
    ascent_norm = jnp.where(usable, norm * largest, 0).astype(jnp.float32)
    return ascent.scaled(inverse).weights, ascent_norm


def slopes_along(
    near: Landscape,
    displacement: Callable[[Any], Displacement],
    probes: Any,
    mu: Any,
    config: Any,
) -> tuple[jax.Array, jax.Array]:
    """d_j for all probes, shape (q,), and the loss: together, or ``probe_batch_size`` at a time.

    The loss is that at θ, or with central differences the mean of those at θ ± μ P_j.

    In forward mode the tangents alone differ between probes, so that under ``vmap`` all share
    one evaluation of the loss, as with ``jax.linearize`` but without its residuals.
    """
    # Losses are subtracted in float32, in float64 if there are float64 parameters.
    dtype = jnp.result_type(jnp.float32, *near.leaves.values())

    def loss(move: Displacement, vanishes: bool = False) -> jax.Array:
        return near.value(move, vanishes=vanishes).astype(dtype)

    count = jax.tree.leaves(probes)[0].shape[0]

    def one_by_one(estimator: str) -> tuple[jax.Array, jax.Array]:
        """Differences of losses in one loop: the loss is compiled once, and fills memory once."""
        # From the index, so that no pass of XLA takes what is drawn out of the loop.
        each = jnp.arange(count)
        if estimator == "forward":  # the loss itself is that of the first
            at, factors = jnp.append(0, each), jnp.append(0, jnp.ones(count))
        else:
            at, factors = jnp.repeat(each, 2), jnp.tile(jnp.array([1, -1]), count)

        def value(one: tuple[jax.Array, jax.Array]) -> jax.Array:
            probe = jax.tree.map(lambda leaf: leaf[one[0]], probes)
            return loss(displacement(probe).scaled(one[1] * mu))

        values = jax.lax.map(value, (at, factors))
        if estimator == "forward":
            return (values[1:] - values[0]) / mu, values[0]
        return (values[::2] - values[1::2]) / (2 * mu), jnp.mean(values)

    def evaluate(estimator: str) -> tuple[jax.Array, jax.Array]:
        if estimator != "jvp" and config.probe_batch_size == 1:
            return one_by_one(estimator)
        base = loss(Displacement({}, {})) if estimator == "forward" else None

        def slope(probe: Any) -> Any:
            move = displacement(probe)
            if estimator == "jvp":
                along = lambda step: loss(move.scaled(step), vanishes=True)  # noqa: E731
                value, d = jax.jvp(along, (jnp.zeros((), dtype),), (jnp.ones((), dtype),))
                return d, value
            above = loss(move.scaled(mu))
            if base is not None:
                return (above - base) / mu, base
            below = loss(move.scaled(-mu))
            return (above - below) / (2 * mu), (above + below) / 2

        # Not all losses can be vmapped, and under vmap a cond of theirs runs both branches.
        if count == 1:
            d, value = slope(jax.tree.map(lambda leaf: leaf[0], probes))
            return d[None], value
        if config.probe_batch_size == 1:
            slopes, values = jax.lax.map(slope, probes)
        elif config.probe_batch_size is None or config.probe_batch_size >= count:
            slopes, values = jax.vmap(slope)(probes)
        else:
            slopes, values = jax.lax.map(slope, probes, batch_size=config.probe_batch_size)
        return slopes, jnp.mean(values)

    found = _forward_mode_or_differences(evaluate, config.estimator)
    return found if config.axis_name is None else jax.lax.pmean(found, config.axis_name)


def _forward_mode_or_differences(
    evaluate: Callable[[str], tuple[jax.Array, jax.Array]], estimator: str
) -> tuple[jax.Array, jax.Array]:
    if estimator != "auto":
        return evaluate(estimator)
    try:
        traced = jax.make_jaxpr(lambda: evaluate("jvp"))()
        if "custom_lin" in {eqn.primitive.name for eqn in equations(traced.jaxpr)}:
            # What JAX leaves of a custom_vjp in forward mode; it would refuse to compile it.
            raise TypeError("a jax.custom_vjp function has no rule for jax.jvp.")
        slopes, value = jaxpr_as_fun(traced)()
        return slopes, value
    except Exception as error:
        found = evaluate("central")  # an error of the loss itself is raised here
        reason = str(error).split("\n")[0]
        warnings.warn(
            "value_fn cannot be differentiated in forward mode, so estimator='auto' takes"
            f" central differences: {reason} Pass estimator='central' to silence this.",
            stacklevel=2,
        )
        return found
