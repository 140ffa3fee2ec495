"""LORENZA and its family: low-rank, sharpness-aware training as Optax transformations."""

from lorenza_optax import methods
from lorenza_optax._arguments import STRUCTURAL_ARGS, structural_args
from lorenza_optax._check_state import check_state
from lorenza_optax._diagnostics import diagnostics
from lorenza_optax._gradient import SubspaceGradients
from lorenza_optax._linalg import randomized_svd
from lorenza_optax._lorenza import lorenza, scale_by_lorenza
from lorenza_optax._lorenza_plus import lorenza_plus
from lorenza_optax._matrix_view import WeightDimensionNumbers
from lorenza_optax._momentum_sam import (
    MomentumSamState,
    momentum_sam,
    momentum_sam_eval_params,
)
from lorenza_optax._perturbed import perturbed_value_and_grad
from lorenza_optax._plan import ProjectionPlan, projection_plan
from lorenza_optax._selection import select_leaves
from lorenza_optax._shardings import state_shardings
from lorenza_optax._state import LowRankState
from lorenza_optax._subspace_gradients import subspace_value_and_grad
from lorenza_optax._update import LowRankUpdate, apply_updates
from lorenza_optax._zo_sam import ZoSamState, adazo_sam, zo_sam_perturbation

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
