"""A weight W + Σ L Rᵀ that is never formed.

Programs multiply weights with activations: x (W + L Rᵀ) = x W + (x L) Rᵀ costs no copy of W, and
several such weights share it. rules.py says what each primitive of JAX makes of one,
interpreter.py evaluates a program with them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._plan.matrix_view import MatrixView

__all__ = ["Factored", "Term", "add_product", "contract", "factored", "materialize"]


class Term(NamedTuple):
    """One summand L Rᵀ.

    Attributes:
      left: L. Its axes are those of the weight that are labelled "b" or "r", in the weight's
        order, and the rank.
      right: R, likewise with the axes labelled "b" or "c".
      vanishes: Whether the product is known to be zero, and only its derivative matters.
      left_rank: Which axis of L is the rank, counted from the end. It is moved to the end where L
        is used: a stack of layers, which a scan slices first, is not transposed as a whole.
      right_rank: Likewise of R.
      scale: Factors u of the columns of one of them, in the axes of what is ordered, or None. It is
        multiplied where that is used, for the same reason: L diag(u) Rᵀ of a stack takes no copy.
      scales_left: Whether that is L, and not R.
    """

    left: Any
    right: Any
    vanishes: bool
    left_rank: int = -1
    right_rank: int = -1
    scale: Any = None
    scales_left: bool = False

    @property
    def ordered_left(self) -> Any:
        """L with the rank as its last axis, and scaled."""
        left = jnp.moveaxis(self.left, self.left_rank, -1)
        return _scaled(left, self.scale) if self.scales_left else left

    @property
    def ordered_right(self) -> Any:
        """R with the rank as its last axis, and scaled."""
        right = jnp.moveaxis(self.right, self.right_rank, -1)
        return right if self.scales_left else _scaled(right, self.scale)


def _scaled(part: Any, scale: Any) -> Any:
    return part if scale is None else part.astype(scale.dtype) * scale


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
        left: Callable[[Any], Any] | None = None,
        right: Callable[[Any], Any] | None = None,
    ) -> Factored:
        """The same sum with other parts, which get the rank as their last axis."""
        terms = []
        for term in self.terms:
            new = term
            if left is not None:
                new = new._replace(left=left(term.ordered_left), left_rank=-1)
            if right is not None:
                new = new._replace(right=right(term.ordered_right), right_rank=-1)
            if (left if term.scales_left else right) is not None:
                new = new._replace(scale=None)
            terms.append(new)
        labels = self.labels if labels is None else labels
        return Factored(self.path, labels, base, tuple(terms), self.narrow)

    def same_axes(
        self, base: Any, left: Callable[[Any], Any], right: Callable[[Any], Any] | None = None
    ) -> Factored:
        """The same sum with other numbers in it: all parts changed, or a factor of each term."""
        terms = []
        for term in self.terms:
            if right is not None:
                scale = None if term.scale is None else right(term.scale)
                new = term._replace(left=left(term.left), right=right(term.right), scale=scale)
            elif term.scale is None:
                new = term._replace(left=left(term.left))
            else:  # what it scales may be kept in less than 32 bits
                new = term._replace(scale=left(term.scale))
            terms.append(new)
        return Factored(self.path, self.labels, base, tuple(terms), self.narrow)


def _flatten(value: Factored) -> tuple[Any, Any]:
    parts = [(term.left, term.right, term.scale) for term in value.terms]
    static = tuple((t.vanishes, t.left_rank, t.right_rank, t.scales_left) for t in value.terms)
    return (value.base, parts), (value.path, value.labels, static, value.narrow)


def _unflatten(static: Any, children: Any) -> Factored:
    path, labels, of_terms, narrow = static
    base, parts = children
    terms = tuple(
        Term(left, right, vanishes, left_rank, right_rank, scale, scales_left)
        for (left, right, scale), (vanishes, left_rank, right_rank, scales_left) in zip(
            parts, of_terms, strict=True
        )
    )
    return Factored(path, labels, base, terms, narrow)


jax.tree_util.register_pytree_node(Factored, _flatten, _unflatten)


def factored(
    path: str,
    leaf: jax.Array,
    view: MatrixView,
    terms: Sequence[tuple[jax.Array, jax.Array, bool, jax.Array | None]],
) -> Factored:
    """A leaf plus Σ L R, with L ([b,] m, k) and R ([b,] k, n) of its matrix view.

    Each as (L, R, whether the product is known to vanish, u ([b,] k) or None): factors of the rows
    of N if the product is the view's P N.
    """
    labels = "".join(
        "r" if axis in view.row_axes else "c" if axis in view.column_axes else "b"
        for axis in range(leaf.ndim)
    )
    batch_axes = [axis for axis, label in enumerate(labels) if label == "b"]

    def in_leaf_order(part: jax.Array, own: Sequence[int], first: bool) -> tuple[jax.Array, int]:
        """([b,] own, k) or ([b,] k, own) to the leaf's axes and the rank, and where that is."""
        order = [*batch_axes, *own]
        sizes = [leaf.shape[axis] for axis in order]
        place = len(batch_axes) if first else len(order)
        sizes.insert(place, part.shape[-2 if first else -1])
        split = part.reshape(sizes)
        if order == sorted(order):
            return split, place - len(sizes)
        split = jnp.moveaxis(split, place, -1)
        return split.transpose([*(order.index(axis) for axis in sorted(order)), len(order)]), -1

    # As the arrays lie that they were made of: see MatrixView.product.
    turned = view.compressed == "right"
    parts = []
    for left, right, vanishes, scale in terms:
        left, left_rank = in_leaf_order(left.mT if turned else left, view.row_axes, turned)
        right, right_rank = in_leaf_order(right, view.column_axes, True)
        if scale is not None:
            axes = sorted([*batch_axes, *(view.row_axes if turned else view.column_axes)])
            sizes = [leaf.shape[axis] if axis in batch_axes else 1 for axis in axes]
            scale = scale.reshape([*sizes, scale.shape[-1]])
        parts.append(Term(left, right, vanishes, left_rank, right_rank, scale, turned))
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
        wide = jnp.result_type(total, term.left, term.right)  # what is scaled may be narrow
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

    left, right = term.ordered_left, term.ordered_right
    if not term.vanishes:
        return total + delta(x, left, right)

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
    return unchanged(total, x, left, right)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
