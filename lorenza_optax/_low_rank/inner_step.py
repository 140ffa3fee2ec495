"""One update of the optimizer inside: its state decoded, moved into new subspaces, and stored.

An optimizer that treats each entry by itself takes a large leaf part by part, each in its place.
Then the gradient's array becomes the update's, and nothing on the way has a leaf's size: moments
in 8 bits are decoded for a part only, and those that turn into a new subspace leave no old ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._inner.inner import inner_update, load_moments, store_moments
from lorenza_optax._inner.quantized import LARGE_LAYER
from lorenza_optax._inner.rules import is_elementwise
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.renewal import carried
from lorenza_optax._plan.plan import ProjectionPlan, Stack

__all__ = ["Turn", "inner_step"]

Arrays = dict[str, jax.Array]

# Entries of a part of a leaf that is not projected.
PART = 2**20


class Turn(NamedTuple):
    """A change of subspaces that the inner state follows: see :func:`carried`.

    Attributes:
      overlaps: C = P_newᵀ P_old ([b,] r, r) by path.
      changed: Whether there is one.
      settling: Whether the first subspaces are still being found; None where they are not.
    """

    overlaps: Arrays
    changed: Any
    settling: Any = None


class _Step(NamedTuple):
    """What is the same for all leaves of an update, and for all parts of one."""

    config: LowRankConfig
    stacks: Sequence[Stack]
    inner: optax.GradientTransformationExtraArgs
    usable: Any
    extra_args: dict[str, Any]


def inner_step(
    config: LowRankConfig,
    plan: ProjectionPlan,
    inner: optax.GradientTransformationExtraArgs,
    gradients: Arrays,
    state: Any,
    usable: Any,
    key: jax.Array,
    extra_args: dict[str, Any],
    before: Turn | None = None,
    after: Turn | None = None,
) -> tuple[Arrays, Any]:
    """The updates of some leaves, and the inner state behind them as it is kept.

    Args:
      config: The method.
      plan: Its plan.
      inner: The optimizer of these leaves.
      gradients: What it is given, by path.
      state: Its state as it is kept.
      usable: Whether the gradient is finite; if not, the state stays as it is.
      key: For stochastic rounding.
      extra_args: Keyword arguments for ``inner``.
      before: A change of subspaces before its update.
      after: One behind it.
    """
    step = _Step(config, plan.stacks, inner, usable, extra_args)
    parts = _parts(step, plan, gradients, before, after)
    if not parts:
        return _at_once(step, gradients, state, key, before, after)
    rest = {path: g for path, g in gradients.items() if path not in parts}
    turns = (_of(before, rest), _of(after, rest))
    updates, new = _at_once(step, rest, _only(state, rest), jax.random.fold_in(key, 0), *turns)
    updates, moments = dict(updates), {"mu": dict(new.mu), "nu": dict(new.nu)}
    for number, (path, size) in enumerate(parts.items(), 1):
        own_key = jax.random.fold_in(key, number)
        turns = (_of(before, [path]), _of(after, [path]))
        own = {"gradients": gradients[path], "mu": state.mu[path], "nu": state.nu[path]}
        now = _in_parts(step._replace(stacks=()), path, size, own, state, own_key, *turns)
        updates[path], moments["mu"][path], moments["nu"][path] = now.values()
    return updates, new._replace(**moments)


def _at_once(
    step: _Step, gradients: Arrays, state: Any, key: jax.Array, before: Turn | None,
    after: Turn | None,
) -> tuple[Arrays, Any]:  # fmt: skip
    config, stacks, inner, usable, extra_args = step
    if_usable = partial(jax.tree.map, lambda new, old: jnp.where(usable, new, old))
    initial = inner.init(gradients)
    moments = load_moments(state, initial)
    if before is not None:
        moments = carried(config, stacks, moments, initial, *before)
    updates, new = inner_update(inner, gradients, moments, extra_args)
    # Subspaces change with a gradient that is usable only: what is carried over can be settled
    # here, and be overwritten. Later the old arrays would have to be kept beside the new ones.
    new = if_usable(new, moments)
    if after is not None:
        new = carried(config, stacks, new, initial, *after)
    dtype = config.stored_moment_dtype()
    stored = store_moments(new, dtype, key, state)
    if dtype == jnp.int8:  # codes of what was decoded may be others
        stored = if_usable(stored, state)
    return updates, stored


def _parts(
    step: _Step,
    plan: ProjectionPlan,
    gradients: Arrays,
    before: Turn | None,
    after: Turn | None,
) -> dict[str, int]:
    """Leaves that are taken part by part, and how long parts are along the first axis.

    On one device only: along an axis that is sharded all parts would be gathered first.
    """
    if not is_elementwise(step.inner) or jax.device_count() > 1:
        return {}
    in_8_bits = step.config.stored_moment_dtype() == jnp.int8
    turns = before is not None or after is not None
    in_turn = {paths[0] for paths, _, in_turn in step.stacks if in_turn}
    found = {}
    for path, g in gradients.items():
        layer = max(1, math.prod(g.shape[1:]))  # 0 of a leaf without entries
        if path in plan.projected:
            large = plan.leaves[path].matrix.batch and layer >= LARGE_LAYER
            size = 1 if (turns and path in in_turn) or (in_8_bits and large) else 0
        else:
            size = max(1, PART // layer) if in_8_bits and g.ndim > 1 else 0
        if 0 < size < len(g):
            found[path] = size
    return found


def _in_parts(
    step: _Step, path: str, size: int, whole: dict[str, Any], state: Any, key: jax.Array,
    before: Turn | None, after: Turn | None,
) -> dict[str, Any]:  # fmt: skip
    """The update in the place of the gradient, and the moments in that of the old ones."""

    def take(tree: Any, start: Any, size: int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)

    def turn(i: Any, now: dict[str, Any], start: Any, size: int) -> dict[str, Any]:
        gradient, mu, nu = take(tuple(now.values()), start, size)
        turns = [
            None if t is None else t._replace(overlaps=take(t.overlaps, start, size))
            for t in (before, after)
        ]
        own = state._replace(mu={path: mu}, nu={path: nu})

        def change() -> tuple[Any, Any, Any]:
            usable = step._replace(usable=True)
            key_i = jax.random.fold_in(key, i)
            updates, new = _at_once(usable, {path: gradient}, own, key_i, *turns)
            return updates[path], new.mu[path], new.nu[path]

        # What a conditional is given has a buffer of its own. Else XLA slices again wherever it
        # needs the slice, and copies all that is overwritten to do so.
        part = jax.lax.cond(step.usable, change, lambda: (jnp.zeros_like(gradient), mu, nu))
        changed = dict(zip(now, part, strict=True))
        put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, 0)  # noqa: E731
        return jax.tree.map(put, now, changed)

    number, left = divmod(len(whole["gradients"]), size)
    now = jax.lax.fori_loop(0, number, lambda i, now: turn(i, now, i * size, size), whole)
    return turn(number, now, number * size, left) if left else now


def _of(turn: Turn | None, paths: Any) -> Turn | None:
    """The same change, for these leaves."""
    if turn is None:
        return None
    overlaps = {path: c for path, c in turn.overlaps.items() if path in paths}
    return turn._replace(overlaps=overlaps)


def _only(state: Any, paths: Any) -> Any:
    """Adam's state for these leaves."""
    mu, nu = ({path: tree[path] for path in paths} for tree in (state.mu, state.nu))
    return state._replace(mu=mu, nu=nu)
