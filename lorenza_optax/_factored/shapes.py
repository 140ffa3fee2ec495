"""What JAX's primitives that move or pick entries make of a factored weight.

A rule gets (bind, params, *inputs), see rules.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._factored.weight import Factored, materialize

__all__ = ["SHAPE_RULES"]

Bind = Callable[..., Any]


def _transpose(bind: Bind, params: Any, value: Factored) -> Any:
    permutation = params["permutation"]

    def permute(axes: list[int]) -> Callable[[Any], Any]:
        order = [axes.index(axis) for axis in permutation if axis in axes]
        return lambda part: part.transpose([*order, len(axes)])

    labels = "".join(value.labels[axis] for axis in permutation)
    return value.like(bind(value.base), labels, permute(value.left_axes), permute(value.right_axes))


def _reshaped(value: Factored, base: jax.Array, labels: str) -> Factored:
    """With parts in the shape that the new base and its labels ask for."""
    new = Factored(value.path, labels, base, ())

    def fit(axes: list[int]) -> Callable[[Any], Any]:
        sizes = [base.shape[axis] for axis in axes]
        return lambda part: part.reshape([*sizes, part.shape[-1]])

    return value.like(base, labels, fit(new.left_axes), fit(new.right_axes))


def _reshape(bind: Bind, params: Any, value: Factored) -> Any:
    if params.get("dimensions") is not None:
        return NotImplemented
    labels = _relabel(value.base.shape, value.labels, params["new_sizes"])
    return NotImplemented if labels is None else _reshaped(value, bind(value.base), labels)


def _relabel(old: Sequence[int], labels: str, new: Sequence[int]) -> str | None:
    """Labels after a reshape that merges and splits axes of one label; None for any other."""
    if 0 in old:
        return None
    axes = [(size, label) for size, label in zip(old, labels, strict=True) if size > 1]
    found = ""
    sizes = list(new)
    while sizes:
        size = sizes.pop(0)
        if size == 1:
            found += "b"
            continue
        have, label = axes.pop(0)
        found += label
        while have != size:
            if have < size:
                more, other = axes.pop(0)
                if other != label:
                    return None
                have *= more
            else:
                size *= sizes.pop(0)
                found += label
    return found


def _squeeze(bind: Bind, params: Any, value: Factored) -> Any:
    gone = params["dimensions"]
    labels = "".join(label for axis, label in enumerate(value.labels) if axis not in gone)
    return _reshaped(value, bind(value.base), labels)


def _broadcast_in_dim(bind: Bind, params: Any, value: Factored, *dynamic: Any) -> Any:
    """New axes of size 1 only."""
    kept = dict(zip(params["broadcast_dimensions"], range(value.base.ndim), strict=True))
    if dynamic or math.prod(params["shape"]) != value.base.size:
        return NotImplemented
    labels = "".join(
        value.labels[kept[axis]] if axis in kept else "b" for axis in range(len(params["shape"]))
    )
    return _reshaped(value, bind(value.base), labels)


def _slice(bind: Bind, params: Any, value: Factored) -> Any:
    strides = params["strides"] or (1,) * value.base.ndim
    spans = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))

    def cut(axes: list[int]) -> Callable[[Any], Any]:
        return lambda part: part[tuple(slice(*spans[axis]) for axis in axes)]

    return value.like(bind(value.base), None, cut(value.left_axes), cut(value.right_axes))


def _split(bind: Bind, params: Any, value: Factored) -> Any:
    axis, bounds = params["axis"], [0]
    for size in params["sizes"]:
        bounds.append(bounds[-1] + size)

    def cut(axes: list[int], start: int, stop: int) -> Callable[[Any], Any]:
        if axis not in axes:
            return lambda part: part
        own = axes.index(axis)
        return lambda part: jax.lax.slice_in_dim(part, start, stop, axis=own)

    return [
        value.like(base, None, cut(value.left_axes, *span), cut(value.right_axes, *span))
        for base, span in zip(bind(value.base), itertools.pairwise(bounds), strict=True)
    ]


def _dynamic_slice(bind: Bind, params: Any, value: Any, *starts: Any) -> Any:
    if not isinstance(value, Factored):
        return NotImplemented
    sizes = params["slice_sizes"]

    def cut(axes: list[int]) -> Callable[[Any], Any]:
        return lambda part: jax.lax.dynamic_slice(
            part,
            [*(starts[axis] for axis in axes), jnp.zeros_like(starts[0])],
            [*(sizes[axis] for axis in axes), part.shape[-1]],
            allow_negative_indices=False,  # as the primitive itself: clamped
        )

    return value.like(bind(value.base, *starts), None, cut(value.left_axes), cut(value.right_axes))


def _gather(bind: Bind, params: Any, value: Any, indices: Any) -> Any:
    """Entries along one axis, as in an embedding's table or a stack of layers."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if not isinstance(value, Factored) or len(numbers.collapsed_slice_dims) != 1:
        return NotImplemented
    (axis,) = numbers.collapsed_slice_dims
    if jnp.finfo(value.base.dtype).bits < 32 and value.labels[axis] != "b":
        return NotImplemented  # the rows would be formed in less than 32 bits
    whole = [size for i, size in enumerate(value.base.shape) if i != axis]
    if (
        numbers.start_index_map != (axis,)
        or numbers.operand_batching_dims
        or sizes[axis] != 1
        or [size for i, size in enumerate(sizes) if i != axis] != whole
    ):
        return NotImplemented
    base = bind(value.base, indices)
    rest = [i for i in range(value.base.ndim) if i != axis]
    places = dict(zip(numbers.offset_dims, rest, strict=True))
    labels = "".join(
        value.labels[places[i]] if i in places else value.labels[axis] for i in range(base.ndim)
    )
    new = Factored(value.path, labels, base, ())

    def pick(axes: list[int], new_axes: list[int]) -> Callable[[Any], Any]:
        if axis not in axes:
            return lambda part: part
        own = axes.index(axis)
        offsets = (*(n for n, i in enumerate(new_axes) if i in places), len(new_axes))
        own_numbers = jax.lax.GatherDimensionNumbers(offsets, (own,), (own,))
        return lambda part: jax.lax.gather(
            part,
            indices,
            own_numbers,
            [1 if i == own else size for i, size in enumerate(part.shape)],
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=0,  # what the base is filled with, is filled with that alone
        )

    picked = value.like(
        base, labels, pick(value.left_axes, new.left_axes), pick(value.right_axes, new.right_axes)
    )
    # Rows of a table are activations from here on; layers of a stack are still weights.
    return picked if value.labels[axis] == "b" else materialize(picked)


SHAPE_RULES: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
