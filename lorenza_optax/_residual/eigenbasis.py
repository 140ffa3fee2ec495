"""COSMOS's residual rule: two optimizers share one momentum, Adam in the subspace, Muon outside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._linalg.newton_schulz import newton_schulz
from lorenza_optax._residual.residual import Residual, each_leaf, kept, outside
from lorenza_optax._subspace.subspace import lift, project

__all__ = ["adam_and_muon"]


def adam_and_muon(gamma: Any, b1: Any, b2: Any, eps: Any) -> Residual:
    """The rule of :func:`lorenza_optax.methods.cosmos`; it keeps M and V, of every matrix."""
    rule = each_leaf(_adam_and_muon, gamma=gamma, b1=b1, b2=b2, eps=eps)
    return Residual(rule, kept(m="kl", v="rl"))


def _adam_and_muon(
    gradient: jax.Array,
    projector: jax.Array,
    low: jax.Array,
    inner: Any,
    step: jax.Array,
    m: jax.Array,
    v: jax.Array,
    gamma: Any,
    b1: Any,
    b2: Any,
    eps: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    del inner
    compressed, free = gradient.shape[-2:]
    m = b1 * m + (1 - b1) * gradient
    v = b2 * v + (1 - b2) * low * low
    mean = project(projector, m)
    root = jnp.sqrt((v + eps) / (1 - b2**step))
    inside = lift(projector, mean / (1 - b1**step) / root)
    rest = compressed**0.5 * _unit(newton_schulz(outside(m, projector, mean)))
    update = compressed**0.5 * _unit(inside + gamma * free**0.5 * rest)
    return update, {"m": m, "v": v}


def _unit(x: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)
