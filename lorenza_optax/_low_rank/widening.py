"""Gradients in fewer bits than are computed with, as bfloat16, without wide copies of them all."""

from __future__ import annotations

import jax

from lorenza_optax._plan.plan import LeafPlan, ProjectionPlan
from lorenza_optax._subspace.subspace import project

__all__ = ["narrow", "project_in_turn", "read_again", "wide"]

Arrays = dict[str, jax.Array]


def wide(plan: ProjectionPlan, gradients: Arrays) -> Arrays:
    """The gradients in the dtypes that are computed with."""
    return {path: g.astype(plan.leaves[path].compute_dtype) for path, g in gradients.items()}


def read_again(plan: ProjectionPlan, gradients: Arrays) -> Arrays:
    """The gradients, those in fewer bits than are computed with behind a barrier.

    What several widen a GPU's compiler widens once, and keeps for all of them: here the energies,
    and much later the products. With bfloat16 that is two more copies of the model.
    """
    fewer = {p: g for p, g in gradients.items() if g.dtype != plan.leaves[p].compute_dtype}
    return gradients | jax.lax.optimization_barrier(fewer) if fewer else gradients


def narrow(plan: ProjectionPlan, gradients: Arrays) -> Arrays:
    """Gradients ([b,] m, n) in fewer bits than are computed with, where matrices take turns.

    There the wide copy is then of one matrix and not of a stack.
    """
    found = {}
    for paths, _, takes_turns in plan.stacks:
        leaf, g = plan.leaves[paths[0]], gradients[paths[0]]
        if takes_turns and g.dtype != leaf.compute_dtype:
            found[paths[0]] = leaf.matrix.matrix(g)
    return found


def project_in_turn(leaf: LeafPlan, projectors: jax.Array, matrices: jax.Array) -> jax.Array:
    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return project(pair[0], pair[1].astype(leaf.compute_dtype))

    return jax.lax.map(one, (projectors, leaf.matrix.orient(matrices)))
