"""ZO-Muon: a zeroth-order gradient in a random subspace, orthogonalized there."""

from __future__ import annotations

from typing import Any

import optax

from lorenza_optax._compose import by_forward_passes, with_learning_rate, without_learning_rate
from lorenza_optax._config import Coordinates
from lorenza_optax._inner_rules import orthogonalize
from lorenza_optax._selection import Rank

__all__ = ["scale_by_zo_muon", "zo_muon"]


def zo_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 64,
    update_proj_gap: int = 100,
    *,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 4,
    estimator: str = "forward",
    others_scale: float = 1e-5,
    scale: optax.ScalarOrSchedule = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    proj_type: str = "std",
    factored_updates: bool = False,
    factor_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    probe_batch_size: int | None = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""x"""
    return with_learning_rate(_build, **locals())


def _build(others_scale: float, **axes: Any) -> optax.GradientTransformationExtraArgs:
    coordinates = Coordinates(
        of_normal=lambda normal, *_: normal,
        shape=lambda leaf: leaf.low_rank_shape,
        weight=lambda leaf: 1.0,
    )
    return by_forward_passes(
        orthogonalize(),
        inner_others=optax.scale(others_scale),
        subspace="orthonormal",
        coordinates=coordinates,
        **axes,
    )


scale_by_zo_muon = without_learning_rate(zo_muon, _build)
