"""A weight W + Σ L Rᵀ that is never formed.

Programs multiply weights with activations: x (W + L Rᵀ) = x W + (x L) Rᵀ costs no copy of W, and
several such weights share it. _factored_rules.py says what each primitive of JAX makes of one,
_interpreter.py evaluates a program with them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._mesh import in_auto_mode

__all__ = ["Factored", "Term", "add_product", "contract", "factored", "materialize"]


class Term(NamedTuple):
    """One summand L Rᵀ.

    Attributes:
      left: L. Its axes are those of the weight that are labelled "b" or "r", in the weight's
        order, and last the rank.
      right: R, likewise with the axes labelled "b" or "c".
      vanishes: Whether the product is known to be zero, and only its derivative matters.
    """

    left: Any
    right: Any
    vanishes: bool


@dataclasses.dataclass(frozen=True)
class Factored:
    """The weight base + Σ L Rᵀ.

    ``labels`` has one letter for each axis: "r" for a row axis, "c" for a column axis, "b" for a
    batch axis, each of whose entries is a matrix of its own (of size 1 also one of no meaning).
    ``narrow`` says that the leaf itself is kept in less than 32 bits, so that the sum must not be
    formed in its dtype.
    """

    path: str
    labels: str
    base: Any
    terms: tuple[Term, ...]
    narrow: bool = False

    @property
    def left_axes(self) -> list[int]:
        return [axis for axis, label in enumerate(self.labels) if label in "br"]

    @property
    def right_axes(self) -> list[int]:
        return [axis for axis, label in enumerate(self.labels) if label in "bc"]

    def like(
        self,
        base: Any,
        labels: str | None = None,
        left: Callable[[Any], Any] = lambda part: part,
        right: Callable[[Any], Any] = lambda part: part,
    ) -> Factored:
        """The same sum with other parts."""
        terms = tuple(t._replace(left=left(t.left), right=right(t.right)) for t in self.terms)
        labels = self.labels if labels is None else labels
        return Factored(self.path, labels, base, terms, self.narrow)


def _flatten(value: Factored) -> tuple[Any, Any]:
    parts = [(term.left, term.right) for term in value.terms]
    vanishes = tuple(term.vanishes for term in value.terms)
    return (value.base, parts), (value.path, value.labels, vanishes, value.narrow)


def _unflatten(static: Any, children: Any) -> Factored:
    path, labels, vanishes, narrow = static
    base, parts = children
    terms = tuple(Term(a, b, flag) for (a, b), flag in zip(parts, vanishes, strict=True))
    return Factored(path, labels, base, terms, narrow)


jax.tree_util.register_pytree_node(Factored, _flatten, _unflatten)


def factored(
    path: str,
    leaf: jax.Array,
    row_axes: Sequence[int],
    column_axes: Sequence[int],
    terms: Sequence[tuple[jax.Array, jax.Array, bool]],
) -> Factored:
    """A leaf plus Σ L R, with L ([b,] m, k) and R ([b,] k, n) of its matrix view."""
    labels = "".join(
        "r" if axis in row_axes else "c" if axis in column_axes else "b"
        for axis in range(leaf.ndim)
    )
    batch_axes = [axis for axis, label in enumerate(labels) if label == "b"]

    def in_leaf_order(part: jax.Array, own: Sequence[int]) -> jax.Array:
        """([b,] own, k) to the leaf's axes, and k last."""
        order = [*batch_axes, *own]
        split = part.reshape([*(leaf.shape[axis] for axis in order), part.shape[-1]])
        return split.transpose([*(order.index(axis) for axis in sorted(order)), len(order)])

    parts = [
        Term(
            in_leaf_order(left, row_axes),
            in_leaf_order(right.swapaxes(-1, -2), column_axes),
            vanishes,
        )
        for left, right, vanishes in terms
    ]
    return Factored(path, labels, leaf, tuple(parts), jnp.finfo(leaf.dtype).bits < 32)


def materialize(value: Factored) -> jax.Array:
    """The sum itself, in the dtype of the base."""
    rank = value.base.ndim
    ids = list(range(rank))
    left_ids = [*value.left_axes, rank]
    right_ids = [*value.right_axes, rank]

    def product(_: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        return contract(left, left_ids, right, right_ids, ids, jax.lax.Precision.HIGHEST)

    total = value.base
    for term in value.terms:
        wide = jnp.promote_types(total.dtype, term.left.dtype)
        total = add_product(total.astype(wide), product, None, term)
    return total.astype(value.base.dtype)


def contract(
    a: jax.Array,
    a_ids: Sequence[int],
    b: jax.Array,
    b_ids: Sequence[int],
    out_ids: Sequence[int],
    precision: Any = None,
    dtype: Any = None,
) -> jax.Array:
    """A product with axes named by numbers, as in einsum, made one of two (stacks of) matrices.

    XLA's CPU backend transposes operands of a product that contracts several axes at once, as
    the gradient of x L does by a factor L if x is (batch, time, width): merged, it does not.
    """
    both = [i for i in a_ids if i in b_ids]
    batch = [i for i in both if i in out_ids]
    summed = [i for i in both if i not in out_ids]
    rows = [i for i in a_ids if i not in both]
    columns = [i for i in b_ids if i not in both]
    sizes = dict(zip((*a_ids, *b_ids), (*a.shape, *b.shape), strict=True))

    def merged(x: jax.Array, ids: Sequence[int], *groups: list[int]) -> jax.Array:
        order = [ids.index(i) for i in (*batch, *(i for group in groups for i in group))]
        shape = [sizes[i] for i in batch] + [math.prod(sizes[i] for i in g) for g in groups]
        return x.transpose(order).reshape(shape)

    left, right = merged(a, a_ids, rows, summed), merged(b, b_ids, summed, columns)
    stacks = tuple(range(len(batch)))
    dimensions = (((len(batch) + 1,), (len(batch),)), (stacks, stacks))
    out = jax.lax.dot_general(left, right, dimensions, precision, dtype)  # pyright: ignore[reportArgumentType]
    order = batch + rows + columns
    return out.reshape([sizes[i] for i in order]).transpose([order.index(i) for i in out_ids])


def add_product(
    total: jax.Array, product: Callable[..., jax.Array], x: Any, term: Term
) -> jax.Array:
    """total + product(x, L, R); where the term vanishes only derivatives are computed."""

    def delta(x: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        one = lambda x, left, right: product(x, left, right).astype(total.dtype)  # noqa: E731
        return in_auto_mode(one, x, left, right, like=total)

    if not term.vanishes:
        return total + delta(x, term.left, term.right)

    @jax.custom_jvp
    def unchanged(total: jax.Array, x: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        del x, left, right
        return total

    def tangent(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (total, x, left, right), (d_total, _, d_left, d_right) = primals, tangents
        summands = [] if _is_zero(d_total) else [d_total]
        if not _is_zero(d_left):
            summands.append(delta(x, d_left, right))
        if not _is_zero(d_right):
            summands.append(delta(x, left, d_right))
        return total, functools.reduce(jnp.add, summands or [jnp.zeros_like(total)])

    unchanged.defjvp(tangent, symbolic_zeros=True)
    return unchanged(total, x, term.left, term.right)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
