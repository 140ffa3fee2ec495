"""Training one of pre-training's Llamas, and all methods in turns to compare their times.

A cell says everything: "size" and "model", "text", "method" with its "arguments", "rank",
"update_proj_gap" and "rho", "steps", "batch_size", "seq_len", "seed", and whether its "kind" is
"tuning", which is scored on a part of the train set.
"""

import functools
import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import corpus
import llama
import optimizers
from benchmarks import experiments, tables
from benchmarks.pretraining.methods import METHODS, transformation

VALIDATION_BATCHES = 12
EVALUATIONS = 8  # in the course of a run
TUNING_SHARE = 20  # one token in so many of the train part scores the trials


class Model(NamedTuple):
    config: llama.LlamaConfig
    steps: int
    rank: int
    seeds: int
    work: float  # of a step, relative


MODELS = {
    "cpu": {
        "0.5M": Model(llama.LlamaConfig(hidden_size=96, intermediate_size=256), 250, 24, 3, 1.0),
        "1.9M": Model(llama.PRESETS["tiny"].model, 200, 48, 3, 3.0),
    },
    "full": {
        "60M": Model(llama.PRESETS["60M"].model, 2000, 128, 3, 100.0),
        "130M": Model(llama.PRESETS["130M"].model, 4000, 256, 1, 300.0),
    },
}


def run(cell, display, needed):
    if cell["kind"] == "race":
        return race(cell, display)
    rates = cell if cell["kind"] == "tuning" else best(needed.values())
    rates = {key: rates[key] for key in ("matrices_rate", "others_rate")}
    return train(cell, rates, display).result


def best(results):
    return min(results, key=lambda result: tables.or_infinity(result["validation_loss"]))


class Trained(NamedTuple):
    params: Any
    result: dict


class Data(NamedTuple):
    train: np.ndarray
    validation: np.ndarray
    fingerprint: str


def data_of(cell):
    """What a cell trains on and is scored on."""
    found = _tokens(cell["text"], cell["seq_len"], MODELS[cell["size"]][cell["model"]].config)
    if cell["kind"] != "tuning":
        return found
    cut = len(found.train) - len(found.train) // TUNING_SHARE
    return found._replace(train=found.train[:cut], validation=found.train[cut:])


def validation_batches(cell, data):
    return corpus.validation_batches(
        data.validation, VALIDATION_BATCHES, cell["batch_size"], cell["seq_len"]
    )


def train_batch(cell, data, step):
    return corpus.train_batch(data.train, cell["seed"], step, cell["batch_size"], cell["seq_len"])


def train(cell, rates, display):
    """Trains a cell's model at the rates: the last parameters, and the result that is stored."""
    data = data_of(cell)
    compiled, init, compile_seconds = _program_of(cell)
    evaluated, held_out = loss_of(cell), validation_batches(cell, data)
    params, opt_state = init(cell["seed"])
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
    given = np.float32(rates["matrices_rate"]), np.float32(rates["others_rate"])
    steps, every = cell["steps"], max(1, cell["steps"] // EVALUATIONS)
    losses, seconds, curve = [], [], []
    for step in range(steps):
        batch = train_batch(cell, data, step)
        started = time.perf_counter()
        params, opt_state, loss = compiled(params, opt_state, batch, *given)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - started)
        display.step(step + 1, steps, f"loss {losses[-1]:.3f}")
        if not losses[-1] < 20:  # diverged
            break
        if (step + 1) % every == 0 or step + 1 == steps:
            loss = statistics.fmean(float(evaluated(params, batch)) for batch in held_out)
            curve.append([step + 1, round(sum(seconds), 3), loss])
    finished = len(losses) == steps and np.isfinite(curve[-1][2])
    final = curve[-1][2] if finished else None
    summary = f"{rates['matrices_rate']:g}, {rates['others_rate']:g}: " + (
        "diverged" if final is None else f"{final:.4f}"
    )
    result = {
        **rates,
        "validation_loss": final,
        "curve": [point for point in curve if np.isfinite(point[2])],  # [step, seconds, loss]
        "train_losses": [round(x, 4) for x in losses[:: max(1, steps // 20)] if np.isfinite(x)],
        "seconds_per_step": round(statistics.median(seconds), 4),
        "mean_seconds_per_step": round(statistics.fmean(seconds), 4),  # with refreshes
        "compile_seconds": round(compile_seconds, 1),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "optimizer_state_bytes": state_bytes,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "corpus": data.fingerprint,
        "summary": summary,
    }
    return Trained(params, result)


def race(cell, display):
    """Seconds of each step of each method, in turns, over a whole interval between refreshes."""
    data, running, seconds = data_of(cell), {}, {method: [] for method in cell["methods"]}
    for method in seconds:
        compiled, init, _ = _program_of({**cell, "method": method})
        running[method] = compiled, *init(cell["seed"])
    rate = np.float32(1e-3)
    for step in range(cell["steps"]):
        batch = train_batch(cell, data, step)
        for method, (compiled, params, opt_state) in running.items():
            started = time.perf_counter()
            params, opt_state, loss = compiled(params, opt_state, batch, rate, rate)
            jax.block_until_ready((params, opt_state, loss))
            seconds[method].append(round(time.perf_counter() - started, 5))
            running[method] = compiled, params, opt_state
        display.step(step + 1, cell["steps"])
    # The first interval warms up.
    return {"seconds": {m: times[cell["update_proj_gap"] :] for m, times in seconds.items()}}


def loss_of(cell):
    """The compiled loss of (params, batch)."""
    return _loss(MODELS[cell["size"]][cell["model"]].config)[1]


@functools.cache
def _loss(config):
    loss = llama.loss_of(config)
    return loss, jax.jit(loss)


def _program_of(cell):
    return _program(json.dumps(cell["arguments"]), *(
        cell[key] for key in ("size", "model", "method", "steps", "rank", "update_proj_gap",
                              "batch_size", "seq_len", "rho")
    ))  # fmt: skip


@functools.lru_cache(maxsize=2)  # cells of one program stand together, in tuning at least
def _program(
    arguments, size, model, method, steps, rank, update_proj_gap, batch_size, seq_len, rho
):
    """(compiled step, init, seconds to compile); the rates are arguments of the step."""
    config, unit = MODELS[size][model].config, optimizers.learning_rate_schedule(1.0, steps)
    loss, arguments = _loss(config)[0], json.loads(arguments)

    def build(matrices, others, seed):
        settings = optimizers.Settings(rank, update_proj_gap, rho, seed)
        return transformation(method, settings, matrices, others, unit, arguments)

    def init(seed):
        params = llama.init(config, seed)
        # The state holds the seed; the step takes it from there.
        return params, jax.jit(build(1.0, 1.0, seed).init)(params)

    def step(params, opt_state, batch, matrices, others):
        tx = build(matrices, others, 0)
        value, updates, opt_state = METHODS[method].call(tx, loss, params, opt_state, batch)
        return optax.apply_updates(params, updates), opt_state, value

    batch, number = jnp.zeros((batch_size, seq_len + 1), jnp.int32), np.float32(1.0)
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*init(0), batch, number, number).compile()
    return compiled, init, time.perf_counter() - started


@functools.cache
def _tokens(text, seq_len, config):
    folder = None if text == "stdlib" else pathlib.Path(experiments.data_dir()) / text
    documents, description = corpus.read_documents(folder)
    kind = "bytes" if config.vocab_size == 256 else "bpe"
    found = corpus.tokenize(documents, description, kind, config.vocab_size, seq_len)
    return Data(found.train, found.validation, found.fingerprint)
