"""The final models, trained anew, and what is measured about each.

A cell takes the hyperparameters of its run from that one's record, and sees whether the model that
they lead to now is the recorded one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bert
import glue
from benchmarks import experiments
from benchmarks.finetuning import inputs
from benchmarks.finetuning import training as fine_tuning
from benchmarks.flatness import curvature
from benchmarks.pretraining import training as pre_training

# Rounding differs from one machine to another, and training amplifies it.
SAME = 0.02  # relative difference of losses, and mean difference of predictions


class Subject(NamedTuple):
    """A trained model with what is to be measured about it."""

    loss: Callable
    params: Any
    parts: dict[str, list]  # "train" and "test": equally large batches
    same: dict[str, list[float]]  # what the record says and what came out now
    differences: dict[str, float]  # to be at most SAME
    score: float  # the recorded one, the higher the better
    score_name: str


def run(cell, display, needed):
    record = experiments.of_another(cell["kind"], cell["source"])["result"]
    subject = SUBJECTS[cell["kind"]](cell, record, display)
    parts = {
        part: _measured(cell, subject, data, display, part) for part, data in subject.parts.items()
    }
    norm = math.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(subject.params)))
    result = {
        "hyperparameters": {
            key: record[key]
            for key in ("learning_rate", "rho", "matrices_rate", "others_rate")
            if key in record
        },
        "score": subject.score,
        "score_name": subject.score_name,
        "same": subject.same,
        "differences": subject.differences,
        "is_same": all(d is not None and d <= SAME for d in subject.differences.values()),
        "weight_norm": norm,
        **parts,
    }
    result = _without_nan(result)
    train, test = (
        "not finite" if r["largest"] is None else f"{r['largest']:.4g}, rise {r['rise']:.3g}"
        for r in (result["train"], result["test"])
    )
    other = "" if result["is_same"] else "; ANOTHER MODEL than the recorded one"
    result["summary"] = f"eigenvalue {train}; test {test}{other}"
    return result


def _measured(cell, subject, data, display, part):
    key = jax.random.fold_in(jax.random.key(0), cell["seed"])
    about = subject.loss, subject.params, data
    relative = curvature.relative_scale(subject.params)
    display.step(0, 4, f"{part}: eigenvalue")
    spectrum = curvature.largest_eigenvalue(
        *about, cell["lanczos_steps"], key, tolerance=cell["tolerance"]
    )
    display.step(1, 4, f"{part}: worst rise")
    worst = curvature.worst_rise(*about, cell["rho"], cell["ascent_steps"])
    display.step(2, 4, f"{part}: relative rise")
    adaptive = curvature.worst_rise(*about, cell["relative_rho"], cell["ascent_steps"], relative)
    display.step(3, 4, f"{part}: random rise")
    return {
        "loss": worst.centre,
        **spectrum._asdict(),
        "rise": worst.rise,
        "rise_path": worst.path,
        "slope": worst.slope,
        "relative_rise": adaptive.rise,
        "relative_rise_path": adaptive.path,
        "relative_slope": adaptive.slope,
        "random_rise": curvature.random_rise(
            *about, cell["rho"], cell["random_directions"], key
        ),
    }  # fmt: skip


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _relative(before, now):
    return math.nan if before is None or now is None else abs(now - before) / abs(before)


def _fine_tuned(cell, record, display):
    source, task = cell["source"], glue.TASKS[cell["task"]]
    config, _ = inputs.checkpoint_of(inputs.CHECKPOINT, cell["task"])
    tokenized = functools.partial(inputs.tokenized, cell["task"])
    train, dev, shift = inputs.data_of(source)  # as in the run of the record
    hyperparameters = {key: record[key] for key in ("learning_rate", "rho")}
    trained = fine_tuning.train(source, hyperparameters, train, display)

    rows = np.random.default_rng(0).permutation(len(dev))[: cell["measured"]]
    held_out = [dev[row] for row in rows]
    scores = fine_tuning.scores_of(
        cell["task"], trained.params, tokenized(held_out, source["score_len"])
    )
    now = scores.argmax(axis=1) if task.labels else scores[:, 0] + shift
    before = np.asarray([float(x) for x in record["predictions"]])[rows]
    losses = [record["train_loss"], trained.measured["train_loss"]]
    # Cut as in training: then the two parts share a program, and differ in nothing else.
    test = tokenized(held_out, source["train_len"])
    test["labels"] = test["labels"] - np.asarray(shift, test["labels"].dtype)
    score = record["metrics"][task.metrics[0]]
    return Subject(
        loss=bert.loss_of(config),
        params=trained.params,
        parts={
            "train": [{key: column[: cell["measured"]] for key, column in train.items()}],
            "test": [test],
        },
        same={"train_loss": losses},
        differences={
            "train_loss": _relative(*losses),
            "predictions": float(np.mean(np.abs(now - before))),
        },
        score=0.0 if score is None else 100 * score,
        score_name=task.metrics[0],
    )


def _pre_trained(cell, record, display):
    source = cell["source"]
    rates = {key: record[key] for key in ("matrices_rate", "others_rate")}
    trained = pre_training.train(source, rates, display)
    data = pre_training.data_of(source)
    count = -(-cell["measured"] // source["batch_size"])
    # Batches that it was trained on, from its first to its last.
    steps = np.linspace(0, source["steps"] - 1, count).astype(int)
    seen = [pre_training.train_batch(source, data, int(step)) for step in steps]
    held_out = pre_training.validation_batches(source, data)
    losses = [record["validation_loss"], trained.result["validation_loss"]]
    return Subject(
        loss=pre_training.loss_of(source),
        params=trained.params,
        parts={"train": seen, "test": list(held_out[:: max(1, len(held_out) // count)][:count])},
        same={"validation_loss": losses},
        differences={"validation_loss": _relative(*losses)},
        score=math.nan if losses[0] is None else -losses[0],
        score_name="minus the validation loss",
    )


SUBJECTS = {"finetuning": _fine_tuned, "pretraining": _pre_trained}
