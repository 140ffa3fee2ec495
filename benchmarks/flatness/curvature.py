"""How sharp a minimum is: the Hessian's largest eigenvalue, and the worst loss in a ball.

`loss(params, batch)` is a mean over the batch, and `batches` is a list of equally large ones, over
which everything here is averaged. All is measured in coordinates u, params = centre + scale * u,
with u = 0 at the centre. The scale is 1, or `relative_scale`, each weight's own size: then
nothing changes if one layer is multiplied by a factor and the next divided by it, as with
adaptive SAM, and methods whose weights differ in norm can be compared.

Shapes: P parameters, K Lanczos vectors.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class Spectrum(NamedTuple):
    largest: float
    smallest: float  # of what was found: a bound from above, as `largest` is one from below
    residual: float  # an eigenvalue lies within this distance of `largest`, but for round-off
    steps: int


class Rise(NamedTuple):
    centre: float  # the loss there
    rise: float  # the worst loss seen, minus that at the centre
    path: list[float]  # the rise after each step
    slope: float  # rho times the gradient's norm: the rise of a loss without curvature


def relative_scale(params):
    return jax.tree.map(jnp.abs, params)


def largest_eigenvalue(loss, params, batches, steps, key, scale=None, tolerance=0.0):
    """Lanczos with full reorthogonalization, from a random vector.

    It stops at `steps`, or earlier where the residual is at most `tolerance` of the eigenvalue.
    """
    at = _At(loss, params, scale)
    q_P = np.asarray(jax.random.normal(key, at.centre_P.shape, at.centre_P.dtype))
    q_P = q_P / np.linalg.norm(q_P)
    # On the host, where a row is written in place.
    basis_KxP = np.empty((steps, q_P.size), q_P.dtype)
    alphas, betas, found = [], [], Spectrum(*[math.nan] * 3, steps=0)
    for k in range(steps):
        basis_KxP[k] = q_P
        w_P = np.asarray(at.hessian_times(q_P, batches))
        alphas.append(float(q_P @ w_P))
        known_KxP = basis_KxP[: k + 1]
        for _ in range(2):  # once is not enough where w is nearly in the span
            w_P = w_P - (known_KxP @ w_P) @ known_KxP
        betas.append(float(np.linalg.norm(w_P)))
        if not math.isfinite(alphas[-1] + betas[-1]):
            return Spectrum(*[math.nan] * 3, steps=k + 1)
        found = _ritz(alphas, betas)
        exhausted = 10 * np.finfo(w_P.dtype).eps * max(map(abs, alphas + betas))
        if betas[-1] <= exhausted or found.residual <= tolerance * abs(found.largest):
            break
        q_P = w_P / betas[-1]
    return found


def _ritz(alphas, betas):
    off = betas[:-1]
    values_K, vectors_KxK = np.linalg.eigh(np.diag(alphas) + np.diag(off, 1) + np.diag(off, -1))
    residual = betas[-1] * abs(vectors_KxK[-1, -1])
    return Spectrum(float(values_K[-1]), float(values_K[0]), float(residual), len(alphas))


def worst_rise(loss, params, batches, rho, steps, scale=None):
    """Gradient ascent on |u| <= rho, in steps of length rho; the first ends at SAM's point.

    Nothing is found from a centre whose gradient is exactly 0.
    """
    at = _At(loss, params, scale)
    u_P, path = jnp.zeros_like(at.centre_P), []
    centre, gradient_P = at.value_and_gradient(u_P, batches)
    slope = rho * float(jnp.linalg.norm(gradient_P))
    for step in range(steps):
        u_P = _ascend(u_P, gradient_P, rho)
        if step < steps - 1:
            value, gradient_P = at.value_and_gradient(u_P, batches)
        else:
            value = at.value(u_P, batches)
        path.append(float(value - centre))
    return Rise(float(centre), max(path), path, slope)


def random_rise(loss, params, batches, rho, directions, key, scale=None):
    """The mean rise at |u| = rho in random directions, each there and back.

    Of a pair the slope cancels, which in few directions would hide the curvature.
    """
    at = _At(loss, params, scale)
    centre, rises = at.value(jnp.zeros_like(at.centre_P), batches), []
    for index in range(directions):
        u_P = jax.random.normal(jax.random.fold_in(key, index), at.centre_P.shape)
        u_P = (rho / jnp.linalg.norm(u_P) * u_P).astype(at.centre_P.dtype)
        rises += [float(at.value(sign * u_P, batches) - centre) for sign in (1, -1)]
    return float(np.mean(rises))


class _At:
    """The loss about a centre, as functions of a flat u."""

    def __init__(self, loss, params, scale):
        self.centre_P, self._unravel = ravel_pytree(params)
        self._scale_P = jnp.ones_like(self.centre_P) if scale is None else ravel_pytree(scale)[0]
        self._loss = loss

    def _mean(self, function, u_P, batches, *more):
        # Batch by batch, so that the memory is that of one.
        parts = (
            function(
                self._loss, self._unravel, self.centre_P, self._scale_P, batch, jnp.asarray(u_P),
                *more,
            )
            for batch in batches
        )  # fmt: skip
        total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
        return jax.tree.map(lambda leaf: leaf / len(batches), total)

    def value(self, u_P, batches):
        return self._mean(_value, u_P, batches)

    def value_and_gradient(self, u_P, batches):
        return self._mean(_value_and_gradient, u_P, batches)

    def hessian_times(self, v_P, batches):
        return self._mean(_hessian_times, v_P, batches)


# Compiled once for a loss and the shapes, whatever the weights.


def _of_u(loss, unravel, centre_P, scale_P, batch):
    return lambda u_P: loss(unravel(centre_P + scale_P * u_P), batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _value(loss, unravel, centre_P, scale_P, batch, u_P):
    return _of_u(loss, unravel, centre_P, scale_P, batch)(u_P)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _value_and_gradient(loss, unravel, centre_P, scale_P, batch, u_P):
    return jax.value_and_grad(_of_u(loss, unravel, centre_P, scale_P, batch))(u_P)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hessian_times(loss, unravel, centre_P, scale_P, batch, v_P):
    gradient = jax.grad(_of_u(loss, unravel, centre_P, scale_P, batch))
    return jax.jvp(gradient, (jnp.zeros_like(v_P),), (v_P,))[1]


@jax.jit
def _ascend(u_P, gradient_P, rho):
    norm = jnp.linalg.norm(gradient_P)
    u_P = u_P + rho * gradient_P / jnp.where(norm > 0, norm, 1)
    length = jnp.linalg.norm(u_P)
    return u_P * jnp.minimum(1, rho / jnp.where(length > 0, length, 1))
