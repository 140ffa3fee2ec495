"""Batches of a fine-tuning data set: a dict of arrays with one row for each example."""

import numpy as np


def subset(examples, count, seed):
    """`count` of the examples, drawn by the seed; all of them if it is None."""
    if count is None:
        return examples
    if count > len(examples):
        raise SystemExit(f"--train-examples {count}: there are only {len(examples)}.")
    return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:count]]


def size(data):
    """The number of examples."""
    return len(next(iter(data.values())))


def train_batch(data, seed, step, batch_size):
    """Batch number `step`, from 0: a function of (seed, step) alone.

    The batches walk through one random order of the examples after another, so that each example
    is seen once in every epoch; a batch may lie across the border of two.
    """
    count = size(data)
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(positions // count):
        here = positions // count == epoch
        order = np.random.default_rng([seed, epoch]).permutation(count)
        rows[here] = order[positions[here] % count]
    return {name: column[rows] for name, column in data.items()}


def in_order(data, batch_size):
    """All examples once and in order; the last batch is the shorter for it, so weigh by size."""
    starts = range(0, size(data), batch_size)
    return [{name: c[start : start + batch_size] for name, c in data.items()} for start in starts]
