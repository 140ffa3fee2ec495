"""ProjFactor: Adam's update from a moment in the subspace and row and column sums outside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._plan.plan import ProjectionPlan
from lorenza_optax._residual.residual import Arrays, Kept, Memory, Residual, Situation, kept
from lorenza_optax._subspace.subspace import lift

__all__ = ["proj_factor"]


def proj_factor(b1: Any, b2: Any, eps: Any, eps_in_root: bool) -> Residual:
    r"""The rule of ProjFactor, for an inner optimizer that answers the running mean m.

    .. math::
      O = P \hat g, \quad
      \rho \leftarrow \beta_2 \rho + (1 - \beta_2)\, (O \circ O) 1, \quad
      \kappa \leftarrow \beta_2 \kappa + (1 - \beta_2)\, (O \circ O)^\top 1, \quad
      U = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
      \frac{P m}{\sqrt{\rho \kappa^\top / 1^\top \rho} + \varepsilon} .

    O is in the shape of the weight's matrix, whatever the granularity: ρ has k and κ has l
    numbers. ``eps_in_root`` takes √(V̂ + ε).
    """

    def update(now: Situation) -> tuple[Arrays, Memory]:
        wholes: Arrays = {}
        memory: Memory = {"rows": {}, "columns": {}}
        for path, projector in now.projectors.items():
            rows, columns = now.memory["rows"][path], now.memory["columns"][path]
            own, mean = (
                _coarse(lift(projector, x), rows) for x in (now.low[path], now.inner[path])
            )
            square = own * own
            rows = b2 * rows + (1 - b2) * jnp.sum(square, axis=-1)
            columns = b2 * columns + (1 - b2) * jnp.sum(square, axis=-2)
            total = jnp.sum(rows, axis=-1, keepdims=True)
            # Shares first: the product of two sums of squares would underflow.
            shares = rows / jnp.where(total > 0, total, 1)
            second = shares[..., :, None] * columns[..., None, :]
            root = jnp.sqrt(second + eps) if eps_in_root else jnp.sqrt(second) + eps
            step = now.step.astype(rows.dtype)
            correction = jnp.sqrt(1 - b2**step) / (1 - b1**step)
            wholes[path] = _fine(correction * mean / root, projector)
            memory["rows"][path] = rows.astype(now.memory["rows"][path].dtype)
            memory["columns"][path] = columns.astype(rows.dtype)
        return wholes, memory

    return Residual(update, _memory, needs_gradient=False, needs_orthonormal=False)


def _memory(plan: ProjectionPlan) -> dict[str, dict[str, Kept]]:
    coarse = {
        path: dataclasses.replace(leaf, view=dataclasses.replace(leaf.matrix, granularity=1))
        for path, leaf in plan.projected.items()
    }
    return kept(rows="k", columns="l")(ProjectionPlan(coarse))


def _coarse(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """([b,] k / c, l c) to ([b,] k, l): pieces of one vector, together again."""
    return matrix.mT.reshape(*rows.shape[:-1], -1, rows.shape[-1]).mT


def _fine(matrix: jax.Array, projector: jax.Array) -> jax.Array:
    """And back."""
    return matrix.mT.reshape(*projector.shape[:-2], -1, projector.shape[-2]).mT
