"""The plan: which leaves of a tree are projected, how each is viewed, and at which rank."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorenza_optax._base.checks import check_choice
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._base.tables import format_table
from lorenza_optax._plan.matrix_view import (
    PROJ_TYPES,
    MatrixView,
    matrix_view,
)
from lorenza_optax._plan.selection import (
    DimensionNumbers,
    Rank,
    check_rank,
    default_choice,
    dimension_numbers_by_path,
    ranks_by_path,
)

__all__ = ["LeafPlan", "ProjectionPlan", "Stack", "projection_plan", "shape_and_dtype"]

LARGE = 2**20  # entries of a matrix that is worth a turn of its own


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What is done with one leaf; ``view`` is None where the inner optimizer runs in full."""

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    view: MatrixView | None
    rank: int
    reason: str

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Arithmetic is float32, or float64 for a float64 leaf, never less."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def matrix(self) -> MatrixView:
        """The view of a projected leaf."""
        assert self.view is not None, f"{self.path} is not projected"
        return self.view

    @property
    def low_rank_shape(self) -> tuple[int, ...]:
        """([b,] r, l), the shape of the projected gradient and of each moment."""
        return (*self.matrix.batch, self.rank, self.matrix.free)


class Stack(NamedTuple):
    """Projected leaves of like matrices, which a refresh treats together.

    Attributes:
      paths: The leaves.
      batches: (b,) or () for each.
      in_turn: Whether it is one leaf of large matrices, which are taken one by one.
    """

    paths: tuple[str, ...]
    batches: tuple[tuple[int, ...], ...]
    in_turn: bool


@dataclasses.dataclass(frozen=True)
class ProjectionPlan:
    """A plan for a whole tree; prints as a table."""

    leaves: Mapping[str, LeafPlan]

    @property
    def projected(self) -> dict[str, LeafPlan]:
        return {path: leaf for path, leaf in self.leaves.items() if leaf.view is not None}

    @property
    def others(self) -> dict[str, LeafPlan]:
        return {path: leaf for path, leaf in self.leaves.items() if leaf.view is None}

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Projected leaves of one shape, side, rank and dtype, to be taken together."""
        groups: dict[Any, list[str]] = {}
        for path, leaf in self.projected.items():
            view = leaf.matrix
            key = (view.m, view.n, view.compressed, leaf.rank, leaf.dtype)
            groups.setdefault(key, []).append(path)
        return [tuple(paths) for paths in groups.values()]

    @property
    def stacks(self) -> list[Stack]:
        """The groups, but a stack of large matrices is one by itself.

        On one device only: taken one by one along an axis that is sharded, as that of experts may
        be, all of them would be gathered first.
        """
        found = []
        for paths in self.groups:
            views = {path: self.leaves[path].matrix for path in paths}
            large = views[paths[0]].m * views[paths[0]].n >= LARGE and jax.device_count() == 1
            in_turn = [path for path in paths if large and views[path].batch]
            found += [Stack((path,), (views[path].batch,), True) for path in in_turn]
            if rest := tuple(path for path in paths if path not in in_turn):
                found.append(Stack(rest, tuple(views[path].batch for path in rest), False))
        return found

    def matrices(self, paths: Sequence[str]) -> list[tuple[str, int | None]]:
        """The matrices of leaves: each a path, and its index where the leaf is a stack."""
        found = []
        for path in paths:
            batch = self.leaves[path].matrix.batch
            found += [(path, layer) for layer in (range(batch[0]) if batch else (None,))]
        return found

    def warn(self) -> None:
        """Warns of leaves that were probably meant to be projected."""
        high = [
            f"{leaf.path} {leaf.shape}"
            for leaf in self.others.values()
            if len(leaf.shape) > 2 and leaf.reason == "no dimension numbers"
        ]
        if high:
            warnings.warn(
                "Leaves of 3 or more dimensions run the inner optimizer in full, because nothing"
                f" says which axes form their matrix: {', '.join(high)}. Pass"
                " weight_dimension_numbers to project them.",
                stacklevel=4,
            )
        uncut = [
            f"{leaf.path} ({leaf.reason})"
            for leaf in self.others.values()
            if "cannot be cut" in leaf.reason
        ]
        if uncut:
            warnings.warn(
                "Leaves run the inner optimizer in full, because the granularity does not fit"
                f" them: {', '.join(uncut)}. Choose one that divides their sides.",
                stacklevel=4,
            )
        if self.leaves and not self.projected:
            reasons = sorted({leaf.reason for leaf in self.others.values()})
            warnings.warn(
                "No leaf is projected, so no memory is saved and nothing is perturbed"
                f" ({'; '.join(reasons)}). Lower rank, or pass weight_dimension_numbers; "
                "print(lorenza_optax.projection_plan(params, rank)) shows each leaf.",
                stacklevel=4,
            )

    def numbers_kept(self, path: str) -> tuple[int, int]:
        """Numbers of optimizer state kept for a leaf with Adam inside, and by plain Adam."""
        leaf = self.leaves[path]
        adam = 2 * math.prod(leaf.shape)
        if leaf.view is None:
            return adam, adam
        batch = math.prod(leaf.view.batch)
        factors = batch * leaf.rank * (leaf.view.m + leaf.view.n)
        return factors + 2 * math.prod(leaf.low_rank_shape), adam

    def __str__(self) -> str:
        rows = [("path", "shape", "view (m, n)", "side", "rank", "kept", "Adam", "")]
        total_kept = total_adam = 0
        for path, leaf in self.leaves.items():
            kept, adam = self.numbers_kept(path)
            total_kept, total_adam = total_kept + kept, total_adam + adam
            if leaf.view is None:
                view, side, rank = "-", "full", "-"
            else:
                stack = f"{leaf.view.batch[0]} x " if leaf.view.batch else ""
                view, side = f"{stack}({leaf.view.m}, {leaf.view.n})", leaf.view.compressed
                rank = str(leaf.rank)
            rows.append((path, str(leaf.shape), view, side, rank, f"{kept:,}", f"{adam:,}",
                         leaf.reason))  # fmt: skip
        share = f"{total_kept / total_adam:.2f} of Adam's" if total_adam else ""
        rows.append(("total", "", "", "", "", f"{total_kept:,}", f"{total_adam:,}", share))
        return format_table(rows, numeric=(4, 5, 6))


def projection_plan(
    params: Any,
    rank: Rank = 128,
    *,
    proj_type: str = "std",
    weight_dimension_numbers: DimensionNumbers = None,
    granularity: float = 1,
) -> ProjectionPlan:
    """The plan that :func:`lorenza` makes for a tree; print it before you train.

    By default a leaf is projected if it has 2 dimensions, min(m, n) > ``rank``, and its last
    path key is none of "embedding", "scale", "bias".

    Args:
      params: The parameters, or their ``jax.eval_shape``: only shapes and dtypes are read.
      rank: The rank r; a tree of ranks (or a prefix of one), in which leaves that are not there
        or have 0 run in full; or a function from a leaf's path and shape to its rank.
      proj_type: Which side is compressed: "std" the shorter one, "reverse_std" the longer
        one, "left" the m rows, "right" the n columns.
      weight_dimension_numbers: What to project instead of the default: a
        ``WeightDimensionNumbers`` for all leaves of 2 or more dimensions, a tree (or a prefix
        of one) of these with None for leaves that run in full, or a function from params to
        such a tree.

    Returns:
      A :class:`ProjectionPlan`. ``print`` it for a table: path, shape, view, side, rank,
      numbers of state kept (both factors and two moments) and Adam's.

    Raises:
      ValueError: For a rank below 1 or an unknown ``proj_type``; if dimension numbers do not
        fit a leaf or name one that is not there.
      TypeError: If a leaf is not an array of real floats.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> params = {"kernel": jnp.zeros((64, 96)), "bias": jnp.zeros(96)}
      >>> print(lorenza_optax.projection_plan(params, rank=8))
      path    shape     view (m, n)  side  rank   kept    Adam
      ------------------------------------------------------------------------
      bias    (96,)     -            full     -    192     192  not a matrix
      kernel  (64, 96)  (64, 96)     left     8  2,816  12,288
      total                                      3,008  12,480  0.24 of Adam's
    """
    check_rank(rank)
    check_choice("proj_type", proj_type, PROJ_TYPES)
    arrays = leaves_by_path(params)
    numbers = dimension_numbers_by_path(weight_dimension_numbers, params, arrays)
    ranks = ranks_by_path(rank, params, arrays)
    leaves = {}
    for path, array in arrays.items():
        shape, dtype = shape_and_dtype(path, array)
        if numbers is None:
            chosen, reason = default_choice(path, shape)
        else:
            chosen, reason = numbers[path], "not selected"
        view = None
        own = ranks[path]
        if chosen is not None and own == 0:
            reason = "rank 0"
        elif chosen is not None:
            try:
                view = matrix_view(shape, chosen, proj_type, granularity)
            except ValueError as error:
                if numbers is None:  # of the default choice nothing but a granularity fails
                    leaves[path] = LeafPlan(path, shape, dtype, None, 0, str(error))
                    continue
                what = "weight_dimension_numbers" + " or granularity" * (granularity != 1)
                raise ValueError(
                    f"{what} of leaf {path!r} do not fit its shape {shape}: {chosen} ({error})."
                ) from None
            reason = ""
            if min(view.m, view.n) <= own:
                reason, view = f"min(m, n) = {min(view.m, view.n)} <= rank = {own}", None
        leaves[path] = LeafPlan(path, shape, dtype, view, own if view else 0, reason)
    return ProjectionPlan(leaves)


def shape_and_dtype(path: str, array: Any) -> tuple[tuple[int, ...], jnp.dtype]:
    """Those of a leaf, if it can be trained."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"Leaf {path!r} has dtype {array.dtype}, which cannot be trained here: parameters"
            " must be real floats. Keep it outside them, and hand it to the loss by itself."
        )
    return tuple(array.shape), jnp.dtype(array.dtype)
