"""The programs that are measured: a model, training steps, and what XLA says of them.

The model is a pre-LN transformer in plain JAX, its layers unrolled or scanned from stacks of
weights. Shapes are written into the names as in examples/llama.py: tokens stand in one axis T.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import corpus
import lorenza_optax
import optimizers
from lorenza_optax._low_rank import renewal

VOCABULARY = 256  # bytes
LEARNING_RATE = 1e-3
RHO = 0.05
NO_REFRESH = 10_000  # interval: no refresh comes after those at the start
REFRESH = "sketch"  # not the default: with "gradient" a full gradient is in the program


class Shape(NamedTuple):
    """A model, its batch, and the rank that it is trained in."""

    width: int
    layers: int
    batch: int
    length: int
    rank: int
    scanned: bool = False

    @property
    def heads(self):
        return max(1, self.width // 64)


def init(shape, seed=0):
    """Parameters; matrices of a layer are (inputs, outputs), in a scanned model stacked."""
    width = shape.width
    keys = iter(jax.random.split(jax.random.key(seed), 2 + 6 * shape.layers))

    def matrix(rows, columns):
        return jax.random.normal(next(keys), (rows, columns)) / math.sqrt(rows)

    def norm():
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def layer():
        square = {name: matrix(width, width) for name in ("query", "key", "value", "out")}
        wide = {"up": matrix(width, 4 * width), "down": matrix(4 * width, width)}
        return {"attention_norm": norm(), "feed_forward_norm": norm(), **square, **wide}

    layers = [layer() for _ in range(shape.layers)]
    return {
        "embedding": matrix(VOCABULARY, width) * math.sqrt(VOCABULARY / width),
        "head": matrix(width, VOCABULARY),
        "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers) if shape.scanned else layers,
        "norm": norm(),
    }


def loss_of(shape):
    """Mean cross-entropy of the next byte, as a function of (params, batch)."""
    heads, depth = shape.heads, shape.width // shape.heads
    slowness = 10_000.0 ** (np.arange(shape.width // 2) / (shape.width // 2))
    angle = np.arange(shape.length)[:, None] / slowness
    wave_LxD = np.concatenate([np.sin(angle), np.cos(angle)], axis=1, dtype=np.float32)
    causal_LxL = np.tril(np.ones((shape.length, shape.length), bool))

    def normalized(x, norm):
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + 1e-6) * norm["scale"] + norm["bias"]

    def block(x_TxD, layer):
        def split(y_TxD):
            return y_TxD.reshape(-1, shape.length, heads, depth)

        y_TxD = normalized(x_TxD, layer["attention_norm"])
        q, k, v = (split(y_TxD @ layer[name]) for name in ("query", "key", "value"))
        score = jnp.einsum("BQNH,BKNH->BNQK", q, k) / math.sqrt(depth)
        score = jnp.where(causal_LxL, score, jnp.finfo(score.dtype).min)
        mixed = jnp.einsum("BNQK,BKNH->BQNH", jax.nn.softmax(score), v)
        x_TxD = x_TxD + mixed.reshape(x_TxD.shape) @ layer["out"]
        y_TxD = normalized(x_TxD, layer["feed_forward_norm"])
        return x_TxD + jax.nn.gelu(y_TxD @ layer["up"]) @ layer["down"]

    def loss(params, batch):
        inputs_BxL, targets_BxL = batch[:, :-1], batch[:, 1:]
        x_TxD = (params["embedding"][inputs_BxL] + wave_LxD).reshape(-1, shape.width)
        if shape.scanned:
            x_TxD, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x_TxD, params["layers"])
        else:
            for layer in params["layers"]:
                x_TxD = block(x_TxD, layer)
        logits_TxV = normalized(x_TxD, params["norm"]) @ params["head"]
        picked_T = jnp.take_along_axis(logits_TxV, targets_BxL.reshape(-1, 1), axis=-1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits_TxV, axis=-1) - picked_T)

    return loss


class Text:
    """Batches of real text, functions of the step."""

    def __init__(self):
        documents, description = corpus.read_documents()
        self._data = corpus.tokenize(documents, description, "bytes", VOCABULARY, 1)

    def batch(self, shape, step):
        return corpus.train_batch(self._data.train, 0, step, shape.batch, shape.length)


def dimension_numbers(shape):
    """Which axes form the matrices of a scanned model; None for the default rule."""
    if not shape.scanned:
        return None
    stacked = lorenza_optax.WeightDimensionNumbers(1, 2)
    names = ("query", "key", "value", "out", "up", "down")
    return {
        "layers": dict.fromkeys(names, stacked),
        "head": lorenza_optax.WeightDimensionNumbers(0, 1),
    }


class Optimizer(NamedTuple):
    build: Callable[[Shape], Any]
    call: Callable[..., Any]  # as in examples/optimizers.py
    apply_updates: Callable[..., Any] = optax.apply_updates
    arguments: dict | None = None  # of lorenza, beside those that all have


def _other(name):
    entry = optimizers.OPTIMIZERS[name]

    def build(shape):
        return entry.build(LEARNING_RATE, optimizers.Settings(shape.rank, NO_REFRESH, RHO, 0))

    return Optimizer(build, entry.call)


def lorenza(apply_updates=optax.apply_updates, **arguments):
    def build(shape):
        return lorenza_optax.lorenza(
            LEARNING_RATE,
            shape.rank,
            NO_REFRESH,
            weight_decay=optimizers.WEIGHT_DECAY,
            weight_dimension_numbers=dimension_numbers(shape),
            **{"rho": RHO, "refresh": REFRESH, **arguments},
        )

    return Optimizer(build, optimizers.call_with_value_fn, apply_updates, arguments)


OPTIMIZERS = {
    "adamw": _other("adamw"),
    "galore": _other("optax_galore"),
    "sam": _other("optax_sam"),
    "zo, q=1": lorenza(),
    "zo, q=4": lorenza(num_probes=4),
    "zo, q=1, gradient": lorenza(refresh="gradient"),
    "zo, q=1, materialized": lorenza(factored=False),
    "zo, q=4, materialized": lorenza(num_probes=4, factored=False),
    "subspace": lorenza(ascent="subspace"),
    "momentum": lorenza(ascent="momentum"),
    "signed_momentum": lorenza(ascent="signed_momentum"),
    "rho=0": lorenza(rho=0.0),
    # Updates left as products, added by optax.apply_updates or by the library's own.
    "rho=0, optax's apply": lorenza(rho=0.0, factored_updates=True),
    "rho=0, own apply": lorenza(lorenza_optax.apply_updates, rho=0.0, factored_updates=True),
}


@contextlib.contextmanager
def without_refresh():
    """Programs traced here hold the branch without the refresh only.

    A refresh's gradient is behind `lax.cond(due, ...)`. With `due` a constant, XLA drops a branch
    with the conditional; `refresh_in` tells whether it did. What comes of sketches is left out.
    """

    def old(config, plan, low, sketches, energy, state, active):
        return renewal.unchanged(plan, state), state.captured_energy

    changed = {"is_due": lambda *args: jnp.zeros((), bool), "sketched_subspaces": old}
    with mock.patch.multiple("lorenza_optax._low_rank.in_update", **changed):
        yield


def refresh_in(compiled):
    """What is left of a refresh in a program: the decompositions that it calls.

    Of LAPACK on a CPU and of cuSOLVER on a GPU.
    """
    targets = set(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))
    names = re.compile(r"potrf|geqrf|orgqr|gesdd|gesvd|syev|trsm|cholesky|qr|eigh|svd", re.I)
    return sorted(target for target in targets if names.search(target))


class Variant(NamedTuple):
    """A program: an optimizer's step, with or without its refresh."""

    name: str
    refresh: bool = True


def compile_steps(variants, shape, batch, mesh=None):
    """{variant: its whole step}: (params, opt_state, batch) to (params, opt_state, loss).

    Args:
      variants: The programs; parameters and state are donated in all of them.
      shape: The model.
      batch: One batch.
      mesh: Where given, the batch is sharded over its axis "data", the rest replicated.
    """
    lowered = {variant: lower(variant, shape, batch, mesh) for variant in variants}
    # XLA compiles without Python's lock: on two cores twice as fast as one after the other.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = pool.map(lambda one: one.compile(), lowered.values())
        compiled = dict(zip(lowered, programs, strict=True))
    for variant, program in compiled.items():
        if not variant.refresh and (left := refresh_in(program)):
            raise RuntimeError(f"{variant.name} without its refresh calls {', '.join(left)}")
    return compiled


def lower(variant, shape, batch, mesh):
    entry = OPTIMIZERS[variant.name]
    tx, loss = entry.build(shape), loss_of(shape)

    def step(params, opt_state, batch):
        value, updates, opt_state = entry.call(tx, loss, params, opt_state, batch)
        return entry.apply_updates(params, updates), opt_state, value

    shardings = {}
    if mesh is not None:
        everywhere = jax.NamedSharding(mesh, jax.P())
        split = jax.NamedSharding(mesh, jax.P("data"))
        shardings = {"in_shardings": (everywhere, everywhere, split), "out_shardings": everywhere}
    params = jax.eval_shape(lambda: init(shape))
    opt_state = jax.eval_shape(tx.init, params)
    with contextlib.nullcontext() if variant.refresh else without_refresh():
        jitted = jax.jit(step, donate_argnums=(0, 1), **shardings)
        return jitted.lower(params, opt_state, batch)


def temporary_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def tree_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def low_rank_state(opt_state):
    """The state of lorenza in a chain's; None for other optimizers."""
    is_ours = lambda node: isinstance(node, lorenza_optax.LowRankState)  # noqa: E731
    nodes = jax.tree.leaves(opt_state, is_leaf=is_ours)
    return next((node for node in nodes if is_ours(node)), None)


COLLECTIVES = (
    "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>.*?) (?P<kind>" + "|".join(COLLECTIVES) + r")"
    r"(?P<stage>-start|-done)?\(",
    re.M,
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collective_bytes(text):
    """{kind: bytes of its results} of a compiled program, all branches of it.

    Of a pair of -start and -done only the second is counted: its type is the result alone.
    """
    found = {}
    for match in INSTRUCTION.finditer(text):
        if match["stage"] == "-start":
            continue
        size = 0
        for name, bits, dimensions in _ARRAY.findall(match["type"]):
            count = math.prod(int(d) for d in dimensions.split(",") if d)
            size += count * (1 if name == "pred" else int(bits)) // (1 if name == "pred" else 8)
        found[match["kind"]] = found.get(match["kind"], 0) + size
    return found
