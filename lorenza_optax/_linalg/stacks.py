"""Stacks of like matrices: how they are made, and a function of each of their matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["each", "overwritten", "stacked", "unstacked"]

Leaves = Sequence[jax.Array]


def stacked(leaves: Leaves, batches: Sequence[tuple[int, ...]]) -> jax.Array:
    """Leaves ([b,] ...), with these batch dimensions, as one stack (B, ...)."""
    parts = [
        leaf.reshape(math.prod(batch), *leaf.shape[len(batch) :])
        for leaf, batch in zip(leaves, batches, strict=True)
    ]
    return jnp.concatenate(parts)


def unstacked(stack: jax.Array, batches: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """The parts of a stack (B, ...), with the batch dimensions that each shall have."""
    parts, start = [], 0
    for batch in batches:
        stop = start + math.prod(batch)
        parts.append(stack[start:stop].reshape(*batch, *stack.shape[1:]))
        start = stop
    return parts


def each(function: Callable[..., Any], stack: jax.Array) -> Any:
    """A function of one matrix or of a stack, applied to a stack.

    XLA runs independent LAPACK calls, and those of a batch, at the same time, and the OpenBLAS
    below was seen to deadlock then (jaxlib 0.10.2): on a CPU they take turns.
    """
    return jax.lax.platform_dependent(
        stack, cpu=functools.partial(jax.lax.map, function), default=function
    )


def overwritten(
    function: Callable[[dict[str, Any], Any], dict[str, Any]],
    old: dict[str, list[jax.Array]],
    given: Any,
    batches: Sequence[tuple[int, ...]],
    active: jax.typing.ArrayLike,
    in_turn: bool,
) -> dict[str, list[jax.Array]]:
    """What a function of stacks makes of some leaves, if ``active``; else the leaves.

    In turn, matrix by matrix and in the place of the old ones, nothing on the way has the size of
    a stack, and no copy is made: what a conditional hands on has a buffer of its own.

    Args:
      function: (stacks (B, ...) by name, given) -> new stacks; of any B, and B matrices of
        which each is a matter of its own.
      old: Leaves by name.
      given: Further leaves, in a tree; where they are taken in turn, slices of them.
      batches: The batch dimensions of the leaves.
      active: Whether anything changes.
      in_turn: Whether there is one leaf with one batch dimension, to be taken matrix by matrix.
    """
    if in_turn:
        ((number,),) = batches

        def at(i: jax.Array) -> Callable[[jax.Array], jax.Array]:
            return lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i, 1)

        def change(i: jax.Array, now: Any) -> Any:
            mine, theirs = jax.tree.map(at(i), (now, given))
            new = function({name: leaves[0] for name, leaves in mine.items()}, theirs)
            return {
                name: [jax.lax.dynamic_update_slice_in_dim(leaves[0], new[name], i, 0)]
                for name, leaves in now.items()
            }

        return jax.lax.fori_loop(0, jnp.where(active, number, 0), change, old)

    def change_all() -> dict[str, list[jax.Array]]:
        new = function({name: stacked(leaves, batches) for name, leaves in old.items()}, given)
        return {name: unstacked(stack, batches) for name, stack in new.items()}

    return jax.lax.cond(active, change_all, lambda: old)
