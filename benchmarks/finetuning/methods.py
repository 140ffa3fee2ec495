"""The methods that fine-tuning compares, each with the six trials of its tuning."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

import lorenza_optax
import optimizers
from lorenza_optax import methods

# GaLore's own for fine-tuning at rank 8, and the same for all that share its update, so that they
# differ in nothing but what they add to it. (The matrices' step relative to the other leaves'.)
SCALE = 2.0

# The design of the tuning: six trials for every method, at six learning rates a factor of 2 apart.
# Those with a radius take three rates at two radii each, round the rate that was tuned for the same
# method without perturbation: two grids that share no rate would compare rates, not perturbations.
# The middles are by a few pilots of AdamW and GaLore on parts of STS-B's and SST-2's train sets
# (GaLore on STS-B: Pearson's 0.56 at 1e-4, 0.72 at 3.5e-4, 0.50 at 1.4e-3), and by guess for the
# rest; RESULTS.md marks choices at the edge of a grid.
TRIALS = 6
ROUND = (-1, 0, 1)  # powers of the factor, of those three rates
FACTOR = 2.0
HELD_OUT = 512  # examples of the train set that score a trial: fewer would choose by luck
# SAM's ascent is fully felt at 0.01 to 0.05 (0.1 is past its best on a short MRPC run). A probe of
# one random direction is nearly blind, finds about 1 % of that ascent, and stands a longer step.
SEEING = (0.01, 0.05)
BLIND = (0.03, 0.1)


class Method(NamedTuple):
    """How a method trains, and where it is tuned.

    `split(params, rank, seed)` gives (what is trained, what is frozen) and `join` the params of
    both; `build(learning_rate, settings)` and `call` are as in optimizers.Entry. `passes` is what
    a step costs in forward passes, for estimates of time; `longer` how many times the epochs of
    the others it is trained; `factor` lies between its learning rates.
    """

    build: Callable
    middle: float | str  # the geometric middle of the learning rates, or whose tuned one that is
    radii: tuple[float, ...] = ()
    passes: float = 3.0
    call: Callable = optimizers.call_with_value_fn
    split: Callable = lambda params, rank, seed: (params, ())
    join: Callable = lambda trained, frozen: trained
    longer: int = 1
    factor: float = FACTOR

    def trials(self):
        """What each trial sets: learning_rate and rho, or rate_factor in place of the former."""
        if isinstance(self.middle, str):
            factors = [self.factor**power for power in ROUND]
            pairs = itertools.product(factors, self.radii)
            return [{"rate_factor": factor, "rho": rho} for factor, rho in pairs]
        lowest = self.middle * self.factor ** (-(TRIALS - 1) / 2)
        rates = [float(f"{lowest * self.factor**i:.3g}") for i in range(TRIALS)]
        return [{"learning_rate": rate, "rho": None} for rate in rates]


def lora_split(params, rank, seed):
    """Adapters of the matrices that LORENZA projects, and the head; the encoder is frozen."""
    plan = lorenza_optax.projection_plan(params, rank)
    shapes = {path: leaf.shape for path, leaf in _by_path(params).items() if path in plan.projected}
    adapters = {}
    for index, (path, (rows, columns)) in enumerate(sorted(shapes.items())):
        key = jax.random.fold_in(jax.random.key(seed), index)
        a_RxK = jax.random.normal(key, (rows, rank)) / math.sqrt(rows)
        adapters[path] = {"A": a_RxK, "B": jax.numpy.zeros((rank, columns))}
    frozen = dict(params)
    head = frozen.pop("head")
    return {"adapters": adapters, "head": head}, frozen


def lora_join(trained, frozen):
    """W + 2 A B: the factor is the usual alpha / rank, 16 / 8.

    The product is formed, which costs a copy of the weights and changes no result.
    """

    def adapted(path, leaf):
        pair = trained["adapters"].get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return leaf if pair is None else leaf + 2.0 * pair["A"] @ pair["B"]

    encoder = jax.tree_util.tree_map_with_path(adapted, frozen)
    return {**encoder, "head": trained["head"]}


def _by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _of(factory, **own) -> Callable[..., optax.GradientTransformation]:
    """At the run's rank, T and radius, with GaLore's scale; ablations give other arguments."""

    def build(learning_rate, settings, **arguments):
        chosen = {"scale": SCALE, "rho": settings.rho, **own, **arguments}
        entry = optimizers.of_family(factory, 0.0, 0.0, lambda settings: chosen)
        return entry.build(learning_rate, settings)

    return build


def _known(name):
    return optimizers.OPTIMIZERS[name].build


def _lozo(learning_rate, settings):
    """At its own rank and ν, and with embeddings among the matrices, as in the official code."""
    matrices = lorenza_optax.select_leaves(("kernel", "embedding"))
    arguments = {"rank": 2, "update_proj_gap": 50, "weight_dimension_numbers": matrices}
    entry = optimizers.of_family(methods.lozo, 0.0, 0.0, lambda settings: arguments)
    return entry.build(learning_rate, settings)


METHODS = {
    "adamw": Method(_known("adamw"), 1.8e-4, call=optimizers.call_with_gradient),
    "galore": Method(_of(methods.galore), 3.5e-4),
    "sam": Method(_known("sam"), "adamw", SEEING, passes=6),
    "lorenza_zo": Method(_of(lorenza_optax.lorenza, ascent="zo"), "galore", BLIND, passes=5),
    "lorenza_subspace": Method(
        _of(lorenza_optax.lorenza, ascent="subspace"), "galore", SEEING, passes=5
    ),
    "lora": Method(
        _known("adamw"),
        1.5e-3,
        call=optimizers.call_with_gradient,
        split=lora_split,
        join=lora_join,
    ),
    "fira": Method(_of(methods.fira), 2.5e-4),
    "vlorp": Method(_known("vlorp"), 1.8e-4),
    "adazo_sam": Method(_known("adazo_sam"), "adamw", BLIND, passes=5),
    "lorenza_plus": Method(_of(lorenza_optax.lorenza_plus), "fira", BLIND, passes=5),
    # Forward passes only: ten times the steps, and learning rates of which nobody knows the scale.
    "lozo": Method(_lozo, 3e-5, passes=2, longer=10, factor=4.0),
    "mezo": Method(_known("mezo"), 3e-5, passes=2, longer=10, factor=4.0),
}
# What is complete first.
FIRST = ("adamw", "galore", "sam", "lorenza_zo", "lorenza_subspace")
REST = ("lora", "fira", "lorenza_plus", "vlorp")
SLOW = ("adazo_sam",)  # its probes perturb the embedding, too
LONGER = ("lozo", "mezo")  # on a CPU MeZO's noise takes longer to draw than its passes
