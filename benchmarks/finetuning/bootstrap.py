"""Paired bootstrap of the difference between two methods, over examples and seeds.

Shapes: N examples of a development set, S seeds, R replicates. In one replicate the examples and
the seeds are each drawn with replacement, the examples the same for all seeds and both methods,
as all runs were scored on the same ones.

A bootstrap of S seeds sees but (S - 1) / S of their variance, and its quantiles take their spread
for known. Of three seeds that would make an interval of "95 %" that holds in three of four cases,
so here its standard deviation is corrected and multiplied by Student's t.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

REPLICATES = 2000
LEVEL = 0.95


class Difference(NamedTuple):
    estimate: float
    low: float
    high: float


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


def replicates(metric, labels_N, first_SxN, second_SxN, seed, count=REPLICATES):
    """(the difference, first minus second, and that of each replicate, (R,)); mean over seeds."""
    rng = np.random.default_rng(seed)
    (seeds, examples), of = first_SxN.shape, METRICS[metric]
    weights_RxN = rng.multinomial(examples, np.full(examples, 1 / examples), count) / examples
    weights_RxS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), count) / seeds
    # The first row is the sample itself.
    weights_RxN = np.concatenate([np.full((1, examples), 1 / examples), weights_RxN])
    weights_RxS = np.concatenate([np.full((1, seeds), 1 / seeds), weights_RxS])
    differences_RxS = of(labels_N, first_SxN, weights_RxN) - of(labels_N, second_SxN, weights_RxN)
    differences_R = np.sum(weights_RxS * differences_RxS, axis=1)
    return differences_R[0], differences_R[1:]


def interval(estimate, samples_R, seeds, tasks=1):
    """Of one difference, or of the average over tasks, each with so many seeds (two or more)."""
    deviation = np.std(samples_R) * (seeds / (seeds - 1)) ** 0.5
    half = stats.t.ppf((1 + LEVEL) / 2, tasks * (seeds - 1)) * deviation
    return Difference(float(estimate), float(estimate - half), float(estimate + half))


def mean_over_tasks(parts):
    """The average of several tasks' (estimate, samples), drawn independently of each other."""
    estimates, samples = zip(*parts, strict=True)
    return np.mean(estimates), np.mean(samples, axis=0)
