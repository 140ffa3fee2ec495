"""The choice on each axis that makes a low-rank method, checked when it is made."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from lorenza_optax._ascent import AscentConfig
from lorenza_optax._checks import (
    check_choice,
    check_float_dtype,
    check_int,
    check_not_injected,
    check_number,
    check_transformation,
)
from lorenza_optax._inner import MOMENT_DTYPES, check_sign
from lorenza_optax._matrix_view import PROJ_TYPES
from lorenza_optax._plan import ProjectionPlan, projection_plan
from lorenza_optax._residual import RESIDUALS
from lorenza_optax._subspace import SUBSPACES
from lorenza_optax._transport import TRANSPORTS

__all__ = ["LowRankConfig"]

FACTOR_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LowRankConfig:
    """A low-rank method. Arguments of the same name are documented in :func:`lorenza`.

    Attributes:
      inner: The optimizer of the low-rank gradients, and of the other leaves.
      decays: (β₁, β₂) where ``inner`` is known to be Adam, for ``moment_transport="rotate"``.
      in_full_space: Project nothing, and look for the ascent in all parameters.
      residual: What happens outside the subspace, a name in ``RESIDUALS``.
    """

    rank: int
    update_proj_gap: int
    inner: optax.GradientTransformationExtraArgs
    ascent: AscentConfig
    decays: tuple[Any, Any] | None = None
    in_full_space: bool = False
    subspace: str = "randomized_svd"
    proj_type: str = "std"
    moment_transport: str = "keep"
    residual: str = "discard"
    scale: Any = 1.0
    gradient_transform: optax.GradientTransformation | None = None
    factor_dtype: Any = None
    moment_dtype: Any = None
    weight_dimension_numbers: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_int("update_proj_gap", self.update_proj_gap, 1)
        check_int("seed", self.seed, 0)
        check_choice("subspace", self.subspace, tuple(SUBSPACES))
        check_choice("proj_type", self.proj_type, PROJ_TYPES)
        check_choice("moment_transport", self.moment_transport, TRANSPORTS)
        check_choice("residual", self.residual, tuple(RESIDUALS))
        check_number("scale", self.scale)
        check_transformation("gradient_transform", self.gradient_transform)
        check_not_injected("weight_dimension_numbers", self.weight_dimension_numbers)
        check_float_dtype("factor_dtype", self.factor_dtype, FACTOR_DTYPES)
        check_float_dtype("moment_dtype", self.moment_dtype, MOMENT_DTYPES)
        check_sign(self.inner)

    @property
    def stores_both_factors(self) -> bool:
        """R (or Q, where the right side is compressed) serves the ascent only."""
        return not self.ascent.never_perturbs

    def stored_moment_dtype(self) -> jnp.dtype | None:
        return None if self.moment_dtype is None else jnp.dtype(self.moment_dtype)

    def plan(self, tree: Any) -> ProjectionPlan:
        """The plan for parameters or gradients; the same for both."""
        if self.in_full_space:
            return projection_plan(tree, self.rank, weight_dimension_numbers=lambda tree: {})
        return projection_plan(
            tree,
            self.rank,
            proj_type=self.proj_type,
            weight_dimension_numbers=self.weight_dimension_numbers,
        )
