"""SubZero: zeroth order in subspaces with two orthonormal random factors."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from lorenza_optax._compose import by_forward_passes, with_learning_rate, without_learning_rate
from lorenza_optax._config import Coordinates
from lorenza_optax._linalg import matmul
from lorenza_optax._plan import LeafPlan
from lorenza_optax._selection import Rank

__all__ = ["scale_by_subzero", "subzero"]


def subzero(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 64,
    update_proj_gap: int = 1000,
    *,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    estimator: str = "central",
    normalize: bool = True,
    scale: optax.ScalarOrSchedule = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    factored_updates: bool = False,
    factor_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    probe_batch_size: int | None = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""x"""
    return with_learning_rate(_build, **locals())


def _build(normalize: bool, **axes: Any) -> optax.GradientTransformationExtraArgs:
    def of_normal(normal: jax.Array, partner: jax.Array, leaf: LeafPlan) -> jax.Array:
        size = leaf.matrix.m * leaf.matrix.n
        s = math.sqrt(size) / leaf.rank if normalize else 1.0
        return matmul(s * normal, partner.astype(normal.dtype))

    coordinates = Coordinates(
        of_normal,
        shape=lambda leaf: (*leaf.matrix.batch, leaf.rank, leaf.rank),
        weight=lambda leaf: 1.0,
        needs_partner=True,
    )
    return by_forward_passes(
        optax.identity(), subspace="orthonormal", coordinates=coordinates, **axes
    )


scale_by_subzero = without_learning_rate(subzero, _build)
