"""Fine-tuning with a cell's method, and scoring what it has made of the model."""

import functools
import json
import math
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import batches
import bert
import glue
import optimizers
from benchmarks import experiments
from benchmarks.finetuning import inputs
from benchmarks.finetuning.methods import METHODS
from benchmarks.finetuning.plan import cells, ranked

EVALUATION_BATCH = 64


def run(cell, display, needed):
    """A trial, or what the trials of its `needs` have chosen: for the same method, or its base."""
    if "start" in cell:
        needed = {name: _of_another_size(name) for name in cell["start"]}
    chosen = ranked(needed.values())[cell.get("place", 0)] if needed else cell
    rate = float(f"{chosen['learning_rate'] * cell.get('rate_factor', 1):.3g}")
    rho = cell.get("rho", chosen["rho"])
    return fine_tune(cell, {"learning_rate": rate, "rho": rho}, display)


def _of_another_size(name):
    """The result of a finished cell, by its id."""
    found = next(cell for size in experiments.SIZES for cell in cells(size) if cell["id"] == name)
    return experiments.of_another("finetuning", found)["result"]


def fine_tune(cell, hyperparameters, display):
    """Trains, scores, and says how it went."""
    task, data = glue.TASKS[cell["task"]], inputs.data_of(cell)
    scored = inputs.tokenized(cell["task"], data.scored, cell["score_len"])
    trained = train(cell, hyperparameters, data.train, display)
    scores = scores_of(cell["task"], trained.params, scored)
    labels = scored["labels"]
    if task.labels:
        predictions = scores.argmax(axis=1)
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
    else:
        predictions = scores[:, 0] + data.shift
        loss = np.mean((predictions - labels) ** 2)
    is_finite = bool(np.isfinite(scores).all())
    result = {
        **hyperparameters,
        "metrics": {
            name: glue.METRICS[name](labels, predictions) if is_finite else None
            for name in task.metrics
        },
        "loss": float(loss) if is_finite else None,
        **trained.measured,
    }
    if cell["kind"] == "final":
        result |= {"labels": stored(labels), "predictions": stored(predictions)}
    shown = result["metrics"][task.metrics[0]]
    rho = "" if result["rho"] is None else f", rho {result['rho']:g}"
    result["summary"] = (
        f"lr {result['learning_rate']:g}{rho}: {task.metrics[0]} "
        + ("not finite" if shown is None else f"{shown:.3f}")
    )  # fmt: skip
    return result


def stored(values):
    """Labels as one string of digits, numbers as float32 has them; those not finite as 0."""
    if values.dtype.kind in "iu":
        return "".join(map(str, values.tolist()))
    return [float(f"{value:.9g}") for value in np.nan_to_num(values, posinf=0, neginf=0)]


class Trained(NamedTuple):
    params: Any
    measured: dict


def train(cell, hyperparameters, examples, display):
    """Trains on the examples, in the batches of the cell's seed."""
    compiled, init, join, compile_seconds = _program(
        inputs.CHECKPOINT, cell["task"], cell["method"], cell["train_len"], cell["batch_size"],
        cell["rank"], cell["update_proj_gap"], json.dumps(cell.get("arguments", {})),
    )  # fmt: skip
    steps = -(-cell["epochs"] * batches.size(examples) // cell["batch_size"])
    rate = optimizers.learning_rate_schedule(hyperparameters["learning_rate"], steps)
    rates = np.asarray(jax.vmap(rate)(jnp.arange(steps)))
    rho = np.float32(hyperparameters["rho"] or 0.0)
    trained, frozen, opt_state = init(cell["seed"])
    losses, seconds = [], []
    for step in range(steps):
        batch = batches.train_batch(examples, cell["seed"], step, cell["batch_size"])
        started = time.perf_counter()
        trained, opt_state, loss = compiled(trained, opt_state, frozen, batch, rates[step], rho)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - started)
        display.step(step + 1, steps, f"loss {losses[-1]:.3f}")
    last = statistics.fmean(losses[-(steps // cell["epochs"]) :])
    measured = {
        "steps": steps,
        "train_loss": last if math.isfinite(last) else None,
        "seconds_per_step": round(statistics.median(seconds), 4),
        "mean_seconds_per_step": round(statistics.fmean(seconds), 4),  # with refreshes
        "compile_seconds": round(compile_seconds, 1),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "optimizer_state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state)),
    }
    return Trained(join(trained, frozen), measured)


@functools.lru_cache(maxsize=2)  # cells of one program stand together
def _program(checkpoint, task, name, max_len, batch_size, rank, update_proj_gap, arguments):
    """(compiled step, init, join, seconds to compile).

    Learning rate and radius are arguments of the step, so all trials and seeds share it.
    """
    method, (config, files) = METHODS[name], inputs.checkpoint_of(checkpoint, task)
    loss = bert.loss_of(config)

    def build(rate, rho, seed):
        settings = optimizers.Settings(rank, update_proj_gap, rho, seed)
        return method.build(lambda count: rate, settings, **json.loads(arguments))

    def init(seed):
        params = bert.read_parameters(files, config, seed)
        trained, frozen = method.split(params, rank, seed)
        # The state holds the seed; the step takes it from there.
        return trained, frozen, jax.jit(build(0.0, 1.0, seed).init)(trained)

    def step(trained, opt_state, frozen, batch, rate, rho):
        value, updates, opt_state = method.call(
            build(rate, rho, 0),
            lambda trained, batch: loss(method.join(trained, frozen), batch),
            trained, opt_state, batch,
        )  # fmt: skip
        return optax.apply_updates(trained, updates), opt_state, value

    trained, frozen, opt_state = init(0)
    kind = np.int32 if glue.TASKS[task].labels else np.float32
    shape, keys = (batch_size, max_len), ("input_ids", "attention_mask", "token_type_ids")
    batch = {key: np.ones(shape, np.int32) for key in keys} | {"labels": np.ones(batch_size, kind)}
    number = np.float32(0.0)
    started = time.perf_counter()
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(trained, opt_state, frozen, batch, number, number)
        .compile()
    )
    return compiled, init, method.join, time.perf_counter() - started


def scores_of(task, params, data):
    """Scores of all rows, in batches of one size: the last is filled up with the first row."""
    count = batches.size(data)
    rows = np.zeros(-(-count // EVALUATION_BATCH) * EVALUATION_BATCH, dtype=int)
    rows[:count] = np.arange(count)
    filled = {key: data[key][rows] for key in data if key != "labels"}
    logits = _logits(inputs.checkpoint_of(inputs.CHECKPOINT, task)[0])
    parts = [logits(params, part) for part in batches.in_order(filled, EVALUATION_BATCH)]
    return np.concatenate(parts)[:count]


@functools.cache
def _logits(config):
    return jax.jit(bert.logits_of(config))
