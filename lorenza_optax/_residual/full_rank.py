"""GUM's residual rule: in each period some matrices, drawn anew, train outside their subspace."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._linalg.newton_schulz import newton_schulz
from lorenza_optax._plan.plan import ProjectionPlan
from lorenza_optax._residual.residual import Kept, Memory, Residual, Situation, outside
from lorenza_optax._subspace.subspace import lift

__all__ = ["full_rank_blocks"]

Arrays = dict[str, jax.Array]


def full_rank_blocks(share: float, beta: Any) -> Residual:
    r"""P N, but for matrices that are full-rank in this period, each with probability q.

    .. math::
      R \leftarrow \beta R + G - P P^\top G, \quad \text{update } \mathrm{NS}(R) .

    Of the N matrices of one shape, layers of stacks included, ⌈q N⌉ at most are full-rank at a
    time: so many slots have a momentum R of full size, and forget it with the period. A slot
    draws a matrix that no other slot has, and takes it with probability q N / ⌈q N⌉.

    It keeps, under the path of the first leaf of that shape, ``momentum`` (slots, k, l) and
    ``holds`` (slots): the number of the slot's matrix among them, from 1, or 0 for none.

    Args:
      share: q.
      beta: β.
    """

    def memory(plan: ProjectionPlan) -> dict[str, dict[str, Kept]]:
        momentum, holds = {}, {}
        for paths in plan.groups:
            leaf = plan.leaves[paths[0]]
            number = _slots(share, len(plan.matrices(paths)))
            shape = (number, leaf.matrix.compressed_size, leaf.matrix.free)
            momentum[paths[0]] = Kept(shape, "-kl", leaf.compute_dtype)
            holds[paths[0]] = Kept((number,), "-", jnp.int32)
        return {"momentum": momentum, "holds": holds}

    def update(now: Situation) -> tuple[Arrays, Memory]:
        wholes = {path: lift(now.projectors[path], inner) for path, inner in now.inner.items()}
        momenta, holds = {}, {}
        for i, paths in enumerate(now.plan.groups):
            first, key = paths[0], jax.random.fold_in(now.key, i)
            held, momentum = (now.memory[name][first] for name in ("holds", "momentum"))
            drawn = _drawn(key, len(now.plan.matrices(paths)), len(held), share)
            held = jnp.where(now.refreshed, drawn, held)
            momentum = beta * jnp.where(now.refreshed, 0, momentum) + _complements(now, paths, held)
            wholes |= _replaced(now.plan, wholes, paths, held, newton_schulz(momentum))
            holds[first], momenta[first] = held, momentum
        return wholes, {"momentum": momenta, "holds": holds}

    return Residual(update, memory)


def _slots(share: float, number: int) -> int:
    """⌈q N⌉, with 0.1 * 30 = 3."""
    return max(1, math.ceil(share * number - 1e-9))


def _drawn(key: jax.Array, number: int, slots: int, share: float) -> jax.Array:
    """For each slot a matrix, from 1, or 0."""
    chosen, taken = jax.random.split(key)
    matrices = jax.random.choice(chosen, number, (slots,), replace=False) + 1
    takes = jax.random.uniform(taken, (slots,)) < share * number / slots
    return jnp.where(takes, matrices, 0).astype(jnp.int32)


def _complements(now: Situation, paths: tuple[str, ...], held: jax.Array) -> jax.Array:
    """G - P Pᵀ G of the matrix of each slot (slots, k, l), zero for none."""
    trees = (now.gradients, now.projectors, now.low)
    path = paths[0]
    empty = [jnp.zeros(tree[path].shape[-2:], tree[path].dtype) for tree in trees]

    def pick(path: str, layer: int | None) -> list[jax.Array]:
        return [tree[path] if layer is None else tree[path][layer] for tree in trees]

    picks = [lambda place=place: pick(*place) for place in now.plan.matrices(paths)]
    return jax.lax.map(lambda i: outside(*jax.lax.switch(i, [lambda: empty, *picks])), held)


def _replaced(
    plan: ProjectionPlan,
    wholes: Arrays,
    paths: tuple[str, ...],
    held: jax.Array,
    updates: jax.Array,
) -> Arrays:
    """The updates of leaves, with those of the matrices that slots hold in their places."""
    found, start = {}, 1
    for path in paths:
        whole = wholes[path]
        number = len(plan.matrices([path]))
        index = held - start
        index = jnp.where((index >= 0) & (index < number), index, number)  # of another leaf
        stack = whole.reshape(number, *whole.shape[-2:])
        found[path] = stack.at[index].set(updates, mode="drop").reshape(whole.shape)
        start += number
    return found
