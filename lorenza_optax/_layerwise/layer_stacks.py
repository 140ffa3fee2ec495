"""A few layers of a model as one stack, and which they shall be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._base.mesh import mesh_axes, placed
from lorenza_optax._layerwise.layers import Layers

__all__ = ["examples_of", "gathered", "masked", "outlier_ratios", "sampled", "scattered"]

Arrays = dict[str, jax.Array]


def examples_of(layers: Layers, number: int, leaves: Mapping[str, Any]) -> Arrays:
    """Zeros like ``number`` layers of each role, sharded as the leaves are."""
    found = {}
    for role in layers.roles:
        leaf = leaves[role.paths[0]]
        axes = list(mesh_axes(leaf))
        if role.axis is not None:
            axes.pop(role.axis)
        zeros = jnp.zeros((number, *role.shape), role.leaf.dtype)
        found[role.name] = placed(zeros, (None, *axes), leaf)
    return found


def gathered(layers: Layers, leaves: Mapping[str, jax.Array], active: jax.Array) -> Arrays:
    """The layers ``active`` (k,) of each role (k, ...)."""
    found = {}
    for role in layers.roles:
        if role.axis is not None:
            found[role.name] = jnp.moveaxis(
                jnp.take(leaves[role.paths[0]], active, axis=role.axis), role.axis, 0
            )
    listed = [role for role in layers.roles if role.axis is None]
    # A stack of all layers, to take a few of them from, would be a copy of all of them.
    branches = [
        lambda layer=layer: {role.name: leaves[role.paths[layer]] for role in listed}
        for layer in range(layers.number if listed else 0)
    ]
    if listed:
        few = [jax.lax.switch(active[place], branches) for place in range(len(active))]
        found |= jax.tree.map(lambda *parts: jnp.stack(parts), *few)
    return {role.name: found[role.name] for role in layers.roles}


def scattered(layers: Layers, stacks: Arrays, active: jax.Array) -> Arrays:
    """The inverse of :func:`gathered`: leaves by path, zero in all other layers."""
    found = {}
    for role in layers.roles:
        stack = stacks[role.name]
        if role.axis is None:
            for layer, path in enumerate(role.paths):
                hit = active == layer
                own = jax.lax.dynamic_index_in_dim(stack, jnp.argmax(hit), keepdims=False)
                found[path] = jnp.where(jnp.any(hit), own, 0)
        else:
            place = (*[slice(None)] * role.axis, active)
            zeros = jnp.zeros(role.leaf.shape, stack.dtype)
            found[role.paths[0]] = zeros.at[place].set(jnp.moveaxis(stack, 0, role.axis))
    return found


def masked(layers: Layers, leaves: Mapping[str, jax.Array], active: jax.Array) -> Arrays:
    """The leaves with zeros in layers that are not active."""
    found = dict(leaves)
    for role in layers.roles:
        if role.axis is None:
            for layer, path in enumerate(role.paths):
                found[path] = jnp.where(jnp.any(active == layer), leaves[path], 0)
        else:
            path, shape = role.paths[0], [1] * len(role.leaf.shape)
            shape[role.axis] = layers.number
            is_active = jnp.zeros(layers.number, bool).at[active].set(True).reshape(shape)
            found[path] = jnp.where(is_active, leaves[path], 0)
    return found


def outlier_ratios(layers: Layers, leaves: Mapping[str, jax.Array], multiple: float) -> jax.Array:
    """The share of each layer's weights that exceed ``multiple`` times the layer's mean |w|.

    Of matrices that are projected, or where none is of all leaves; float32 (L,).
    """
    roles = [role for role in layers.roles if role.leaf.view is not None] or layers.roles
    size = sum(math.prod(role.shape) for role in roles)

    def summed(function: Callable[..., jax.Array], numbers: jax.Array) -> jax.Array:
        """The sum (L,) of ``function(|w|, the layer's number)``, of ``numbers`` (L,)."""
        total = jnp.zeros(layers.number, jnp.float32)
        for role in roles:
            if role.axis is None:
                own = [function(_sizes(leaves[p]), numbers[i]) for i, p in enumerate(role.paths)]
                total += jnp.stack([jnp.sum(each) for each in own])
            else:
                stack = jnp.moveaxis(_sizes(leaves[role.paths[0]]), role.axis, 0)
                own = function(stack, numbers.reshape(-1, *[1] * (stack.ndim - 1)))
                total += jnp.sum(own, axis=range(1, stack.ndim))
        return total

    means = summed(lambda sizes, _: sizes, jnp.zeros(layers.number)) / size
    return summed(lambda sizes, mean: sizes > multiple * mean, means) / size


def sampled(key: jax.Array, ratios: jax.Array, number: int) -> jax.Array:
    """So many layers, ascending, drawn without replacement in proportion to their ratios.

    The largest of log p + Gumbel noise are such a sample. Layers with a ratio of 0 come after
    all others, and are then all alike.
    """
    tiny = jnp.finfo(ratios.dtype).tiny
    scores = jnp.log(jnp.maximum(ratios, tiny)) + jax.random.gumbel(key, ratios.shape, ratios.dtype)
    return jnp.sort(jax.lax.top_k(scores, number)[1]).astype(jnp.int32)


def _sizes(weights: jax.Array) -> jax.Array:
    return jnp.abs(weights.astype(jnp.promote_types(weights.dtype, jnp.float32)))
