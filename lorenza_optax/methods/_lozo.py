"""LOZO and LOZO-M: zeroth order along low-rank directions of which one factor is kept."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorenza_optax._compose import by_forward_passes, with_learning_rate, without_learning_rate
from lorenza_optax._config import Coordinates
from lorenza_optax._selection import Rank

__all__ = ["lozo", "lozo_m", "scale_by_lozo", "scale_by_lozo_m"]


def lozo(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 2,
    update_proj_gap: int = 50,
    *,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    estimator: str = "central",
    divide_by_rank: bool = True,
    scale: optax.ScalarOrSchedule = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    proj_type: str = "std",
    factored_updates: bool = False,
    weight_dimension_numbers: Any = None,
    probe_batch_size: int | None = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""x"""
    return with_learning_rate(_build, **locals())


def lozo_m(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 2,
    update_proj_gap: int = 50,
    *,
    momentum: jax.typing.ArrayLike = 0.9,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    estimator: str = "central",
    divide_by_rank: bool = True,
    scale: optax.ScalarOrSchedule = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    proj_type: str = "std",
    factored_updates: bool = False,
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    probe_batch_size: int | None = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""x"""
    return with_learning_rate(_build, **locals())


def _build(
    divide_by_rank: bool, momentum: Any = None, **axes: Any
) -> optax.GradientTransformationExtraArgs:
    coordinates = Coordinates(
        of_normal=lambda normal, *_: normal,
        shape=lambda leaf: leaf.low_rank_shape,
        weight=lambda leaf: 1 / leaf.rank if divide_by_rank else 1.0,
    )
    inner = optax.identity()
    if momentum is not None:
        inner, axes["moment_transport"] = optax.ema(momentum, debias=False), "rotate"
    return by_forward_passes(inner, subspace="unit_gaussian", coordinates=coordinates, **axes)


scale_by_lozo = without_learning_rate(lozo, _build)
scale_by_lozo_m = without_learning_rate(lozo_m, _build)
