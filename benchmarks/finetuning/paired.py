"""The paired difference of two methods' scores, and how sure it is, over examples and seeds.

Shapes: N examples of a development set, S seeds, R replicates. All runs of a task are scored on the
same examples, so what makes a difference uncertain are two factors that cross: the seeds (draws of
the train set, initial weights, orders), and the examples. The variance of the mean over seeds is

    variance of the seeds' differences / S  +  covariance between seeds by the choice of examples

where the second term is by a bootstrap over examples, the same for all seeds and both methods. The
first has S - 1 degrees of freedom, too few to believe it where it is small by luck: it is taken to
be no less than what the examples alone explain, of which each seed sees the same few. (A bootstrap
over seeds and examples at once would count what belongs to both three times.)
"""

from typing import NamedTuple

import numpy as np

import glue
from benchmarks import tables

REPLICATES = 2000


class Paired(NamedTuple):
    """The difference on one task, the first method's score less the second's."""

    by_seed: np.ndarray  # (S,)
    of_seeds: float  # the variance that seeds give to their mean; of one seed nan, as the next
    of_examples: float  # and that examples do


def accuracies(labels_N, predictions_SxN, weights_RxN):
    """Shares of right predictions, (R, S); rows of weights sum to 1."""
    return weights_RxN @ (predictions_SxN == labels_N).T.astype(float)


def correlations(labels_N, predictions_SxN, weights_RxN):
    """Pearson's of weighted examples, (R, S), which for two labels is Matthews'; 0 if constant."""
    # Centred first: a constant row then has a variance of 0 and not of round-off.
    x_N = labels_N - labels_N.mean()
    y_NxS = (predictions_SxN - predictions_SxN.mean(axis=1, keepdims=True)).T
    mean_x_Rx1 = (weights_RxN @ x_N)[:, None]
    mean_y_RxS = weights_RxN @ y_NxS
    covariance_RxS = weights_RxN @ (x_N[:, None] * y_NxS) - mean_x_Rx1 * mean_y_RxS
    variance_RxS = ((weights_RxN @ x_N**2)[:, None] - mean_x_Rx1**2) * (
        weights_RxN @ y_NxS**2 - mean_y_RxS**2
    )
    is_constant = variance_RxS <= 1e-20
    safe = np.where(is_constant, 1.0, variance_RxS)
    return np.where(is_constant, 0.0, covariance_RxS / np.sqrt(safe))


METRICS = {"accuracy": accuracies, "matthews": correlations, "pearson": correlations}


def paired(metric, labels_N, first_SxN, second_SxN, seed=0, count=REPLICATES):
    """Of predictions; ``seed`` draws the bootstrap's examples."""
    rng = np.random.default_rng(seed)
    (seeds, examples), of = first_SxN.shape, METRICS[metric]
    weights_RxN = rng.multinomial(examples, np.full(examples, 1 / examples), count) / examples
    # The first row is the sample itself.
    weights_RxN = np.concatenate([np.full((1, examples), 1 / examples), weights_RxN])
    by_seed, *replicates = of(labels_N, first_SxN, weights_RxN) - of(
        labels_N, second_SxN, weights_RxN
    )
    if seeds == 1:
        return Paired(by_seed, np.nan, np.nan)
    covariance_SxS = np.cov(np.transpose(replicates))
    common = np.mean(covariance_SxS[~np.eye(seeds, dtype=bool)])
    own = np.mean(np.diag(covariance_SxS)) - common
    of_seeds = max(np.var(by_seed, ddof=1), own) / seeds
    return Paired(by_seed, float(of_seeds), float(max(0.0, common)))


def of_results(task, first, second, seed=0):
    """That of stored results, of the same seeds, by the task's first metric, in points."""
    labels_N, first_SxN = _arrays(first)
    others_N, second_SxN = _arrays(second)
    if not np.allclose(labels_N, others_N):  # older records have a digit less
        raise ValueError(f"{task}: methods were scored on different examples")
    found = paired(glue.TASKS[task].metrics[0], labels_N, first_SxN, second_SxN, seed)
    return Paired(100 * found.by_seed, 1e4 * found.of_seeds, 1e4 * found.of_examples)


def interval(tasks):
    """Of the average over tasks, each a Paired; tasks vary independently."""
    estimate = float(np.mean([np.mean(task.by_seed) for task in tasks]))
    parts = [(task.of_seeds, len(task.by_seed) - 1) for task in tasks]
    parts += [(task.of_examples, np.inf) for task in tasks]
    return tables.difference(estimate, [(part / len(tasks) ** 2, free) for part, free in parts])


def _arrays(results):
    """(labels (N,), predictions (S, N)) of a task's seeds."""
    columns = [[result[key] for result in results] for key in ("labels", "predictions")]
    labels, predictions = (
        np.asarray([list(map(int, row)) if isinstance(row, str) else row for row in rows], float)
        for rows in columns
    )
    if not np.allclose(labels, labels[0]):
        raise ValueError("seeds of one task were scored on different examples")
    return labels[0], np.nan_to_num(predictions)  # a run that diverged has learned nothing
