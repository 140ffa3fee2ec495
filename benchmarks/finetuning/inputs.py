"""What fine-tuning starts from: the examples of GLUE, as tokens, and the checkpoint."""

import functools
from typing import NamedTuple

import numpy as np

import batches
import bert
import glue
from benchmarks import experiments
from benchmarks.finetuning.methods import HELD_OUT

CHECKPOINT = None  # all-MiniLM-L6-v2 from its package


class Data(NamedTuple):
    train: dict  # arrays, labels less the shift
    scored: list  # examples
    shift: float  # what is taken from the labels of a regression


def data_of(cell):
    """What a cell trains on and is scored on."""
    dataset = dataset_of(cell["task"], experiments.data_dir())
    if cell["kind"] == "tuning":
        count = cell["examples"] or len(dataset.train) - HELD_OUT
        both = batches.subset(dataset.train, count + HELD_OUT, cell["seed"])
        train, scored = both[:count], both[count:]
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


@functools.cache
def checkpoint_of(folder, task):
    """(config, files)."""
    return bert.read_config(folder, len(glue.TASKS[task].labels) or 1, "float32")


@functools.lru_cache(maxsize=2)
def dataset_of(task, data_dir):
    return glue.load(task, data_dir)
