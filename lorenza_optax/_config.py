"""The choice on each axis that makes a low-rank method, checked when it is made."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent import AscentConfig
from lorenza_optax._checks import (
    check_choice,
    check_dtype,
    check_int,
    check_not_injected,
    check_number,
    check_transformation,
)
from lorenza_optax._inner import (
    FIRST_MOMENTS,
    MOMENT_DTYPES,
    check_quantizable,
    check_sign,
    first_moment,
)
from lorenza_optax._matrix_view import PROJ_TYPES
from lorenza_optax._plan import ProjectionPlan, projection_plan
from lorenza_optax._residual import RESIDUALS
from lorenza_optax._selection import Rank, check_rank
from lorenza_optax._subspace import SUBSPACES
from lorenza_optax._transport import TRANSPORTS

__all__ = ["LowRankConfig"]

REFRESHES = ("sketch", "gradient")
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

    rank: Rank
    update_proj_gap: int
    inner: optax.GradientTransformationExtraArgs
    ascent: AscentConfig
    decays: tuple[Any, Any] | None = None
    in_full_space: bool = False
    subspace: str = "randomized_svd"
    proj_type: str = "std"
    refresh: str = "gradient"
    stagger: bool = False
    moment_transport: str = "keep"
    factored_updates: bool = False
    residual: str = "discard"
    scale: Any = 1.0
    gradient_transform: optax.GradientTransformation | None = None
    factor_dtype: Any = None
    moment_dtype: Any = None
    weight_dimension_numbers: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_int("update_proj_gap", self.update_proj_gap, 1)
        check_int("seed", self.seed, 0)
        check_choice("subspace", self.subspace, tuple(SUBSPACES))
        check_choice("proj_type", self.proj_type, PROJ_TYPES)
        check_choice("moment_transport", self.moment_transport, TRANSPORTS)
        check_choice("residual", self.residual, tuple(RESIDUALS))
        check_choice("refresh", self.refresh, REFRESHES)
        check_choice("stagger", self.stagger, (False, True))
        check_choice("factored_updates", self.factored_updates, (False, True))
        if self.stagger and self.refresh == "sketch":
            raise ValueError(
                "stagger=True spreads refreshes from a full gradient: pass refresh='gradient' too."
                " A refresh from sketches is cheap for all leaves at once."
            )
        if self.stagger and self.moment_transport != "keep":
            raise ValueError(
                "stagger=True refreshes a few matrices at a time, and"
                f" moment_transport={self.moment_transport!r} acts on the inner state of all:"
                " use 'keep'."
            )
        if self.factored_updates and self.residual != "discard":
            raise ValueError(
                "factored_updates=True needs updates that lie in the subspace; the residual rule"
                f" {self.residual!r} adds what lies outside it."
            )
        self._check_first_moment()
        check_number("scale", self.scale)
        check_transformation("gradient_transform", self.gradient_transform)
        check_not_injected("weight_dimension_numbers", self.weight_dimension_numbers)
        check_dtype("factor_dtype", self.factor_dtype, FACTOR_DTYPES)
        check_dtype("moment_dtype", self.moment_dtype, MOMENT_DTYPES)
        check_sign(self.inner)
        if self.stored_moment_dtype() == jnp.int8:
            check_quantizable(self.inner)

    @property
    def needs_full_gradient(self) -> bool:
        """Whether a part of the gradient outside the subspace matters at every update."""
        return (
            self.in_full_space
            or self.residual != "discard"
            or self.gradient_transform is not None
            or self.stagger
        )

    @property
    def sketches(self) -> bool:
        """Whether refreshes inside ``update`` are from sketches."""
        return self.refresh == "sketch" and not self.needs_full_gradient

    def partner_rank(self, rank: int) -> int:
        """Rows of the factor K, which does not project, of a leaf; 0 where nothing needs it.

        Probes along Q diag(u) R need it, and a refresh from sketches is started from it, or
        else from the first moment.
        """
        if self.ascent.needs_partners:
            return min(rank, self.ascent.probe_rank or rank)
        return rank if self.sketches and not self.has_first_moment else 0

    @property
    def has_first_moment(self) -> bool:
        example = {"leaf": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
        try:
            state = jax.eval_shape(self.inner.init, example)
        except Exception:
            return False  # check_inner says at init what is wrong
        return first_moment(state) is not None

    def _check_first_moment(self) -> None:
        if self.ascent.needs_moments and not self.has_first_moment:
            factors = self.ascent.ascent == "zo"
            asked = "probe_factors='momentum'" if factors else f"ascent={self.ascent.ascent!r}"
            raise ValueError(
                f"{asked} needs a first moment, which the state of"
                f" base_optimizer does not have under any of the names {', '.join(FIRST_MOMENTS)}."
            )

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
