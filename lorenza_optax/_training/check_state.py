"""Whether what a checkpoint holds is the state of an optimizer, before it is restored."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._base.paths import shape_differences
from lorenza_optax._low_rank.fit import OTHERWISE_MADE, said

__all__ = ["check_state"]

SHOWN = 8  # differences that a message lists


def check_state(tx: optax.GradientTransformation, params: Any, stored: Any) -> None:
    """Raises unless a stored state is one of this optimizer for these parameters.

    ``update`` raises too if it is given a state with other arrays than it needs. But checkpoint
    libraries refuse some such states when they restore them, and then do not say which array
    differs, and why; this function compares shapes alone, without reading any array.

    Args:
      tx: Any Optax transformation.
      params: The parameters, or their ``jax.eval_shape``.
      stored: What is stored in the place of the state: the metadata of an Orbax checkpoint
        (``checkpointer.metadata(path).item_metadata.tree["opt_state"]``), the state dict of
        flax.serialization (``msgpack_restore(data)["opt_state"]``), or a state.

    Returns:
      Nothing.

    Raises:
      ValueError: If arrays are missing, left over, or of another shape; it lists them.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> stored = lorenza_optax.lorenza(1e-2, rank=2, rho=0.0).init(params)
      >>> tx = lorenza_optax.lorenza(1e-2, rank=4, rho=0.0)
      >>> try:
      ...     lorenza_optax.check_state(tx, params, stored)
      ... except ValueError as error:
      ...     print(*str(error).splitlines()[:-1], sep=chr(10))
      The stored state is not one of this optimizer for these parameters:
        0/projected/mu/kernel: stored (2, 16), needed (4, 16)
        0/projected/nu/kernel: stored (2, 16), needed (4, 16)
        0/r/kernel: stored (2, 8), needed (4, 8)
    """
    different = sorted(shape_differences(jax.eval_shape(tx.init, params), stored))
    if not different:
        return
    lines = [
        f"  {name}: stored {said(then)}, needed {said(now)}"
        for name, now, then in different[:SHOWN]
    ]
    if len(different) > SHOWN:
        lines.append(f"  and {len(different) - SHOWN} more")
    raise ValueError(
        "The stored state is not one of this optimizer for these parameters:\n"
        + "\n".join(lines)
        + f"\nIt was {OTHERWISE_MADE}."
    )
