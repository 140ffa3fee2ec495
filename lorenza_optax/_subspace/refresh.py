"""When the subspaces are chosen anew."""

from __future__ import annotations

import jax

__all__ = ["is_due", "lacking_at"]


def is_due(
    count: jax.Array,
    last_refresh: jax.Array,
    update_proj_gap: int,
    warm_up: int = 1,
    skipped: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """Whether a multiple of T has come since the last refresh that succeeded.

    A refresh that failed (a gradient that was not finite) leaves ``last_refresh`` behind and so
    stays due, without a flag of its own; the ones after it keep to the multiples of T.

    Args:
      count: Updates made so far, int32.
      last_refresh: The count of the last successful refresh, negative for none.
      update_proj_gap: The interval T, in updates.
      warm_up: So many updates at the beginning are all due: a subspace that is refreshed from
        sketches through the old one needs a few to settle.
      skipped: Updates that were skipped, which are none of those.
    """
    due = count // update_proj_gap > last_refresh // update_proj_gap
    return due | ((count - skipped < warm_up) & (last_refresh < count))


def lacking_at(count: jax.Array) -> jax.Array:
    """``last_refresh`` after a first refresh that found no directions for some matrices.

    It stays due, but in a later update: all gradients of a sum are in one basis.
    """
    return -2 - count
