"""LORENZA and its family: low-rank, sharpness-aware training as Optax transformations.

The source, from the bottom up; a folder imports only from those before it:

- ``_base``, ``_linalg``: checks, paths, meshes and noise; decompositions of one matrix.
- ``_factored``: a loss at W + P N, without forming that, of the leaves that ``_plan`` chooses.
- The other axes of a low-rank method, of which each is a choice: ``_subspace``, ``_inner`` (the
  optimizer inside), ``_residual`` (what is outside) and ``_ascent``.
- ``_low_rank``: the one transformation that is made of them; ``_weight_norm`` and ``_layerwise``
  are two round it.
- ``_lorenza.py``, ``_lorenza_plus.py`` and ``methods``: the named methods.
- ``_perturbation``, ``_training``: ascents round any optimizer; what a training loop needs besides.
- ``_memory``, ``memory.py``: the memory report. ``flax.py``: helpers for linen and NNX.
"""

from lorenza_optax import methods
from lorenza_optax._ascent.gradient import SubspaceGradients
from lorenza_optax._linalg.decompositions import randomized_svd
from lorenza_optax._lorenza import lorenza, scale_by_lorenza
from lorenza_optax._lorenza_plus import lorenza_plus
from lorenza_optax._low_rank.arguments import STRUCTURAL_ARGS, structural_args
from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._low_rank.update import LowRankUpdate, apply_updates
from lorenza_optax._perturbation.momentum_sam import (
    MomentumSamState,
    momentum_sam,
    momentum_sam_eval_params,
)
from lorenza_optax._perturbation.perturbed import perturbed_value_and_grad
from lorenza_optax._perturbation.zo_sam import ZoSamState, adazo_sam, zo_sam_perturbation
from lorenza_optax._plan.matrix_view import WeightDimensionNumbers
from lorenza_optax._plan.plan import ProjectionPlan, projection_plan
from lorenza_optax._plan.selection import select_leaves
from lorenza_optax._training.check_state import check_state
from lorenza_optax._training.diagnostics import diagnostics
from lorenza_optax._training.shardings import state_shardings
from lorenza_optax._training.subspace_gradients import subspace_value_and_grad

__all__ = [
    "STRUCTURAL_ARGS",
    "LowRankState",
    "LowRankUpdate",
    "MomentumSamState",
    "ProjectionPlan",
    "SubspaceGradients",
    "WeightDimensionNumbers",
    "ZoSamState",
    "adazo_sam",
    "apply_updates",
    "check_state",
    "diagnostics",
    "lorenza",
    "lorenza_plus",
    "methods",
    "momentum_sam",
    "momentum_sam_eval_params",
    "perturbed_value_and_grad",
    "projection_plan",
    "randomized_svd",
    "scale_by_lorenza",
    "select_leaves",
    "state_shardings",
    "structural_args",
    "subspace_value_and_grad",
    "zo_sam_perturbation",
]
