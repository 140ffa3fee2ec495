"""Fine-tuning MiniLM-L6 on four tasks of GLUE with few examples: does a method generalize better?

Each method is tuned on a draw of n examples and scored on others of the train set, its best half of
trials on a second draw too; at the best of these it is then trained on other draws, one for each
seed, and scored on the development set. Of one seed all methods see the same examples in the same
order from the same head.
"""

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
from benchmarks.finetuning_methods import FIRST, HELD_OUT, LAST, METHODS, REST
from benchmarks.finetuning_report import again, report

__all__ = ["again", "cells", "report", "run"]

CHECKPOINT = None  # all-MiniLM-L6-v2 from its package
EVALUATION_BATCH = 64
# Apart from those of the final runs, so that none of these has helped to choose. The second draw is
# for the better half of the first: one draw's luck is larger than what lies between methods.
TUNING_SEEDS = (1000, 1001)


class Size(NamedTuple):
    examples: tuple  # None for all
    seeds: int
    max_len: dict  # tokens in training and in scoring; longer texts are cut
    epochs: dict  # by number of examples
    tuned_at: dict  # number of examples at which the hyperparameters are chosen, by the same
    methods: dict  # by number of examples, groups of which each is finished before the next


# On a CPU a step takes time in proportion to the length: in training these cut 1 % of CoLA, 5 % of
# SST-2, 10 % of STS-B and two fifths of RTE, whose longest texts have 250 tokens.
SHORT = {"cola": (24, 32), "stsb": (48, 64), "sst2": (32, 64), "rte": (64, 96)}
LONG = dict.fromkeys(SHORT, (256, 256))
PLANS = {
    "cpu": Size(
        (256, 1024), 3, SHORT, {256: 4, 1024: 3}, {256: 256, 1024: 256},
        {256: (FIRST, REST), 1024: (FIRST,)},
    ),
    "full": Size(
        (256, 1024, None), 10, LONG, {256: 6, 1024: 6, None: 3},
        {256: 256, 1024: 1024, None: 1024}, dict.fromkeys((256, 1024, None), (FIRST, REST, LAST)),
    ),
}  # fmt: skip
SHARED = {"batch_size": 16, "rank": 8, "update_proj_gap": 20}


def cells(size):
    plan, made = PLANS[size], []
    for examples in plan.examples:
        for names in plan.methods[examples]:
            for task in plan.max_len:
                for name in names:
                    made += _of_method(size, plan, examples, task, name)
    return made


def _of_method(size, plan, examples, task, name):
    method, (train_len, score_len) = METHODS[name], plan.max_len[task]
    epochs = method.longer * plan.epochs[examples]
    # In forward passes of a token; all examples are a guess, made without the data.
    work = method.passes * train_len * (examples or 8000) * epochs
    common = {
        "task": task,
        "method": name,
        "examples": examples,
        "epochs": epochs,
        "train_len": train_len,
        "score_len": score_len,
        **SHARED,
        "group": f"{size}-{task}-{name}",
    }
    prefix = f"{size}-{{}}-{task}-{name}"
    tuning = [
        {
            "id": f"{prefix.format(plan.tuned_at[examples])}-tune{index}",
            "kind": "tuning",
            **common,
            "learning_rate": rate,
            "rho": rho,
            "seed": TUNING_SEEDS[0],
            "work": work + HELD_OUT * score_len,
        }
        for index, (rate, rho) in enumerate(method.trials())
    ]
    again = [
        {
            "id": f"{prefix.format(plan.tuned_at[examples])}-again{place}",
            "kind": "tuning",
            **common,
            "place": place,
            "seed": TUNING_SEEDS[1],
            "needs": [cell["id"] for cell in tuning],
            "work": work + HELD_OUT * score_len,
        }
        for place in range(len(tuning) // 2)
    ]
    final = [
        {
            "id": f"{prefix.format(examples or 'all')}-seed{seed}",
            "kind": "final",
            **common,
            "seed": seed,
            "needs": [cell["id"] for cell in (*tuning, *again)],
            "work": work + 1000 * score_len,
        }
        for seed in range(plan.seeds)
    ]
    return [*tuning, *again, *final] if plan.tuned_at[examples] == examples else final


def run(cell, display, needed):
    chosen = ranked(needed.values())[cell.get("place", 0)] if needed else cell
    return fine_tune(cell, {key: chosen[key] for key in ("learning_rate", "rho")}, display)


class Data(NamedTuple):
    train: dict  # arrays, labels less the shift
    scored: list  # examples
    shift: float  # what is taken from the labels of a regression


def data_of(cell):
    """What a cell trains on and is scored on."""
    dataset = dataset_of(cell["task"], experiments.data_dir())
    if cell["kind"] == "tuning":
        both = batches.subset(dataset.train, cell["examples"] + HELD_OUT, cell["seed"])
        train, scored = both[: cell["examples"]], both[cell["examples"] :]
    else:
        train = batches.subset(dataset.train, cell["examples"], cell["seed"])
        scored = dataset.dev
    train = tokenized(cell["task"], train, cell["train_len"])
    # The head starts at 0, and in so few steps would spend most of them on finding the mean.
    shift = 0.0 if glue.TASKS[cell["task"]].labels else np.mean(train["labels"])
    train["labels"] = train["labels"] - np.asarray(shift, train["labels"].dtype)
    return Data(train, scored, shift)


def tokenized(task, examples, length):
    return glue.tokenize(checkpoint_of(CHECKPOINT, task)[1].tokenizer, examples, length)


def fine_tune(cell, hyperparameters, display):
    """Trains, scores, and says how it went."""
    task, (train, scored, shift) = glue.TASKS[cell["task"]], data_of(cell)
    scored = tokenized(cell["task"], scored, cell["score_len"])
    trained = training(cell, hyperparameters, train, display)
    scores = scores_of(cell["task"], trained.params, scored)
    labels = scored["labels"]
    if task.labels:
        predictions = scores.argmax(axis=1)
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
    else:
        predictions = scores[:, 0] + shift
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
    return [float(f"{value:.8g}") for value in np.nan_to_num(values, posinf=0, neginf=0)]


def ranked(results):
    """The trials, the best first: of most draws, then by their mean metric, then by mean loss.

    Of a trial that was scored on several draws, one result stands for all.
    """
    draws = {}
    for result in results:
        draws.setdefault((result["learning_rate"], result["rho"]), []).append(result)
    return [found[0] for found in sorted(draws.values(), key=_merit, reverse=True)]


def _merit(draws):
    metrics = [next(iter(result["metrics"].values())) for result in draws]
    losses = [result["loss"] for result in draws]
    if None in metrics or None in losses:
        return len(draws), -math.inf, -math.inf
    return len(draws), statistics.fmean(metrics), -statistics.fmean(losses)


class Trained(NamedTuple):
    params: Any
    measured: dict


def training(cell, hyperparameters, train, display):
    """Trains on the batches of the cell's seed."""
    compiled, init, join, compile_seconds = _program(
        CHECKPOINT, cell["task"], cell["method"], cell["train_len"], cell["batch_size"],
        cell["rank"], cell["update_proj_gap"], json.dumps(cell.get("arguments", {})),
    )  # fmt: skip
    steps = -(-cell["epochs"] * batches.size(train) // cell["batch_size"])
    rate = optimizers.learning_rate_schedule(hyperparameters["learning_rate"], steps)
    rates = np.asarray(jax.vmap(rate)(jnp.arange(steps)))
    rho = np.float32(hyperparameters["rho"] or 0.0)
    trained, frozen, opt_state = init(cell["seed"])
    losses, seconds = [], []
    for step in range(steps):
        batch = batches.train_batch(train, cell["seed"], step, cell["batch_size"])
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
    method, (config, files) = METHODS[name], checkpoint_of(checkpoint, task)
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
    logits = _logits(checkpoint_of(CHECKPOINT, task)[0])
    parts = [logits(params, part) for part in batches.in_order(filled, EVALUATION_BATCH)]
    return np.concatenate(parts)[:count]


@functools.cache
def _logits(config):
    return jax.jit(bert.logits_of(config))


@functools.cache
def checkpoint_of(folder, task):
    """(config, files)."""
    return bert.read_config(folder, len(glue.TASKS[task].labels) or 1, "float32")


@functools.lru_cache(maxsize=2)
def dataset_of(task, data_dir):
    return glue.load(task, data_dir)
