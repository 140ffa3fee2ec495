"""How a quantity grows, from its values at some points."""

import math
import statistics
from typing import NamedTuple

import numpy as np

SAME = 0.1  # values, or steps between them, that differ by less are taken for equal


class Growth(NamedTuple):
    exponent: float  # of the fitted power
    last_exponent: float  # between the last two points
    smallest: float  # what one more adds, over the intervals between points
    largest: float
    word: str


def growth(points, values):
    """Of two points or more; whether it is linear can be said from three on."""
    x, y = np.asarray(points, float), np.asarray(values, float)
    exponents = np.diff(np.log(y)) / np.diff(np.log(x))
    adds = np.diff(y) / np.diff(x)
    if y.max() <= (1 + SAME) * y.min():
        word = "constant"
    elif len(x) == 2:
        word = "grows" if y[-1] > y[0] else "shrinks"
    elif (adds <= 0).any():
        word = "not steadily"
    elif adds.max() <= (1 + SAME) * adds.min():
        word = "linear"
    else:
        word = "faster than linear" if adds[-1] > adds[0] else "slower than linear"
    fitted = np.polyfit(np.log(x), np.log(y), 1)[0]
    return Growth(float(fitted), float(exponents[-1]), float(adds.min()), float(adds.max()), word)


class Ratio(NamedTuple):
    median: float
    low: float  # of ten rounds nine lie above
    high: float


def ratio(ours, theirs):
    """Of times that were measured in turns: of each round, then over the rounds."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, high = np.quantile(each, [0.1, 0.9])
    return Ratio(statistics.median(each), float(low), float(high))


def significant(value, digits=3):
    """For people: 0.0123, 4.57, 1235."""
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, places)}f}"
