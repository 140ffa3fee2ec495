"""The optimizers that the training programs compare: how each is made and called."""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
import optax.contrib

import lorenza_optax
from lorenza_optax import methods

# Of the projected matrices' updates in the LORENZA family: those do best at a smaller step than
# the embedding and the norms, which run Adam in full.
SCALE = 0.5
WEIGHT_DECAY = 0.01
WARMUP_SHARE = 0.1  # of all steps
FINAL_SHARE = 0.1  # the cosine ends at so much of the peak


class Settings(NamedTuple):
    rank: int
    update_proj_gap: int
    rho: float
    seed: int


def learning_rate_schedule(peak, steps):
    """Linear warm-up, then a cosine: the same shape for every optimizer."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=max(1, round(WARMUP_SHARE * steps)),
        decay_steps=max(2, steps),
        end_value=FINAL_SHARE * peak,
    )


def lorenza(learning_rate, settings, factory=lorenza_optax.lorenza):
    return factory(
        learning_rate,
        settings.rank,
        settings.update_proj_gap,
        rho=settings.rho,
        scale=SCALE,
        weight_decay=WEIGHT_DECAY,
        seed=settings.seed,
    )


def lorenza_plus(learning_rate, settings):
    return lorenza(learning_rate, settings, lorenza_optax.lorenza_plus)


def adazo_sam(learning_rate, settings):
    return lorenza_optax.adazo_sam(
        learning_rate, rho=settings.rho, weight_decay=WEIGHT_DECAY, seed=settings.seed
    )


def adamw(learning_rate, settings):
    del settings
    return optax.adamw(learning_rate, weight_decay=WEIGHT_DECAY)


def _projected(params, rank, numbers):
    """A tree with the numbers where LORENZA projects, and None elsewhere."""
    plan = lorenza_optax.projection_plan(params, rank)
    leaves = [numbers if path in plan.projected else None for path in plan.leaves]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def optax_galore(learning_rate, settings):
    def same_matrices(params):
        """Those that LORENZA projects; of itself galore projects the embedding too."""
        return _projected(params, settings.rank, optax.contrib.GaLoreDimensionNumbers())

    return optax.contrib.galore(
        learning_rate,
        settings.rank,
        settings.update_proj_gap,
        weight_decay=WEIGHT_DECAY,
        weight_dimension_numbers=same_matrices,
    )


def optax_sam(learning_rate, settings):
    """SAM round AdamW: the ascent step is a normalized gradient step of length rho."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(settings.rho))
    return optax.contrib.sam(adamw(learning_rate, settings), ascent, opaque_mode=True)


# The three ways to call `update`. Each takes (tx, loss, params, opt_state, batch), where
# `loss(params, batch)` is a scalar, and returns (value of the loss, updates, opt_state).


def call_with_value_fn(tx, loss, params, opt_state, batch):
    """The transformation takes the gradient itself, at the point it perturbs to."""
    updates, opt_state = tx.update(None, opt_state, params, value_fn=loss, batch=batch)
    # Moments have the parameters' names, and attention has a `value` too: only scalars. OwLore has
    # two states, with the same value in both.
    (_, value), *_ = optax.tree.get_all_with_path(opt_state, "value", filtering=_is_scalar)
    return value, updates, opt_state


def _is_scalar(path, value):
    del path
    return getattr(value, "shape", None) == ()


def call_with_gradient(tx, loss, params, opt_state, batch):
    value, gradient = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = tx.update(gradient, opt_state, params)
    return value, updates, opt_state


def call_with_grad_fn(tx, loss, params, opt_state, batch):
    """`optax.contrib.sam`: the gradient here, and a function for the one at the ascent point."""
    value, gradient = jax.value_and_grad(loss)(params, batch)

    def gradient_at(perturbed, adversarial_step):
        del adversarial_step
        return jax.grad(loss)(perturbed, batch)

    updates, opt_state = tx.update(gradient, opt_state, params, grad_fn=gradient_at)
    return value, updates, opt_state


class Entry(NamedTuple):
    """An optimizer, how it is called, and its peak learning rates.

    Those of pre-training are the best of benchmarks/pretrain_tuning.py and benchmarks/family on
    the default run, those of fine-tuning are guesses; `--lr` overrides them for all of a run.
    """

    build: Callable  # (learning_rate, settings) -> optax.GradientTransformation
    call: Callable  # one of the three above
    perturbs: bool  # holds a second, perturbed copy of the weights during a step
    pretraining: float
    fine_tuning: float


def of_family(factory, pretraining, fine_tuning, arguments=lambda settings: {}):
    """A method of `lorenza_optax.methods` at the run's rank and T, or what `arguments` says."""

    def build(learning_rate, settings):
        chosen = {
            "rank": settings.rank,
            "update_proj_gap": settings.update_proj_gap,
            "weight_decay": WEIGHT_DECAY,
            "seed": settings.seed,
            **arguments(settings),
        }
        known = inspect.signature(factory).parameters
        return factory(learning_rate, **{k: v for k, v in chosen.items() if k in known})

    return Entry(build, call_with_value_fn, False, pretraining, fine_tuning)


def behind(stage, pretraining, fine_tuning):
    """AdamW behind a chain stage that takes the gradient at an ascent point."""

    def build(learning_rate, settings):
        return optax.chain(stage(settings), adamw(learning_rate, settings))

    return Entry(build, call_with_value_fn, True, pretraining, fine_tuning)


def cut(settings):
    """VLoRP's c and r for a budget of `rank` numbers a row."""

    def same_matrices(params):
        """Those that LORENZA projects: a head of two columns cannot be cut to pieces."""
        return _projected(params, settings.rank, lorenza_optax.WeightDimensionNumbers())

    granularity = math.gcd(settings.rank, 16)
    return {
        "granularity": granularity,
        "rank": settings.rank // granularity,
        "weight_dimension_numbers": same_matrices,
    }


def quick_lotus(settings):
    """Lotus's test as often as others refresh: its own η = 50 is for long runs."""
    return {"check_every": settings.update_proj_gap, "threshold": 0.5 / settings.update_proj_gap}


OPTIMIZERS = {
    "lorenza": Entry(lorenza, call_with_value_fn, True, 2e-2, 1e-3),
    "lorenza_plus": Entry(lorenza_plus, call_with_value_fn, True, 2e-2, 1e-3),
    "adazo_sam": Entry(adazo_sam, call_with_value_fn, True, 3e-3, 1e-4),
    "adamw": Entry(adamw, call_with_gradient, False, 3e-3, 1e-4),
    "optax_galore": Entry(optax_galore, call_with_gradient, False, 1e-2, 5e-4),
    "optax_sam": Entry(optax_sam, call_with_grad_fn, True, 3e-3, 1e-4),
    "sam": behind(lambda s: methods.sam(s.rho), 3e-3, 1e-4),
    "asam": behind(lambda s: methods.asam(10 * s.rho), 3e-3, 1e-4),
    "galore": of_family(methods.galore, 1.7e-2, 1e-3),
    "fira": of_family(methods.fira, 2e-2, 1e-3),
    "apollo": of_family(methods.apollo, 1e-2, 1e-4),
    "vlorp": of_family(methods.vlorp, 1.5e-2, 1e-4, cut),
    "projfactor": of_family(methods.projfactor, 1e-2, 2e-4),
    "flora": of_family(methods.flora, 3e-2, 3e-3),
    "lotus": of_family(methods.lotus, 1.7e-2, 1e-3, quick_lotus),
    "gradnormlorp": of_family(methods.gradnormlorp, 2e-2, 1e-3),
    "gum": of_family(methods.gum, 6e-2, 1e-3),
    "cosmos": of_family(methods.cosmos, 2e-2, 1e-3),
    "owlore": of_family(
        methods.owlore, 1e-2, 3e-4, lambda s: {"num_layers": 2, "sampling_interval": 20}
    ),
    "mezo": of_family(methods.mezo, 2.7e-4, 1e-6),
    "lozo": of_family(methods.lozo, 3e-4, 1e-6, lambda s: {"rank": 2}),
    "lozo_m": of_family(methods.lozo_m, 9e-4, 1e-6, lambda s: {"rank": 2}),
    "subzero": of_family(methods.subzero, 8e-4, 1e-6, lambda s: {"rank": min(s.rank, 24)}),
    "zo_muon": of_family(methods.zo_muon, 0.8, 1e-3, lambda s: {"others_scale": 1e-2}),
}


def diagnostics(opt_state):
    """What LORENZA and its family say of a step; nothing of other optimizers."""
    try:
        return lorenza_optax.diagnostics(opt_state)
    except ValueError:
        return {}
