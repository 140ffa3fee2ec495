"""What JAX's primitives make of a factored weight.

A rule gets (bind, params, *inputs), where ``bind`` evaluates the equation itself on arrays. It
returns the output, or NotImplemented, upon which the weight is materialized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._factored.shapes import SHAPE_RULES
from lorenza_optax._factored.weight import Factored, add_product, contract

__all__ = ["RULES"]

Bind = Callable[..., Any]


def _keep(bind: Bind, params: Any, value: Factored) -> Any:
    """Operations that leave the numbers, and of the derivative, as they are."""
    del params
    return value.like(bind(value.base))


def _convert(bind: Bind, params: Any, value: Factored) -> Any:
    # L and R stay in their dtype: they are rounded where they are multiplied, once.
    dtype = params["new_dtype"]
    kept = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16  # not quantized
    return value.like(bind(value.base)) if kept else NotImplemented


def _each_part(bind: Bind, params: Any, value: Factored) -> Any:
    """Operations that do the same to any array, such as stop_gradient."""
    del params
    return value.same_axes(bind(value.base), bind, bind)


def _reshard(bind: Bind, params: Any, value: Factored) -> Any:
    """Onto a mesh with other axis types the parts go too, whole on each device."""
    mesh, own = params["dst_sharding"].mesh, jax.typeof(value.base).sharding.mesh
    if mesh.axis_types == own.axis_types:
        return value.like(bind(value.base))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    move = lambda part: jax.sharding.reshard(part, whole)  # noqa: E731
    return value.same_axes(bind(value.base), move, move)


def _negate(bind: Bind, params: Any, value: Factored) -> Any:
    del params
    return value.same_axes(bind(value.base), jnp.negative)


def _scale(operation: Callable[..., Any]) -> Any:
    def rule(bind: Bind, params: Any, *inputs: Any) -> Any:
        del params
        first, second = inputs
        if isinstance(first, Factored) and isinstance(second, Factored):
            return NotImplemented
        if isinstance(first, Factored) and jnp.ndim(second) == 0:
            scaled = lambda part: operation(part, second).astype(part.dtype)  # noqa: E731
            return first.same_axes(bind(first.base, second), scaled)
        if operation is jnp.multiply and not isinstance(first, Factored) and jnp.ndim(first) == 0:
            scaled = lambda part: (part * first).astype(part.dtype)  # noqa: E731
            return second.same_axes(bind(first, second.base), scaled)
        return NotImplemented

    return rule


def _sum(sign: int) -> Any:
    def rule(bind: Bind, params: Any, first: Any, second: Any) -> Any:
        del params
        if not isinstance(second, Factored):
            return first.like(bind(first.base, second))
        turned = second if sign > 0 else second.same_axes(second.base, jnp.negative)
        if not isinstance(first, Factored):
            return turned.like(bind(first, second.base))
        if first.labels != second.labels or jnp.shape(first.base) != jnp.shape(second.base):
            return NotImplemented
        base = bind(first.base, second.base)
        narrow = first.narrow or second.narrow
        return Factored(first.path, first.labels, base, first.terms + turned.terms, narrow)

    return rule


def _dot_general(bind: Bind, params: Any, first: Any, second: Any) -> Any:
    if isinstance(first, Factored) and isinstance(second, Factored):
        return NotImplemented
    (first_sum, second_sum), (first_batch, second_batch) = params["dimension_numbers"]
    first_ids = list(range(jnp.ndim(_base(first))))
    second_ids = [len(first_ids) + axis for axis in range(jnp.ndim(_base(second)))]
    pairs = ((*first_sum, *first_batch), (*second_sum, *second_batch))
    for mine, theirs in zip(*pairs, strict=True):
        second_ids[theirs] = mine
    out_ids = [
        *first_batch,
        *(i for i in first_ids if i not in (*first_sum, *first_batch)),
        *(i for axis, i in enumerate(second_ids) if axis not in (*second_sum, *second_batch)),
    ]
    sizes = dict(zip(first_ids, _base(first).shape, strict=True))
    weight, x = (first, second) if isinstance(first, Factored) else (second, first)
    weight_ids, x_ids = (first_ids, second_ids) if weight is first else (second_ids, first_ids)

    rank = -1  # the number of the axis that L and R share
    left_ids = [*(weight_ids[axis] for axis in weight.left_axes), rank]
    right_ids = [*(weight_ids[axis] for axis in weight.right_axes), rank]
    summed = {weight_ids[axis] for axis in (first_sum if weight is first else second_sum)}
    volume = lambda ids: math.prod(sizes[i] for i in ids if i in summed)  # noqa: E731
    left_first = volume(left_ids) >= volume(right_ids)
    near, far = (left_ids, right_ids) if left_first else (right_ids, left_ids)
    between = [i for i in dict.fromkeys((*x_ids, *near)) if i in out_ids or i in far]
    precision, dtype = params["precision"], params["preferred_element_type"]
    if isinstance(precision, tuple) and weight is first:
        precision = precision[::-1]  # below, x comes first

    def product(x: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        close, distant = (left, right) if left_first else (right, left)
        floating = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits >= 16
        common = x.dtype if floating else close.dtype
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            common = jnp.promote_types(x.dtype, close.dtype)
        x, close, distant = x.astype(common), close.astype(common), distant.astype(common)
        through = contract(x, x_ids, close, near, between, precision)
        return contract(through, between, distant, far, out_ids, precision, dtype)

    total = bind(_base(first), _base(second))
    result = total.dtype
    moves = any(not term.vanishes for term in weight.terms)
    if moves and jnp.issubdtype(result, jnp.floating) and jnp.finfo(result).bits < 32:
        # Rounded before they are added, small moves would be lost in what they are added to.
        dtype = jnp.float32
        wider = {**params, "preferred_element_type": dtype}
        total = jax.lax.dot_general_p.bind(_base(first), _base(second), **wider)
    for term in weight.terms:
        total = add_product(total, product, x, term)
    return total.astype(result)


def _base(value: Any) -> Any:
    return value.base if isinstance(value, Factored) else value


RULES: dict[str, Callable[..., Any]] = {
    **SHAPE_RULES,
    "add": _sum(1),
    "add_any": _sum(1),
    "convert_element_type": _convert,
    "copy": _keep,
    "div": _scale(jnp.divide),
    "dot_general": _dot_general,
    "mul": _scale(jnp.multiply),
    "name": _keep,
    "neg": _negate,
    "reshard": _reshard,
    "sharding_constraint": _keep,
    "stop_gradient": _each_part,
    "sub": _sum(-1),
    **dict.fromkeys(("pbroadcast", "pcast", "pvary"), _each_part),
}
