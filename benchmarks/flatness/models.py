"""How flat the minima are that fine-tuning and pre-training end in: curvature and worst rise.

A cell takes the hyperparameters of a final run of `finetuning` or `pretraining` from its record,
trains the model anew, since no weights are stored, sees whether it is the same, and measures the
loss about it on some of its training examples and on as many held-out ones, the same for all
methods of one seed.
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
from benchmarks import curvature, experiments, finetuning, pretraining, pretraining_runs
from benchmarks.flatness_report import again, report

__all__ = ["again", "cells", "report", "run"]

TASKS = ("sst2", "stsb")  # RTE and CoLA are left for later
METHODS = ("adamw", "galore", "sam", "lorenza_zo", "lorenza_subspace")
TEXTS = ("stdlib",)
LLAMA_METHODS = (
    "adamw", "galore", "fira", "lotus", "lorenza", "lorenza_subspace", "lorenza_plus", "muon",
)  # fmt: skip
EXAMPLES = 256  # to fine-tune on
SEEDS = range(3)

# Of each of the two sets: texts of 32 or 48 tokens, and sequences of 128.
MEASURED = {"finetuning": 64, "pretraining": 32}
SETTINGS = {
    # At most: five gave a residual of 0.3 % on SST-2, seven of 0.2 % on the Llama.
    "lanczos_steps": 12,
    "tolerance": 0.01,
    # SAM's radius. At 0.5 the loss of a fine-tuned model rises to 4, and nothing local is left.
    "rho": 0.05,
    "relative_rho": 0.5,  # adaptive SAM's is about ten times SAM's
    "ascent_steps": 5,
    "random_directions": 1,  # there and back, as a control: nothing rises in 22 M dimensions
}
# Rounding differs from one machine to another, and training amplifies it.
SAME = 0.02  # relative difference of losses, and mean difference of predictions


def cells(size):
    small, *_ = pretraining.MODELS[size]
    fine_tuned = [
        c for c in finetuning.cells(size)
        if c["kind"] == "final" and c["examples"] == EXAMPLES and c["seed"] in SEEDS
        and c["task"] in TASKS and c["method"] in METHODS
    ]  # fmt: skip
    pre_trained = [
        c for c in pretraining.cells(size)
        if c["kind"] == "final" and c["model"] == small and c["seed"] in SEEDS
        and c["text"] in TEXTS and c["method"] in LLAMA_METHODS
    ]  # fmt: skip
    return [_cell("finetuning", c) for c in fine_tuned] + [
        _cell("pretraining", c)
        # All seeds of a method together: they share its program.
        for c in sorted(pre_trained, key=lambda c: LLAMA_METHODS.index(c["method"]))
    ]


def _cell(kind, source):
    return {
        "id": f"{kind}-{source['id']}",
        "kind": kind,
        "task": source["task"] if kind == "finetuning" else source["text"],
        "method": source["method"],
        "seed": source["seed"],
        "source": source,
        "measured": MEASURED[kind],
        **SETTINGS,
        "group": f"{kind}-{source['group']}",
        "work": 1,
    }


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
        "relative_rise": adaptive.rise,
        "relative_rise_path": adaptive.path,
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
    config, _ = finetuning.checkpoint_of(finetuning.CHECKPOINT, cell["task"])
    tokenized = functools.partial(finetuning.tokenized, cell["task"])
    train, dev, shift = finetuning.data_of(source)  # as in the run of the record
    hyperparameters = {key: record[key] for key in ("learning_rate", "rho")}
    trained = finetuning.training(source, hyperparameters, train, display)

    rows = np.random.default_rng(0).permutation(len(dev))[: cell["measured"]]
    held_out = [dev[row] for row in rows]
    scores = finetuning.scores_of(
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
    trained = pretraining_runs.train(source, rates, display)
    data = pretraining_runs.data_of(source)
    count = -(-cell["measured"] // source["batch_size"])
    # Batches that it was trained on, from its first to its last.
    steps = np.linspace(0, source["steps"] - 1, count).astype(int)
    seen = [pretraining_runs.train_batch(source, data, int(step)) for step in steps]
    held_out = pretraining_runs.validation_batches(source, data)
    losses = [record["validation_loss"], trained.result["validation_loss"]]
    return Subject(
        loss=pretraining_runs.loss_of(source),
        params=trained.params,
        parts={"train": seen, "test": list(held_out[:: max(1, len(held_out) // count)][:count])},
        same={"validation_loss": losses},
        differences={"validation_loss": _relative(*losses)},
        score=math.nan if losses[0] is None else -losses[0],
        score_name="minus the validation loss",
    )


SUBJECTS = {"finetuning": _fine_tuned, "pretraining": _pre_trained}
