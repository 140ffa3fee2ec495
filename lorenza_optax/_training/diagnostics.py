"""What an optimizer is doing, as the scalars that a trainer logs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._perturbation.find import find_states

__all__ = ["diagnostics"]


def diagnostics(opt_state: Any) -> dict[str, jax.Array]:
    r"""The scalars of an optimizer's state that tell how training goes, to be logged.

    =================== ========================================================================
    value               loss at the perturbed point at the last update that took the gradient itself
                       and whose loss was finite: log skipped_steps beside it (a stage alone, SAM
                       or ZO-SAM, tells of any loss)
    ascent_norm         :math:`\lVert A \rVert`, the size of the slope that the ascent found; 0 in
                       steps without a perturbation
    perturbed           1 if the last update was made at a perturbed point, else 0
    captured_energy     share of the squared gradient that lay in the subspaces, 0 to 1: at the last
                       update with a full gradient, or at the last refresh from sketches
    subspace_overlap    share of the new subspaces that lay in the old ones at the last refresh,
                       :math:`\lVert P_{new}^\top P_{old} \rVert^2 / r`; near 1, T may be longer
    steps_since_refresh updates since the last refresh; 0 if the last one refreshed, -1 before any
    skipped_steps       updates that were skipped because the gradient was not finite
    =================== ========================================================================

    Gradients from :func:`perturbed_value_and_grad` and :func:`subspace_value_and_grad` change no
    state of the ascent: log the value that they return; the first three entries are 0 then.

    Args:
      opt_state: The state of an optimizer with :func:`lorenza`, :func:`adazo_sam`,
        :func:`zo_sam_perturbation` or one of ``lorenza_optax.methods`` anywhere in it; under
        ``jit`` too.

    Returns:
      A dict of scalars by name, without those that an optimizer does not have. If several states
      are found, each name has its place in front, such as
      ``"inner_states/matrices/inner_state/0/value"``.

    Raises:
      ValueError: If ``opt_state`` holds no state of this library.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.lorenza(1e-2, rank=4)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> loss = lambda params: jnp.sum(params["kernel"] ** 2)
      >>> _, state = tx.update(None, tx.init(params), params, value_fn=loss)
      >>> for name, scalar in lorenza_optax.diagnostics(state).items():
      ...     print(f"{name:20}{float(scalar):g}")
      value               128
      ascent_norm         0
      perturbed           0
      captured_energy     1
      subspace_overlap    0
      steps_since_refresh 0
      skipped_steps       0
    """
    states = find_states(opt_state)
    return {
        name if len(states) == 1 else f"{place}/{name}": scalar
        for place, state in states.items()
        for name, scalar in _scalars(state).items()
    }


def _scalars(state: Any) -> dict[str, jax.Array]:
    ascent = state.ascent
    scalars = {
        "value": ascent.value,
        "ascent_norm": ascent.ascent_norm,
        "perturbed": ascent.perturbed.astype(jnp.float32),
    }
    if not isinstance(state, LowRankState):
        return scalars
    if state.q or state.r:
        never = state.last_refresh < 0
        scalars |= {
            "captured_energy": state.captured_energy,
            "subspace_overlap": state.subspace_overlap,
            "steps_since_refresh": jnp.where(never, -1, state.count - 1 - state.last_refresh),
        }
    return scalars | {"skipped_steps": state.skipped}
