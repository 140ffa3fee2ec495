"""Gaussian arrays that are kept as keys, and drawn part by part into the array they are added to.

A sum of standard Gaussians Σ_j w_j z(key_j) of a leaf's size is a few numbers until it is needed.
z is defined part by part, down to parts that are small beside a model: a layer of a stack has the
key of the stack with its index folded in, a part of a matrix likewise. So a scan over layers can
draw each layer's own z, and whoever adds z to an array needs memory for a part only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._base.mesh import in_auto_mode

__all__ = ["Noise", "Noisy", "is_large", "is_stack", "plus_noise"]

SMALL = 2**16  # numbers that are drawn at once
LAYERS = 128  # more entries than that along a first axis are no layers
PARTS = 8


class Noise(NamedTuple):
    """Σ_j w_j z(key_j), for an array of any shape.

    Attributes:
      keys: Keys (j,).
      weights: w (j,).
    """

    keys: jax.Array
    weights: jax.Array

    def scaled(self, factor: jax.typing.ArrayLike) -> Noise:
        return self._replace(weights=(factor * self.weights).astype(self.weights.dtype))

    def of_part(self, index: jax.typing.ArrayLike) -> Noise:
        """The noise of a part: in a stack of layers of one layer."""
        return self._replace(keys=jax.vmap(lambda key: jax.random.fold_in(key, index))(self.keys))


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether an array is worth being drawn part by part."""
    return math.prod(shape) >= SMALL


def is_stack(shape: tuple[int, ...]) -> bool:
    """Whether the noise of an array is that of its entries along the first axis, one by one."""
    return len(shape) > 2 and 1 < shape[0] <= LAYERS and is_large(shape)


def _parts(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The shape with one axis more, and which: its entries are the parts."""
    if not is_large(shape):
        return (1, *shape), 0
    if is_stack(shape):
        return shape, 0
    # Every eighth row: rows that lie together may all be on one device of a mesh.
    rows, columns = shape[0], math.prod(shape[1:])
    count = math.gcd(rows, PARTS)
    if count > 1:
        return (rows // count, count, columns), 1
    count = math.gcd(columns, PARTS)
    return (rows, columns // count, count), 2


def plus_noise(array: jax.Array, noise: Noise, decay: Any = None) -> jax.Array:
    """(1 + decay) · array + noise, in the array's dtype; computed in at least float32."""
    return in_auto_mode(_plus, array, noise, decay, like=array)


def _plus(array: jax.Array, noise: Noise, decay: Any) -> jax.Array:
    shape, axis = _parts(array.shape)
    if shape[axis] == 1:
        return _plus_whole(array, noise, decay)
    if axis == 0 and jax.device_count() > 1:  # each device of a mesh may hold other layers
        layers = jnp.arange(shape[0])
        return jax.vmap(lambda one, i: _plus(one, noise.of_part(i), decay))(array, layers)

    def part(index: jax.Array, whole: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_index_in_dim(whole, index, axis, keepdims=False)
        one = _plus(one, noise.of_part(index), decay)
        return jax.lax.dynamic_update_index_in_dim(whole, one, index, axis)

    whole = jax.lax.fori_loop(0, shape[axis], part, array.reshape(shape))
    return whole.reshape(array.shape)


def _plus_whole(array: jax.Array, noise: Noise, decay: Any) -> jax.Array:
    wide = jnp.promote_types(array.dtype, jnp.float32)

    def add(total: jax.Array, one: Noise) -> tuple[jax.Array, None]:
        normal = jax.random.normal(one.keys, array.shape, wide)
        return total + one.weights.astype(wide) * normal, None

    total = array.astype(wide)
    if decay is not None:
        total = total * (1 + jnp.asarray(decay, wide))
    if noise.keys.shape[0] == 1:
        total, _ = add(total, jax.tree.map(lambda leaf: leaf[0], noise))
    else:
        total, _ = jax.lax.scan(add, total, noise)
    return total.astype(array.dtype)


@dataclasses.dataclass(frozen=True)
class Noisy:
    """The weight base + noise, that is formed where a program uses it.

    Attributes:
      base: The weight.
      noise: What is added.
      dtype: Of the sum.
      vanishes: Whether the noise's weights are zero, and only derivatives by them matter.
    """

    base: Any
    noise: Noise
    dtype: Any
    vanishes: bool

    def formed(self, after: Any = None) -> jax.Array:
        """The sum; no earlier than the array ``after``.

        XLA would form all weights of a program first, and then use them one by one. It heeds
        nothing but what depends on what: so the weight and its key depend on an array that the
        program computes just before, by a bit that is always 0.
        """
        base, noise = self.base.astype(self.dtype), self.noise
        if after is not None:
            base, noise = in_auto_mode(_tied, base, noise, after, like=(base, noise))
        if not self.vanishes:
            return plus_noise(base, noise)

        @jax.custom_jvp
        def unchanged(base: jax.Array, weights: jax.Array, keys: jax.Array) -> jax.Array:
            del weights, keys
            return base

        @unchanged.defjvp
        def tangent(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
            base, _, keys = primals
            return base, plus_noise(tangents[0], Noise(keys, tangents[1]))

        return unchanged(base, noise.weights, noise.keys)


jax.tree_util.register_dataclass(Noisy, ["base", "noise"], ["dtype", "vanishes"])


def _tied(base: jax.Array, noise: Noise, after: jax.Array) -> tuple[jax.Array, Noise]:
    zero = (after[(0,) * after.ndim] != 0).astype(jnp.uint32) >> 1
    data = jax.random.key_data(noise.keys) + zero
    keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(noise.keys))
    return jnp.where(zero == 0, base, 0), noise._replace(keys=keys)
