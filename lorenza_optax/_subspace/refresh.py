"""When the subspaces are chosen anew."""

from __future__ import annotations

import jax

__all__ = ["is_due"]


def is_due(
    count: jax.Array, last_refresh: jax.Array, update_proj_gap: int, warm_up: int = 1
) -> jax.Array:
    """Whether a multiple of T has come since the last refresh that succeeded.

    A refresh that failed (a gradient that was not finite) leaves ``last_refresh`` behind and so
    stays due, without a flag of its own; the ones after it keep to the multiples of T.

    Args:
      count: Updates made so far, int32.
      last_refresh: The count of the last successful refresh, -1 for none.
      update_proj_gap: The interval T, in updates.
      warm_up: So many updates at the beginning are all due: a subspace that is refreshed from
        sketches through the old one needs a few to settle.
    """
    due = count // update_proj_gap > last_refresh // update_proj_gap
    return due | ((count < warm_up) & (last_refresh < count))
