"""Running array code on any mesh, and under mapped axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core

__all__ = ["in_auto_mode", "mark_varying", "mesh_axes", "placed", "whole"]


def in_auto_mode(function: Callable[..., Any], *args: Any, like: Any) -> Any:
    """Calls ``function(*args)``; on a mesh with Explicit axes, with those axes made Auto.

    Decompositions refuse sharded dimensions under Explicit axes, and products need the
    sharding of their result spelled out. Inside this call XLA chooses, as it does on an Auto
    mesh, and the results leave with the shardings of ``like``, so that types are stable from
    update to update. Everything that ``function`` reads must come through ``args``.

    Args:
      function: A function of arrays.
      *args: Its arguments, pytrees of arrays.
      like: A pytree of arrays with the structure of the result (not necessarily its shapes), or
        a function that gives one, which is called on a mesh with Explicit axes only.

    Returns:
      What ``function`` returns.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.explicit_axes:
        return function(*args)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def sharding(leaf: Any) -> Any:
        own = jax.typeof(leaf).sharding
        return replicated if own.mesh.empty else own  # an array from outside the mesh

    shardings = jax.tree.map(sharding, like() if callable(like) else like)
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*args)


def mark_varying(leaf: jax.Array, axis_name: Any) -> jax.Array:
    """Marks a leaf as different on each device of a mapped axis.

    ``shard_map`` sums the gradient of what it knows to be replicated over the axis; the mean
    that is meant would then be of sums.
    """
    axes = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    kind = jax.typeof(leaf)
    # Where JAX keeps what an array varies over: the first since 0.10, the second before.
    known = kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", frozenset())
    missing = tuple(axis for axis in axes if axis not in known)
    if not missing:
        return leaf
    try:
        for axis in missing:  # which pcast does not always check
            jax.lax.axis_size(axis)
        return jax.lax.pcast(leaf, missing, to="varying")
    except (AssertionError, NameError, ValueError) as error:  # by JAX's version and transformation
        raise ValueError(
            f"axis_name={axis_name!r} names no axis of jax.shard_map or jax.pmap around this call."
            " Put it inside one, or leave axis_name out where the loss is that of the whole batch."
        ) from error


def mesh_axes(leaf: Any) -> tuple[Any, ...]:
    """The mesh axes that each dimension is sharded over by the leaf's type, None for none.

    Only Explicit axes are a part of types.
    """
    spec = tuple(jax.typeof(leaf).sharding.spec)
    return (*spec, *(None,) * (leaf.ndim - len(spec)))


def placed(array: Any, axes: tuple[Any, ...], like: Any) -> Any:
    """An array with its dimensions sharded over axes of the mesh that ``like`` lies on."""
    if mesh_axes(array) == axes:
        return array
    if isinstance(like, jax.core.Tracer):
        mesh = jax.typeof(like).sharding.mesh
        return jax.sharding.reshard(array, jax.sharding.NamedSharding(mesh, jax.P(*axes)))
    return jax.device_put(array, jax.sharding.NamedSharding(like.sharding.mesh, jax.P(*axes)))


def whole(tree: Any) -> Any:
    """A tree of arrays, on a mesh with Explicit axes each of them whole on each device.

    For small arrays that are then used as if there were no mesh: elsewhere XLA chooses.
    """
    return jax.tree.map(lambda leaf: placed(leaf, (None,) * leaf.ndim, leaf), tree)
