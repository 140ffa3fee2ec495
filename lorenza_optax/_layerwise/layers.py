"""The layers of a model: which leaves, or which parts of leaves, belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lorenza_optax._plan.matrix_view import WeightDimensionNumbers
from lorenza_optax._plan.plan import LeafPlan, ProjectionPlan

__all__ = ["Layers", "Role", "check_pattern", "find_layers"]


class Role(NamedTuple):
    """A parameter that each layer has.

    Attributes:
      name: The path, with N for a layer's number.
      paths: The leaf that holds it of all layers, or one leaf a layer.
      axis: The axis of the layers in the one leaf, None for one leaf a layer.
      leaf: The plan of the (first) leaf.
    """

    name: str
    paths: tuple[str, ...]
    axis: int | None
    leaf: LeafPlan

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer."""
        shape = self.leaf.shape
        return shape if self.axis is None else shape[: self.axis] + shape[self.axis + 1 :]

    @property
    def numbers(self) -> WeightDimensionNumbers | None:
        """Dimension numbers of a stack of layers (k, ...); None if they are not projected."""
        view = self.leaf.view
        if view is None:
            return None
        # The axis of the layers comes first: those that stood in front of it move back by one.
        in_front = len(self.leaf.shape) if self.axis is None else self.axis
        moved = [tuple(a + (a < in_front) for a in g) for g in (view.row_axes, view.column_axes)]
        return WeightDimensionNumbers(*moved)


class Layers(NamedTuple):
    """The layers of a model.

    Attributes:
      number: How many there are.
      roles: The parameters that each of them has.
      outside: The paths of leaves that belong to none.
    """

    number: int
    roles: tuple[Role, ...]
    outside: tuple[str, ...]


def check_pattern(name: str, pattern: str | None) -> None:
    """Raises unless ``pattern`` is None or a regular expression with at most one group."""
    if pattern is None:
        return
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must be a regular expression, got {type(pattern).__name__}.")
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is no regular expression: {error}.") from None
    if groups > 1:
        raise ValueError(
            f"{name}={pattern!r} has {groups} groups: the layer's number is the one, (?:...)"
            " groups without one."
        )


def find_layers(plan: ProjectionPlan, pattern: str | None) -> Layers:
    """The layers of a model.

    Args:
      plan: The plan for its leaves.
      pattern: A regular expression that is searched for in paths: with a group for the layer's
        number, or without one for leaves that hold all layers. None finds subtrees that are
        stacked along a batch axis of their matrices, or else those that differ in one number of
        their path and nothing more.

    Raises:
      ValueError: If there are none, or if they do not fit together.
    """
    if pattern is None:
        roles = _stacked(plan, _stacked_paths(plan)) or _listed(plan, _numbered_paths(plan))
    elif re.compile(pattern).groups:
        hits = ((path, re.search(pattern, path)) for path in plan.leaves)
        roles = _listed(plan, {path: hit.span(1) for path, hit in hits if hit})
    else:
        roles = _stacked(plan, {path: 0 for path in plan.leaves if re.search(pattern, path)})
    if not roles:
        what = "no leaf is stacked, and no subtrees are alike but for a number in their path"
        what = what if pattern is None else f"layers={pattern!r} is in no path"
        raise ValueError(
            f"No layers are found: {what}. Leaves: {', '.join(plan.leaves)}. Pass layers=, a"
            r" regular expression such as r'blocks/(\d+)/' with a group for the layer's number,"
            " or '^blocks/' for leaves that hold all layers, and for those the"
            " weight_dimension_numbers of their matrices."
        )
    counts = {role.name: _number(role) for role in roles}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ValueError(
            f"The leaves of the layers disagree on how many layers there are ({found}): pass"
            " layers=, a regular expression that is in the paths of the layers' leaves only."
        )
    inside = {path for role in roles for path in role.paths}
    outside = tuple(path for path in plan.leaves if path not in inside)
    return Layers(_number(roles[0]), tuple(roles), outside)


def _number(role: Role) -> int:
    return len(role.paths) if role.axis is None else role.leaf.shape[role.axis]


def _stacked(plan: ProjectionPlan, axes: Mapping[str, int]) -> list[Role]:
    """Roles of leaves that hold all layers, along an axis; matrices along their batch axis."""
    roles = []
    for path, axis in axes.items():
        leaf = plan.leaves[path]
        if (leaf.view is not None and not leaf.view.batch_axes) or not leaf.shape:
            raise ValueError(
                f"Leaf {path!r} of shape {leaf.shape} shall hold all layers, but has no axis for"
                " them: pass weight_dimension_numbers in which the axis of the layers is neither"
                " reduction_axis nor output_axis."
            )
        axis = leaf.view.batch_axes[0] if leaf.view is not None else axis
        roles.append(Role(path, (path,), axis, leaf))
    return roles


def _stacked_paths(plan: ProjectionPlan) -> dict[str, int]:
    """The axis of the layers of leaves that lie in subtrees in which all leaves have it."""
    found: dict[str, int] = {}
    for path, leaf in plan.projected.items():
        if not leaf.matrix.batch_axes or path in found:
            continue
        axis = leaf.matrix.batch_axes[0]
        number, here = leaf.shape[axis], {path}
        for parent in _parents(path):
            below = {p for p in plan.leaves if p.startswith(parent)}
            if not all(_holds(plan.leaves[p], axis, number) for p in below):
                break
            here = below
        found |= dict.fromkeys(sorted(here, key=list(plan.leaves).index), axis)
    return found


def _parents(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rsplit("/", 1)[0]
        yield path + "/"
    yield ""


def _holds(leaf: LeafPlan, axis: int, number: int) -> bool:
    if leaf.view is not None and leaf.view.batch_axes[:1] != (axis,):
        return False
    return len(leaf.shape) > axis and leaf.shape[axis] == number


def _numbered_paths(plan: ProjectionPlan) -> dict[str, tuple[int, int]]:
    """Where the number stands in paths of outermost subtrees that are alike but for it."""
    families: dict[str, dict[str, dict[str, str]]] = {}
    for path in plan.leaves:
        for hit in re.finditer(r"\d+(?=/|$)", path):
            members = families.setdefault(path[: hit.start()], {})
            members.setdefault(hit.group(), {})[path[hit.end() :]] = path
    found: dict[str, tuple[int, int]] = {}
    unlike: dict[str, str] = {}
    for stem in sorted(families, key=len):  # outer ones first
        members = list(families[stem].values())
        kinds = [{rest: _kind(plan.leaves[path]) for rest, path in m.items()} for m in members]
        if len(members) < 2:
            continue
        if (different := _difference(kinds)) is not None:
            unlike[stem] = different
            continue
        for number, member in families[stem].items():
            span = (len(stem), len(stem) + len(number))
            found |= {path: span for path in member.values() if path not in found}
    for stem, different in unlike.items():
        inside = [
            number
            for number, member in families[stem].items()
            if any(found.get(path, (0,))[0] > len(stem) for path in member.values())
        ]
        if len(inside) > 1:  # of one alone the layers may well be a part
            raise ValueError(
                f"{stem + inside[0]!r}, {stem + inside[1]!r} and so on would be layers, but are not"
                f" alike in {different!r}: pass layers=, a regular expression with a group for the"
                " layer's number, for the leaves that all of them have."
            )
    return {path: found[path] for path in plan.leaves if path in found}


def _difference(kinds: list[dict[str, Any]]) -> str | None:
    """The first path in which some differ, None for none."""
    paths = dict.fromkeys(path for kind in kinds for path in kind)
    different = (p for p in paths if any(kind.get(p) != kinds[0].get(p) for kind in kinds))
    return next((path.lstrip("/") for path in different), None)


def _kind(leaf: LeafPlan) -> Any:
    return leaf.shape, leaf.dtype, leaf.view, leaf.rank


def _listed(plan: ProjectionPlan, spans: Mapping[str, tuple[int, int]]) -> list[Role]:
    """Roles of one leaf a layer, from where the layer's number stands in each path."""
    by_name: dict[str, dict[int, str]] = {}
    for path, (start, stop) in spans.items():
        number = path[start:stop]
        if not number.isdecimal():
            raise ValueError(
                f"The group of layers= must be a layer's number, got {number!r} in {path!r}."
            )
        by_name.setdefault(f"{path[:start]}N{path[stop:]}", {})[int(number)] = path
    roles = []
    for name, paths in by_name.items():
        ordered = tuple(paths[number] for number in sorted(paths))
        kinds = {path: _kind(plan.leaves[path]) for path in ordered}
        if any(kind != kinds[ordered[0]] for kind in kinds.values()):
            shapes = ", ".join(f"{p} {plan.leaves[p].shape}" for p in ordered)
            raise ValueError(
                f"The leaves {name!r} of the layers have not all the same shape, dtype, rank and"
                f" dimension numbers: {shapes}. Pass layers= that leaves out what differs."
            )
        roles.append(Role(name, ordered, None, plan.leaves[ordered[0]]))
    return roles
