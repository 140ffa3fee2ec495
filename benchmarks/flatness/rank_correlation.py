"""Spearman's correlation over methods, in blocks of runs that share a task and a seed."""

import itertools
import math

import numpy as np
from scipy import stats

MOST_ORDERS = 6000  # 7! are 5040; of more methods so many are drawn


def of_methods(flatness_MxB, scores_MxB):
    """(Spearman's within blocks over M methods, in the mean, p-value, two-sided).

    Ranks are those within a block, as what seeds and tasks do to all methods is not asked for.
    Blocks of one method are alike, so whole methods change places under the null.
    """
    x_MxB, y_MxB = (stats.rankdata(v, axis=0) for v in (flatness_MxB, scores_MxB))
    x_MxB, y_MxB = x_MxB - x_MxB.mean(axis=0), y_MxB - y_MxB.mean(axis=0)
    size = np.sqrt((x_MxB**2).sum() * (y_MxB**2).sum())
    if size == 0:
        return 0.0, 1.0
    # Row i against row j; an order of the methods takes one of each row and column.
    products_MxM = x_MxB @ y_MxB.T / size
    count = len(products_MxM)
    if math.factorial(count) <= MOST_ORDERS:
        orders = np.array(list(itertools.permutations(range(count))))
    else:
        rng = np.random.default_rng(0)
        drawn = [rng.permutation(count) for _ in range(MOST_ORDERS - 1)]
        orders = np.array([np.arange(count), *drawn])
    under_null = products_MxM[np.arange(count), orders].sum(axis=1)
    observed = float(np.trace(products_MxM))
    return observed, float(np.mean(np.abs(under_null) >= abs(observed) - 1e-12))


def holm(p_values, level=0.05):
    """Which of several tests hold together, by Holm's method."""
    holds, order = [False] * len(p_values), sorted(range(len(p_values)), key=p_values.__getitem__)
    for done, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - done) + 1e-12:
            break
        holds[index] = True
    return holds
