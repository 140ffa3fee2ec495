"""The choice on each axis that makes a low-rank method, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent.ascent import AscentConfig
from lorenza_optax._base.checks import (
    check_choice,
    check_constant,
    check_dtype,
    check_int,
    check_not_injected,
    check_number,
    check_transformation,
)
from lorenza_optax._inner.inner import (
    FIRST_MOMENTS,
    MOMENT_DTYPES,
    check_quantizable,
    check_sign,
    first_moment,
)
from lorenza_optax._inner.transport import TRANSPORTS
from lorenza_optax._plan.matrix_view import PROJ_TYPES
from lorenza_optax._plan.plan import LeafPlan, ProjectionPlan, projection_plan
from lorenza_optax._plan.selection import Rank, check_rank
from lorenza_optax._residual.residual import DISCARD, Residual
from lorenza_optax._subspace.subspace import RANDOM

__all__ = ["Coordinates", "Displacement", "LowRankConfig"]

REFRESHES = ("sketch", "gradient")
FACTOR_DTYPES = ("float64", "float32", "bfloat16", "float16")


class Coordinates(NamedTuple):
    """How a zeroth-order method draws N of its directions P N.

    Attributes:
      of_normal: (normal, partner K, leaf) -> N ([b,] r, l).
      shape: leaf -> the shape of the normal numbers that N is made of.
      weight: leaf -> factor of the estimated gradient Σ d_j N_j / q.
      needs_partner: Whether there is a second factor K ([b,] r, l) with orthonormal rows.
      others_factor: What the optimizer of the other leaves multiplies their gradients with; None
        where it does something else.
    """

    of_normal: Callable[[jax.Array, Any, LeafPlan], jax.Array]
    shape: Callable[[LeafPlan], tuple[int, ...]]
    weight: Callable[[LeafPlan], float]
    needs_partner: bool = False
    others_factor: float | None = None


class Displacement(NamedTuple):
    """Lotus's rule for refreshes: see :func:`lorenza_optax.methods.lotus`.

    Attributes:
      check_every: η, in updates since the matrix's last refresh.
      threshold: γ.
    """

    check_every: int
    threshold: float


@dataclasses.dataclass(frozen=True)
class LowRankConfig:
    """A low-rank method. Arguments of the same name are documented in :func:`lorenza`.

    Attributes:
      inner: The optimizer of the low-rank gradients, and of the other leaves.
      decays: (β₁, β₂) where ``inner`` is known to be Adam, for ``moment_transport="rotate"``.
      inner_others: The optimizer of the other leaves where that is another one.
      in_full_space: Project nothing, and look for the ascent in all parameters.
      residual: What happens outside the subspace.
      displacement: Refreshes by Lotus's rule instead of every ``update_proj_gap`` updates.
      power_decay: β of ``subspace="power_iteration"``.
      granularity: VLoRP's c.
      zeroth_order: Take the gradient by forward passes along random directions; μ and the number
        and kind of probes are those of ``ascent``.
      prefers_given: Take the gradient from ``value_fn`` only where none is given.
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
    residual: Residual = DISCARD
    inner_others: optax.GradientTransformationExtraArgs | None = None
    displacement: Displacement | None = None
    power_decay: Any = None
    granularity: float = 1
    zeroth_order: Coordinates | None = None
    prefers_given: bool = False
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
        check_choice("proj_type", self.proj_type, PROJ_TYPES)
        check_choice("moment_transport", self.moment_transport, TRANSPORTS)
        check_choice("refresh", self.refresh, REFRESHES)
        check_choice("stagger", self.stagger, (False, True))
        check_choice("factored_updates", self.factored_updates, (False, True))
        if self.stagger and self.refresh == "sketch":
            raise ValueError(
                "stagger=True spreads refreshes from a full gradient: pass refresh='gradient' too."
                " A refresh from sketches is cheap for all leaves at once."
            )
        if self.gradient_transform is not None and self.refresh == "sketch":
            raise ValueError(
                "gradient_transform takes the full gradient at every update, and refresh='sketch'"
                " is there to form none: pass refresh='gradient' too."
            )
        if self.stagger and self.moment_transport != "keep":
            raise ValueError(
                "stagger=True refreshes a few matrices at a time, and"
                f" moment_transport={self.moment_transport!r} acts on the inner state of all:"
                " use 'keep'."
            )
        if self.factored_updates and self.residual is not DISCARD:
            raise ValueError(
                "factored_updates=True needs updates that lie in the subspace; this method's do"
                " not."
            )
        if self.residual.needs_orthonormal and not self.is_orthonormal:
            raise ValueError(
                f"subspace={self.subspace!r} has no complement: this method needs orthonormal"
                " projectors."
            )
        self._check_first_moment()
        check_number("scale", self.scale)
        check_not_injected("granularity", self.granularity)
        check_constant("granularity", self.granularity, 2**-16)
        check_transformation("gradient_transform", self.gradient_transform)
        check_not_injected("weight_dimension_numbers", self.weight_dimension_numbers)
        check_dtype("factor_dtype", self.factor_dtype, FACTOR_DTYPES)
        check_dtype("moment_dtype", self.moment_dtype, MOMENT_DTYPES)
        check_sign(self.inner)
        if self.inner_others is not None:
            check_sign(self.inner_others)
        if self.stored_moment_dtype() == jnp.int8:
            check_quantizable(self.inner)

    @property
    def looks_outside(self) -> bool:
        """Whether a part of the gradient outside the subspace matters at every update."""
        return (
            self.in_full_space
            or self.residual.needs_gradient
            or self.gradient_transform is not None
            or self.stagger
            or self.displacement is not None
        )

    def check_accumulates(self) -> None:
        """Raises if gradients in the subspaces are not enough for an update."""
        if self.looks_outside:
            raise ValueError(
                "This method needs the full gradient at every update, because of its rule for what"
                " is outside the subspace, of gradient_transform, stagger or displacement. Sum full"
                " gradients instead, of jax.value_and_grad or perturbed_value_and_grad, or use"
                " optax.MultiSteps."
            )

    @property
    def needs_full_gradient(self) -> bool:
        """Whether for that, or because its vectors are cut to pieces, all of it is formed."""
        return self.looks_outside or self.granularity != 1

    @property
    def others_inner(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer of leaves that are not projected."""
        return self.inner if self.inner_others is None else self.inner_others

    @property
    def keeps_noise(self) -> bool:
        """Whether updates of leaves that are not projected are left as keys and weights."""
        estimated = self.zeroth_order
        linear = estimated is not None and estimated.others_factor is not None
        return self.factored_updates and linear

    @property
    def is_orthonormal(self) -> bool:
        """Whether Pᵀ P = I."""
        return self.subspace not in RANDOM or RANDOM[self.subspace].is_orthonormal

    @property
    def keeps_projectors(self) -> bool:
        """Whether the projectors are in the state, and not drawn again at each update."""
        return self.subspace not in RANDOM or RANDOM[self.subspace].is_kept

    @property
    def sketches(self) -> bool:
        """Whether refreshes inside ``update`` are from sketches."""
        return self.refresh == "sketch" and not self.needs_full_gradient

    def partner_rank(self, rank: int) -> int:
        """Rows of the factor K, which does not project, of a leaf; 0 where nothing needs it.

        Probes along Q diag(u) R need it, and a refresh from sketches is started from it, or
        else from the first moment.
        """
        if self.zeroth_order is not None:
            return rank if self.zeroth_order.needs_partner else 0
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
            granularity=self.granularity,
        )
