"""Which leaves are projected, which of their axes form a matrix, and at which rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from lorenza_optax._base.checks import check_int
from lorenza_optax._base.paths import has_masked_nodes, leaves_by_path
from lorenza_optax._plan.matrix_view import WeightDimensionNumbers, is_dimension_numbers

__all__ = [
    "DimensionNumbers",
    "Rank",
    "check_rank",
    "default_choice",
    "dimension_numbers_by_path",
    "ranks_by_path",
    "select_leaves",
]

# Last path keys of leaves that are not the matrix of a linear map, whatever their shape:
# an embedding is a table of rows, and scanned layers stack scales and biases to two dimensions.
NOT_PROJECTED = ("embedding", "scale", "bias")

DimensionNumbers = Any | Callable[[Any], Any] | None
Rank = int | Callable[[str, tuple[int, ...]], int] | Any


def default_choice(path: str, shape: tuple[int, ...]) -> tuple[Any, str]:
    """Dimension numbers of a leaf that nothing is said of, or None and why."""
    name = path.rsplit("/", 1)[-1]
    if name in NOT_PROJECTED:
        return None, f"named {name!r}" if len(shape) > 1 else "not a matrix"
    if len(shape) > 2:
        return None, "no dimension numbers"
    if len(shape) < 2:
        return None, "not a matrix"
    return WeightDimensionNumbers(), ""


def dimension_numbers_by_path(
    spec: DimensionNumbers, params: Any, arrays: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Dimension numbers or None for each path; None where the default rule decides."""
    if callable(spec) and not is_dimension_numbers(spec):
        spec = spec(params)
    if spec is None:
        return None
    if is_dimension_numbers(spec):
        return {
            path: spec if getattr(array, "ndim", 0) >= 2 else None for path, array in arrays.items()
        }
    is_leaf = lambda node: (  # noqa: E731
        node is None or is_dimension_numbers(node) or isinstance(node, optax.MaskedNode)
    )
    given = leaves_by_path(spec, is_leaf=is_leaf)
    for path, value in given.items():
        if not is_leaf(value):
            raise TypeError(
                "weight_dimension_numbers must hold WeightDimensionNumbers or None, got"
                f" {type(value).__name__} at {path!r}."
            )
    given = {prefix: value for prefix, value in given.items() if is_dimension_numbers(value)}
    chosen: dict[str, Any] = dict.fromkeys(arrays)
    for prefix, value, below in _spread("weight_dimension_numbers", given, params, arrays):
        # As for the whole tree, biases and the like below a prefix are left out.
        chosen |= {p: value for p in below if p == prefix or getattr(arrays[p], "ndim", 0) >= 2}
    return chosen


def _spread(
    name: str, given: Mapping[str, Any], params: Any, arrays: Mapping[str, Any]
) -> Iterator[tuple[str, Any, list[str]]]:
    """(path, value, the leaves there or below) of each leaf of a prefix of a tree."""
    for prefix, value in given.items():
        below = [path for path in arrays if path == prefix or path.startswith(prefix + "/")]
        # What optax.masked or partition hides may well be named.
        if not below and not has_masked_nodes(params):
            raise ValueError(
                f"{name} names {prefix!r}, but no leaf lies there. Leaves: {', '.join(arrays)}."
            )
        yield prefix, value, below


def check_rank(rank: Rank) -> None:
    """Raises for a rank of all leaves that is none; others are checked with the parameters."""
    if _is_one(rank):
        check_int("rank", rank, 1)


def _is_one(rank: Rank) -> bool:
    return rank is None or (not callable(rank) and jax.tree_util.all_leaves([rank]))


def ranks_by_path(rank: Rank, params: Any, arrays: Mapping[str, Any]) -> dict[str, int]:
    """The rank of each leaf; 0 where it shall not be projected."""
    found: dict[str, Any] = dict.fromkeys(arrays, 0)
    if _is_one(rank):
        found = dict.fromkeys(arrays, rank)
    elif callable(rank):
        found = {path: rank(path, tuple(array.shape)) for path, array in arrays.items()}
    else:
        for _, value, below in _spread("rank", leaves_by_path(rank), params, arrays):
            found |= dict.fromkeys(below, value)
    for path, value in found.items():
        check_int(f"rank of leaf {path!r}", value, 0)
    return found


def select_leaves(
    include: str | Sequence[str] | Any = ".",
    *,
    exclude: str | Sequence[str] = (),
    weight_dimension_numbers: DimensionNumbers = None,
) -> Callable[[Any], dict[str, Any]]:
    """Chooses the leaves to project by regular expressions on their paths, or by a mask.

    The result is given as ``weight_dimension_numbers`` to whatever takes these.

    Args:
      include: A regular expression or several, searched for in a leaf's path such as
        ``"layers/0/attention/query/kernel"``; or a tree of bools like the parameters (or a
        prefix of one), or a function from the parameters to one.
      exclude: Regular expressions; leaves with one of them in their path run in full.
      weight_dimension_numbers: Which axes form the matrix of a chosen leaf, as in
        :func:`lorenza`. By default the two axes of 2-D leaves; then what is chosen by a regular
        expression must not be named "embedding", "scale" or "bias" unless the expression
        contains that name, while a mask is followed to the letter.

    Returns:
      A function from the parameters to dimension numbers by path.

    Raises:
      ValueError: For a regular expression that cannot be read. Later, at ``init``, if nothing
        that can be projected is chosen, or a mask chooses a leaf of which nothing says which
        axes form its matrix.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> kernels = {"body": jnp.zeros((64, 96)), "head": jnp.zeros((96, 64))}
      >>> params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
      >>> body = lorenza_optax.select_leaves(exclude="^head/")
      >>> print(lorenza_optax.projection_plan(params, 8, weight_dimension_numbers=body))
      path         shape     view (m, n)  side  rank    kept    Adam
      ------------------------------------------------------------------------------
      body/kernel  (64, 96)  (64, 96)     left     8   2,816  12,288
      head/kernel  (96, 64)  -            full     -  12,288  12,288  not selected
      total                                           15,104  24,576  0.61 of Adam's
    """
    by_path = isinstance(include, str) or (
        isinstance(include, Sequence) and all(isinstance(one, str) for one in include)
    )
    wanted = _compiled("include", include) if by_path else []
    unwanted = _compiled("exclude", exclude)

    def numbers(params: Any) -> dict[str, Any]:
        arrays = leaves_by_path(params)
        given = dimension_numbers_by_path(weight_dimension_numbers, params, arrays)
        mask = None if by_path else _mask_by_path(include, params, arrays)
        chosen: dict[str, Any] = {}
        unclear: list[str] = []
        for path, array in arrays.items():
            if any(pattern.search(path) for pattern in unwanted):
                continue
            hits = [pattern for pattern in wanted if pattern.search(path)]
            if not (hits if mask is None else mask[path]):
                continue
            if given is not None:
                found = given[path]
            else:
                name, named = path.rsplit("/", 1)[-1], mask is not None
                named |= any(name in pattern.pattern for pattern in hits)
                two = named and array.ndim == 2
                found = WeightDimensionNumbers() if two else default_choice(path, array.shape)[0]
            if found is None and mask is not None and array.ndim > 1:
                raise ValueError(
                    f"The mask given to select_leaves chooses leaf {path!r} of shape"
                    f" {array.shape}, but nothing says which axes form its matrix: pass"
                    " weight_dimension_numbers to select_leaves too."
                )
            if found is not None:
                chosen[path] = found
            elif array.ndim > 2:
                unclear.append(f"{path!r} of shape {array.shape}")
        if not chosen and not has_masked_nodes(params):
            about = f"select_leaves({include!r}, exclude={exclude!r}) chooses "
            if unclear:
                raise ValueError(
                    f"{about}{', '.join(unclear)}, but nothing says which axes form a matrix: pass"
                    " weight_dimension_numbers to select_leaves too."
                )
            raise ValueError(f"{about}no leaf that can be projected. Leaves: {', '.join(arrays)}.")
        return chosen

    return numbers


def _compiled(name: str, patterns: str | Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    except re.error as error:
        raise ValueError(
            f"{name} holds {error.pattern!r}, which is no regular expression: {error}."
        ) from None


def _mask_by_path(mask: Any, params: Any, arrays: Mapping[str, Any]) -> dict[str, bool]:
    mask = mask(params) if callable(mask) else mask
    chosen = dict.fromkeys(arrays, False)
    for prefix, value, below in _spread("The mask", leaves_by_path(mask), params, arrays):
        if not isinstance(value, bool) and getattr(value, "dtype", None) != np.bool_:
            raise TypeError(f"A mask holds bools, got {type(value).__name__} at {prefix!r}.")
        chosen |= dict.fromkeys(below, bool(value))
    return chosen
