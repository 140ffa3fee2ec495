"""The methods that pre-training compares, each with the six trials of its tuning.

All have two step sizes, one for the matrices that LORENZA projects and one for the other leaves:
the low-rank methods have them by their `scale`, Muon by its nature, and AdamW is given the same
freedom, for it is worth as much as many a method.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
import optax.contrib

import lorenza_optax
import optimizers
from lorenza_optax import methods

# Rates of embedding and norms (the head is one of the matrices): AdamW's and LORENZA's on the main
# job.
OTHERS = (5e-3, 2e-2)
FACTOR = 2.5  # between the three rates of the matrices


class Method(NamedTuple):
    """`build(settings, **arguments)` gives updates at a rate of 1; `middle` is the matrices'.

    `smallest` is the middle for the smallest Llama, where that differs: if a grid does not hold the
    best rate between its ends, its middle is moved there, and all of the grid is run.
    """

    build: Callable
    middle: float
    passes: float = 3.0  # a step's cost in forward passes
    call: Callable = optimizers.call_with_value_fn
    smallest: float | None = None

    def trials(self, is_smallest):
        """(rate of the matrices, rate of the others) of each trial."""
        middle = self.smallest if is_smallest and self.smallest else self.middle
        rates = [float(f"{middle * FACTOR**i:.3g}") for i in (-1, 0, 1)]
        return list(itertools.product(rates, OTHERS))


def _adam(settings):
    return optax.scale_by_adam()


def _unscaled(build):
    """Of what has a learning rate: updates as `scale_by_*` gives them, uphill."""
    return lambda settings, **arguments: optax.chain(
        build(settings, learning_rate=1.0, **arguments), optax.scale(-1.0)
    )


def _muon(settings, learning_rate):
    def same_matrices(params):
        return _where(params, optax.contrib.MuonDimensionNumbers(), None)

    return optax.contrib.muon(learning_rate, muon_weight_dimension_numbers=same_matrices)


def _low_rank(factory, **own):
    def build(settings, **arguments):
        shared = {"rank": settings.rank, "scale": 1.0, "seed": settings.seed}
        return factory(**{**shared, **own, **arguments})

    return build


def _at_intervals(factory, **own):
    """Of those that refresh at every T-th step."""
    build = _low_rank(factory, **own)
    return lambda settings, **arguments: build(
        settings, **{"update_proj_gap": settings.update_proj_gap, **arguments}
    )


def _perturbed(factory, **own):
    """Of those that take the gradient at an ascent point."""
    build = _at_intervals(factory, **own)
    return lambda settings, **arguments: build(settings, **{"rho": settings.rho, **arguments})


def _lotus(settings, **arguments):
    return _low_rank(methods.scale_by_lotus)(
        settings, **{**optimizers.quick_lotus(settings), **arguments}
    )


def _where(params, yes, no):
    plan = lorenza_optax.projection_plan(params, rank=1)
    leaves = [yes if path in plan.projected else no for path in plan.leaves]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _squares_transposed(params):
    """Squares as PyTorch holds them, so that "std" compresses the outputs of our kernels."""
    usual = lorenza_optax.WeightDimensionNumbers()
    transposed = lorenza_optax.WeightDimensionNumbers(reduction_axis=1, output_axis=0)
    chosen = _where(params, usual, None)
    return jax.tree.map(
        lambda leaf, numbers: transposed if numbers and len(set(leaf.shape)) == 1 else numbers,
        params, chosen,
    )  # fmt: skip


NUMBERS = {"squares_transposed": _squares_transposed}  # by the name that a cell holds


def transformation(method, settings, matrices, others, unit, arguments) -> Any:
    """The whole optimizer: `unit` is the schedule for a peak of 1; rates may be traced."""
    if "weight_dimension_numbers" in arguments:
        numbers = NUMBERS[arguments["weight_dimension_numbers"]]
        arguments = {**arguments, "weight_dimension_numbers": numbers}
    return optax.chain(
        METHODS[method].build(settings, **arguments),
        optax.masked(optax.scale(matrices / others), lambda params: _where(params, True, False)),
        optax.add_decayed_weights(optimizers.WEIGHT_DECAY),
        optax.scale_by_learning_rate(lambda count: others * unit(count)),
    )


METHODS = {
    "adamw": Method(_adam, 3e-3, call=optimizers.call_with_gradient, smallest=7.5e-3),
    "galore": Method(_at_intervals(methods.scale_by_galore), 1e-2, smallest=2.5e-2),
    "fira": Method(_at_intervals(methods.scale_by_fira), 1e-2),
    "lotus": Method(_lotus, 1e-2),
    "lorenza": Method(_perturbed(lorenza_optax.scale_by_lorenza), 1e-2, passes=5),
    "lorenza_subspace": Method(
        _perturbed(lorenza_optax.scale_by_lorenza, ascent="subspace"), 1e-2, passes=5
    ),
    "lorenza_plus": Method(_unscaled(_perturbed(lorenza_optax.lorenza_plus)), 1e-2, passes=5),
    "muon": Method(_unscaled(_muon), 2e-2, call=optimizers.call_with_gradient),
}
