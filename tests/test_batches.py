"""Batches of fine-tuning: epochs in an order of their own, subsets, every example once."""

import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import batches  # noqa: E402


def test_training_batches_are_epochs_in_an_order_of_seed_and_step():
    data = {"labels": np.arange(10), "input_ids": np.arange(10)[:, None] * [1, 1]}
    made = [batches.train_batch(data, seed=3, step=step, batch_size=4) for step in range(5)]
    seen = np.concatenate([batch["labels"] for batch in made])
    np.testing.assert_array_equal(np.sort(seen[:10]), np.arange(10))
    np.testing.assert_array_equal(np.sort(seen[10:]), np.arange(10))
    assert not np.array_equal(seen[:10], seen[10:])
    for step, batch in enumerate(made):
        np.testing.assert_array_equal(batch["input_ids"][:, 0], batch["labels"])
        again = batches.train_batch(data, 3, step, 4)
        np.testing.assert_array_equal(batch["labels"], again["labels"])
    assert not np.array_equal(made[0]["labels"], batches.train_batch(data, 4, 0, 4)["labels"])
    assert len(batches.train_batch(data, 0, 0, 25)["labels"]) == 25


def test_in_order_every_example_comes_once():
    data = {"labels": np.arange(10), "input_ids": np.arange(10)[:, None]}
    made = batches.in_order(data, batch_size=4)
    assert [len(batch["labels"]) for batch in made] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([b["labels"] for b in made]), np.arange(10))


def test_subsets_are_drawn_by_the_seed():
    examples = list(range(100))
    assert batches.subset(examples, None, seed=0) is examples
    drawn = batches.subset(examples, 20, seed=0)
    assert len(set(drawn)) == 20
    assert drawn == batches.subset(examples, 20, seed=0)
    assert drawn not in (batches.subset(examples, 20, seed=1), examples[:20])
    with pytest.raises(SystemExit, match="--train-examples 101: there are only 100"):
        batches.subset(examples, 101, seed=0)
