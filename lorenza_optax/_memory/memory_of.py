"""The bytes that a method keeps for parameters, counted on shapes of the real thing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from lorenza_optax._ascent.surroundings import full_paths
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._lorenza import lorenza, scale_by_lorenza
from lorenza_optax._low_rank.arguments import low_rank_config
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.in_update import surroundings_of
from lorenza_optax._low_rank.state import examples
from lorenza_optax._perturbation.find import find_states
from lorenza_optax._residual.residual import DISCARD
from lorenza_optax._subspace.sketch import sketch_rows

__all__ = ["METHODS", "MethodMemory", "shapes_of", "tree_bytes"]


class MethodMemory(NamedTuple):
    """What one method keeps, in bytes; ``rank`` is None where it has none.

    Attributes:
      method: A name in ``METHODS``.
      rank: The rank r.
      weights: The parameters, LoRA's adapters included.
      gradients: What the backward pass of a usual update gives.
      refresh_gradients: What that of an update with a refresh gives.
      moments: The arrays of the optimizer inside, 8-bit codes with their scales.
      factors: Q, R (GaLore: its projector) and what else the subspaces need.
      other_state: The rest of the optimizer's state: counts, seeds, scalars.
      accumulators: What a sum of gradients over micro-batches would take besides.
    """

    method: str
    rank: int | None
    weights: int
    gradients: int
    refresh_gradients: int
    moments: int
    factors: int
    other_state: int
    accumulators: int

    @property
    def state(self) -> int:
        """The optimizer's whole state."""
        return self.moments + self.factors + self.other_state

    @property
    def total(self) -> int:
        """Weights, state, and the gradients of the update that holds most of them."""
        return self.weights + self.state + max(self.gradients, self.refresh_gradients)


def tree_bytes(tree: Any) -> int:
    """The bytes of a tree of arrays or their shapes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def shapes_of(params: Any) -> Any:
    """A tree of ``jax.ShapeDtypeStruct`` for one of arrays; raises for other leaves."""
    for path, leaf in leaves_by_path(params).items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"Leaf {path!r} is a {type(leaf).__name__}: params must hold arrays or"
                " jax.ShapeDtypeStruct, as jax.eval_shape gives them."
            )
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def _split(inner: Any) -> tuple[int, int]:
    """Bytes of an inner state: of its arrays, and of its counts and other scalars."""
    leaves = jax.tree.leaves(inner)
    scalars = [leaf for leaf in leaves if not leaf.shape]
    return tree_bytes(leaves) - tree_bytes(scalars), tree_bytes(scalars)


def _adamw(params: Any, rank: int | None, arguments: Mapping[str, Any]) -> MethodMemory:
    del rank, arguments
    moments, other = _split(jax.eval_shape(optax.adamw(1e-3).init, params))
    size = tree_bytes(params)
    return MethodMemory("adamw", None, size, size, size, moments, 0, other, size)


def _galore(params: Any, rank: int | None, arguments: Mapping[str, Any]) -> MethodMemory:
    del arguments
    assert rank is not None
    state = jax.eval_shape(optax.contrib.galore(1e-3, rank).init, params)
    moments, _ = _split(optax.tree.get(state, "base_optimizer_state"))
    factors = tree_bytes(optax.tree.get(state, "projector"))
    other = tree_bytes(state) - moments - factors
    size = tree_bytes(params)
    return MethodMemory("galore", rank, size, size, size, moments, factors, other, size)


def _lora(params: Any, rank: int | None, arguments: Mapping[str, Any]) -> MethodMemory:
    assert rank is not None
    adapters = {}
    for path, leaf in _config(rank, arguments).plan(params).projected.items():
        view = leaf.matrix
        adapters[path] = {
            "a": jax.ShapeDtypeStruct((*view.batch, view.m, rank), leaf.dtype),
            "b": jax.ShapeDtypeStruct((*view.batch, rank, view.n), leaf.dtype),
        }
    moments, other = _split(jax.eval_shape(optax.adamw(1e-3).init, adapters))
    size = tree_bytes(adapters)
    weights = tree_bytes(params) + size
    return MethodMemory("lora", rank, weights, size, size, moments, 0, other, size)


def _lorenza(params: Any, rank: int | None, arguments: Mapping[str, Any]) -> MethodMemory:
    assert rank is not None
    state = jax.eval_shape(lorenza(1e-3, rank, **arguments).init, params)
    (low_rank,) = find_states(state).values()
    moments = sum(_split(inner)[0] for inner in (low_rank.projected, low_rank.others))
    factors = tree_bytes((low_rank.q, low_rank.r, low_rank.singular_values))
    other = tree_bytes(state) - moments - factors

    config = _config(rank, arguments)
    passes = jax.eval_shape(lambda *args: _gradients(config, *args), params, low_rank)
    usual, at_refresh, accumulators = map(tree_bytes, passes)
    return MethodMemory(
        "lorenza", rank, tree_bytes(params), usual, at_refresh, moments, factors, other,
        accumulators,
    )  # fmt: skip


def _config(rank: int, arguments: Mapping[str, Any]) -> LowRankConfig:
    signature = inspect.signature(scale_by_lorenza)
    known = {name: arguments[name] for name in arguments if name in signature.parameters}
    bound = signature.bind(rank, **known)
    bound.apply_defaults()
    return low_rank_config(**bound.arguments, residual=DISCARD)


def _gradients(config: LowRankConfig, params: Any, state: Any) -> tuple[Any, Any, Any]:
    """What backward passes give: of a usual update, of one with a refresh, and to accumulate.

    The first two are those of ``update(..., value_fn=...)`` for a loss that uses projected
    leaves in matrix products, the third is what ``subspace_value_and_grad`` returns.
    """
    plan, leaves = config.plan(params), leaves_by_path(params)
    around = surroundings_of(config, plan, state)
    # Leaves that are displaced themselves are evaluated in float32 at least, or the displacement
    # would be rounded away; so are projected ones that are not kept factored.
    wide = full_paths(config.ascent, around, leaves)
    wide |= frozenset() if config.ascent.factored else frozenset(plan.projected)
    evaluated = {
        path: leaf.astype(plan.leaves[path].compute_dtype) if path in wide else leaf
        for path, leaf in leaves.items()
    }
    if config.needs_full_gradient:
        return evaluated, evaluated, params
    low = examples(plan, leaves)[0]
    others = {path: leaves[path] for path in plan.others}
    usual = (low, {path: evaluated[path] for path in others})
    if not config.sketches:
        return usual, evaluated, (low, others)
    projectors = around.subspaces.projectors
    rows = sketch_rows(around.rows, projectors, jax.random.key(0))
    sketches = {
        path: jnp.zeros((*projectors[path].shape[:-1], omega.shape[-2]), omega.dtype)
        for path, omega in rows.items()
    }
    return usual, (*usual, sketches), (low, others)


METHODS: dict[str, Callable[[Any, int | None, Mapping[str, Any]], MethodMemory]] = {
    "adamw": _adamw,
    "galore": _galore,
    "lora": _lora,
    "lorenza": _lorenza,
}
