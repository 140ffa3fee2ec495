"""A leaf as a stack of matrices, and which side of the matrix is compressed."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

__all__ = ["PROJ_TYPES", "MatrixView", "WeightDimensionNumbers", "matrix_view"]

PROJ_TYPES = ("std", "reverse_std", "left", "right")


class WeightDimensionNumbers(NamedTuple):
    """Which axes of a leaf are the rows and which the columns of its matrix.

    Axes in neither are batch axes: each of their entries is a matrix of its own, with its own
    subspace (scanned layers). ``optax.contrib.GaLoreDimensionNumbers`` and
    ``MuonDimensionNumbers`` have the same fields and are understood too.

    Attributes:
      reduction_axis: Axis or axes that make up the m rows (the input of ``x @ W``).
      output_axis: Axis or axes that make up the n columns.
    """

    reduction_axis: Sequence[int] | int = 0
    output_axis: Sequence[int] | int = 1


def is_dimension_numbers(value: Any) -> bool:
    """Whether a value names reduction and output axes, ours or Optax's."""
    return hasattr(value, "reduction_axis") and hasattr(value, "output_axis")


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A leaf seen as matrices of shape ([b,] m, n), with b the product of the batch axes.

    ``compressed`` says which factor of G ≈ Q diag(s) R projects: "left" is Qᵀ G (the m rows
    become r), "right" is G Rᵀ (the n columns become r). Here alone the second is turned into
    the first: :meth:`orient` transposes where the right side is compressed, so that all code
    elsewhere projects by Pᵀ from the left. `side` below is the (k) dimension that is
    compressed, `free` (l) the one that is kept.

    With a ``granularity`` c each vector that is compressed is cut into c pieces of k / c entries,
    which are compressed alike (VLoRP): the matrix becomes (k / c, l c).
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    compressed: str
    granularity: float = 1

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    @property
    def batch(self) -> tuple[int, ...]:
        """(b,) where there are batch axes, else ()."""
        return (self._size(self.batch_axes),) if self.batch_axes else ()

    @property
    def m(self) -> int:
        cut = self.granularity if self.compressed == "right" else 1 / self.granularity
        return round(self._size(self.row_axes) * cut)

    @property
    def n(self) -> int:
        cut = self.granularity if self.compressed == "left" else 1 / self.granularity
        return round(self._size(self.column_axes) * cut)

    @property
    def free(self) -> int:
        """The length of the side that is not compressed."""
        return self.n if self.compressed == "left" else self.m

    @property
    def compressed_size(self) -> int:
        """The length of the side that is compressed."""
        return self.m if self.compressed == "left" else self.n

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch_axes + self.row_axes + self.column_axes

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """Leaf to ([b,] m, n)."""
        rows, columns = self._size(self.row_axes), self._size(self.column_axes)
        whole = leaf.transpose(self._order).reshape(*self.batch, rows, columns)
        if self.granularity == 1:
            return whole
        # Transposed, so that what is compressed lies in rows and pieces of it lie together.
        return self.orient(self.orient(whole).mT.reshape(*self.batch, self.free, -1).mT)

    def leaf(self, matrix: jax.Array) -> jax.Array:
        """([b,] m, n) to leaf."""
        if self.granularity != 1:
            rows, columns = self._size(self.row_axes), self._size(self.column_axes)
            free = columns if self.compressed == "left" else rows
            matrix = self.orient(self.orient(matrix).mT.reshape(*self.batch, free, -1).mT)
        permuted = matrix.reshape([self.shape[axis] for axis in self._order])
        return permuted.transpose([self._order.index(axis) for axis in range(len(self.shape))])

    def orient(self, matrix: jax.Array) -> jax.Array:
        """([b,] m, n) to ([b,] compressed, free) and back."""
        return matrix if self.compressed == "left" else matrix.swapaxes(-1, -2)

    def mesh_axes(self, axes: Sequence[Any]) -> tuple[tuple[Any, ...], Any, Any]:
        """Mesh axes (of b, of m, of n) of the matrices, from those of the leaf's dimensions.

        Of dimensions that are merged the first one's remain: its parts lie one after the other.
        """

        def merged(group: tuple[int, ...]) -> Any:
            return next((axes[axis] for axis in group if self.shape[axis] > 1), None)

        batch = (merged(self.batch_axes),) if self.batch_axes else ()
        if self.granularity != 1:  # pieces of one vector lie on several devices
            return batch, None, None
        return batch, merged(self.row_axes), merged(self.column_axes)

    def product(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Factors ([b,] m, s), ([b,] s, n) of the matrix whose oriented view is a b."""
        if self.compressed == "left":
            return a, b
        return b.swapaxes(-1, -2), a.swapaxes(-1, -2)

    def projector(self, q: jax.Array | None, r: jax.Array | None) -> jax.Array:
        """P of shape ([b,] compressed, r) from the factors Q ([b,] m, r) and R ([b,] r, n)."""
        factor = q if self.compressed == "left" else r
        assert factor is not None
        return self.orient(factor)

    def partner(self, q: jax.Array | None, r: jax.Array | None) -> jax.Array:
        """K of shape ([b,] r, free), the factor that does not project."""
        factor = r if self.compressed == "left" else q
        assert factor is not None
        return self.orient(factor)


def _axes(axis: Sequence[int] | int, ndim: int) -> tuple[int, ...]:
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    axes = tuple(map(operator.index, axes))  # NumPy's integers too
    if not all(-ndim <= a < ndim for a in axes):
        raise ValueError(f"an axis is out of range for {ndim} dimensions")
    return tuple(a % ndim for a in axes)


def matrix_view(
    shape: tuple[int, ...],
    dimension_numbers: Any = None,
    proj_type: str = "std",
    granularity: float = 1,
) -> MatrixView:
    """The view of a leaf of a shape.

    Args:
      shape: The leaf's shape.
      dimension_numbers: Row and column axes; None for rows 0 and columns 1.
      proj_type: "std" compresses the shorter side, "reverse_std" the longer one, "left" the m
        rows, "right" the n columns. Of a square the first two compress the rows, the input: "std"
        as GaLore's code does, "reverse_std" as ``optax.contrib.galore``.
      granularity: c, by which k / c and l c must be whole numbers.

    Raises:
      ValueError: If the axes or the granularity do not fit the shape.
    """
    numbers = WeightDimensionNumbers() if dimension_numbers is None else dimension_numbers
    rows = _axes(numbers.reduction_axis, len(shape))
    columns = _axes(numbers.output_axis, len(shape))
    if not rows or not columns:
        raise ValueError("reduction_axis and output_axis must each name at least one axis")
    if len(set(rows + columns)) != len(rows + columns):
        raise ValueError("an axis is named twice")
    batch = tuple(axis for axis in range(len(shape)) if axis not in rows + columns)
    view = MatrixView(tuple(shape), batch, rows, columns, "left")
    # Of a square the input side: GaLore's reference compresses the columns, but those are the
    # inputs of PyTorch's (outputs, inputs). The other side costs loss (benchmarks/RESULTS.md).
    right = {"std": view.m > view.n, "reverse_std": view.m < view.n, "left": False, "right": True}
    if right[proj_type]:
        view = dataclasses.replace(view, compressed="right")
    cut = view.compressed_size / granularity, view.free * granularity
    if any(size != int(size) for size in cut):
        raise ValueError(
            f"vectors of {view.compressed_size} entries cannot be cut into {granularity} pieces"
        )
    return dataclasses.replace(view, granularity=granularity)
