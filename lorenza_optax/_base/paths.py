"""The leaves of a tree by path: the names that plans, states and messages use."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["has_masked_nodes", "leaves_by_path", "path_hash", "shape_differences", "with_arrays"]


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """A tree's leaves by path, in the order of ``jax.tree.leaves``.

    The paths are the same for a tree and for the same tree with boxed leaves: NNX hands
    ``init`` a tree of Variables, whose leaves lie at ``['kernel'].value``, and ``update`` one of
    arrays, at ``['kernel']``; linen's partitioning boxes do likewise.
    """
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    below = Counter(path[:depth] for path, _ in found for depth in range(len(path)))
    leaves: dict[str, Any] = {}
    for path, leaf in found:
        # A box holds one leaf; a NamedTuple with a field `value` holds others beside it.
        if path and path[-1] == jax.tree_util.GetAttrKey("value") and below[path[:-1]] == 1:
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        if name in leaves:
            raise ValueError(f"Two leaves of the tree have the path {name!r}: rename one of them.")
        leaves[name] = leaf
    return leaves


def with_arrays(tree: Any) -> Any:
    """A tree whose leaves are all arrays: Python's numbers become some."""
    return jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf), tree)


def shape_differences(needed: Any, found: Any) -> list[tuple[str, Any, Any]]:
    """(path, shape needed, shape found) of leaves that differ; None for what is not there."""
    shapes = [
        {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves_by_path(tree).items()}
        for tree in (needed, found)
    ]
    both = [(path, shapes[0].get(path), shapes[1].get(path)) for path in {**shapes[0], **shapes[1]}]
    return [(path, now, then) for path, now, then in both if now != then]


def has_masked_nodes(tree: Any) -> bool:
    """Whether ``optax.masked`` or ``partition`` hides a part of the tree."""
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    return any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))


def path_hash(path: str) -> int:
    """A number to fold into a key: the same for a leaf whatever other leaves there are."""
    return zlib.crc32(path.encode())
