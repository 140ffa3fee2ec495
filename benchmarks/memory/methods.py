"""The training methods whose memory is compared: how each is built, called and applied."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
import optax.contrib

import lorenza_optax
import optimizers
from benchmarks.memory import model
from lorenza_optax import methods

LEARNING_RATE = 1e-3
UPDATE_PROJ_GAP = 200


class Method(NamedTuple):
    """`build(rank, dtype of the weights)` gives the transformation; `call` as in optimizers.py."""

    name: str
    build: Callable
    call: Callable = optimizers.call_with_value_fn
    apply_updates: Callable = optax.apply_updates
    is_lora: bool = False
    has_rank: bool = True
    scanned: bool = True  # whether it knows stacks of matrices
    arguments: Callable | None = None  # of a low-rank one beside the rank, by the weights' dtype
    is_lorenza: bool = False  # built by `lorenza`, whose gradients the memory report counts


def _plain(name, build, call=optimizers.call_with_gradient, **fields):
    return Method(name, lambda rank, dtype: build(), call, has_rank=False, **fields)


def _low_rank(name, factory, embedding=False, moment_dtype=None, **arguments):
    """A method of the library, on the matrices of layers and head.

    Moments are kept in the weights' dtype, as Optax keeps AdamW's, unless another is named.
    """

    def chosen(dtype):
        matrices = functools.partial(model.matrices, embedding=embedding)
        own = {"moment_dtype": moment_dtype or dtype, "weight_dimension_numbers": matrices}
        return own | arguments

    def build(rank, dtype):
        return factory(LEARNING_RATE, rank, UPDATE_PROJ_GAP, **chosen(dtype))

    in_place = arguments.get("factored_updates", False)
    apply_updates = lorenza_optax.apply_updates if in_place else optax.apply_updates
    return Method(
        name, build, apply_updates=apply_updates, arguments=chosen,
        is_lorenza=factory is lorenza_optax.lorenza,
    )  # fmt: skip


def _int8_adamw(rank, dtype):
    """Adam in full with int8 moments: the library's own, for a method that projects nothing."""
    del rank, dtype
    nothing = lambda params: jax.tree.map(lambda leaf: None, params)  # noqa: E731
    return methods.galore(
        LEARNING_RATE, 1, UPDATE_PROJ_GAP, moment_dtype="int8", weight_dimension_numbers=nothing
    )


def _sam():
    return optax.chain(methods.sam(), optax.adamw(LEARNING_RATE))


def _optax_galore(rank, dtype):
    del dtype

    def numbers(params):
        chosen = model.matrices(params)
        ours = optax.contrib.GaLoreDimensionNumbers()
        is_leaf = lambda node: isinstance(node, lorenza_optax.WeightDimensionNumbers)  # noqa: E731
        return jax.tree.map(lambda _: ours, chosen, is_leaf=is_leaf)

    return optax.contrib.galore(
        LEARNING_RATE, rank, UPDATE_PROJ_GAP, weight_dimension_numbers=numbers
    )


SKETCH = {"refresh": "sketch", "factored_updates": True}
_lorenza = functools.partial(_low_rank, factory=lorenza_optax.lorenza)
METHODS = {
    "sgd": _plain("SGD", lambda: optax.sgd(LEARNING_RATE)),
    "adamw": _plain("AdamW", lambda: optax.adamw(LEARNING_RATE)),
    "adamw_int8": Method("AdamW (int8 moments)", _int8_adamw, optimizers.call_with_gradient,
                         has_rank=False),
    "adafactor": _plain("Adafactor", lambda: optax.adafactor(LEARNING_RATE)),
    "sam": _plain("SAM round AdamW", _sam, optimizers.call_with_value_fn),
    "lora": Method("LoRA", lambda rank, dtype: optax.adamw(LEARNING_RATE),
                   optimizers.call_with_gradient, is_lora=True),
    "galore": _low_rank("GaLore", methods.galore),
    "galore_randomized": _low_rank("GaLore (randomized SVD)", methods.galore,
                                   subspace="randomized_svd"),
    # GaLore as LORENZA would refresh it: what sketches save, without the perturbation.
    "galore_sketch": _lorenza("GaLore (sketched)", rho=0.0, **SKETCH),
    "galore_optax": Method("GaLore of Optax", _optax_galore, optimizers.call_with_gradient,
                           scanned=False),
    "lorenza": _lorenza("LORENZA"),
    "lorenza_sketch": _lorenza("LORENZA (sketched)", **SKETCH),
    "lorenza_int8": _lorenza("LORENZA (sketched, int8)", moment_dtype="int8", **SKETCH),
    "lorenza_least": _lorenza("LORENZA (least)", moment_dtype="int8", factor_dtype="bfloat16",
                              proj_type="reverse_std", embedding=True, **SKETCH),
}  # fmt: skip
