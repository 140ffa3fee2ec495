"""Spearman's correlation over runs, where several are of one method."""

import itertools
import math

import numpy as np
from scipy import stats

MOST_ORDERS = 6000  # 7! are 5040; of more methods so many are drawn


def of_methods(flatness_MxS, scores_MxS):
    """(Spearman's over the runs of M methods and S seeds, p-value, two-sided).

    Runs of one method are alike, so not runs but whole methods change places under the null.
    """
    x_MxS, y_MxS = (stats.rankdata(v).reshape(v.shape) for v in (flatness_MxS, scores_MxS))
    x_MxS, y_MxS = x_MxS - x_MxS.mean(), y_MxS - y_MxS.mean()
    size = np.sqrt((x_MxS**2).sum() * (y_MxS**2).sum())
    if size == 0:
        return 0.0, 1.0
    # Row i against row j; an order of the methods takes one of each row and column.
    products_MxM = x_MxS @ y_MxS.T / size
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
