"""Names and numbers as RESULTS.md shows them."""

import math
import statistics
from typing import NamedTuple

from scipy import stats

# Of methods, in the order in which plots have them.
NAMES = {
    "adamw": "AdamW",
    "galore": "GaLore",
    "sam": "SAM",
    "fira": "Fira",
    "lotus": "Lotus",
    "lorenza": "LORENZA, zo",
    "lorenza_zo": "LORENZA, zo",
    "lorenza_subspace": "LORENZA, subspace",
    "lorenza_plus": "Lorenza+, zo",
    "lora": "LoRA",
    "vlorp": "VLoRP",
    "adazo_sam": "AdaZo-SAM",
    "lozo": "LOZO, 10 times the steps",
    "mezo": "MeZO, 10 times the steps",
    "muon": "Muon",
}


def markdown(header, rows):
    """Lines of a table; cells that a row lacks at its end are "-"."""
    filled = [[*row, *["-"] * (len(header) - len(row))] for row in rows]
    lines = [header, ["---"] * len(header), *filled]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def mean_and_deviation(values, digits, unit=""):
    """The mean and, after ±, the standard deviation; "-" for nothing, None has diverged."""
    if not values:
        return "-"
    if None in values or not all(map(math.isfinite, values)):
        return "diverged"
    unit = unit and f" {unit}"
    sign = "+" if unit else ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{digits}f}{spread}{unit}"


class Difference(NamedTuple):
    """An estimate and its interval of 95 %, whose edges are None of one seed."""

    estimate: float
    low: float | None
    high: float | None

    def shown(self, digits=1, unit=""):
        estimate, *edges = ("" if x is None else f"{x:+.{digits}f}" for x in self)
        about = " to ".join(edges) if None not in self else "one seed"
        return f"{estimate}{unit and f' {unit}'} ({about})"


class Spread(NamedTuple):
    """A standard deviation and its degrees of freedom."""

    deviation: float
    freedom: int


def pooled(groups):
    """The spread that groups of values have in common about their own means; None of too few."""
    groups = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum((len(values) - 1) * statistics.variance(values) for values in groups)
    return Spread((squares / freedom) ** 0.5, freedom) if freedom else None


def t_interval(values, unit="", digits=1, spread=None):
    """The mean of paired differences and its interval of 95 % by Student's t."""
    if not values:
        return "-"
    return t_difference(values, spread).shown(digits, unit)


def t_difference(values, spread=None):
    """The same in numbers, of one value or more."""
    edges = t_edges(values, spread) if len(values) > 1 else (None, None)
    return Difference(statistics.fmean(values), *edges)


def t_edges(values, spread=None):
    """Where that interval begins and ends, of two values or more.

    By their own spread or by that which is given, whichever is wider: a few seeds may agree by
    luck, and rows that share a spread may not all be as steady.
    """
    parts = [
        (deviation**2 / len(values), freedom)
        for deviation, freedom in filter(None, (pooled([values]), spread))
    ]
    estimate = statistics.fmean(values)
    return max((difference(estimate, [part])[1:] for part in parts), key=lambda e: e[1] - e[0])


def difference(estimate, parts):
    """Its interval by Student's t; parts of its variance are (variance, degrees of freedom).

    The freedom of their sum is Satterthwaite's.
    """
    variance = sum(part for part, _ in parts)
    if not variance:
        return Difference(estimate, estimate, estimate)
    each = sum(part**2 / freedom for part, freedom in parts)
    half = stats.t.ppf(0.975, variance**2 / each if each else math.inf) * variance**0.5
    return Difference(estimate, estimate - half, estimate + half)


# How far a rerun of the same seed may land from what is stored: other machines round otherwise, and
# training carries that on.
SAME_LOSS = 0.01  # relative
SAME_SCORE = 0.03
SAME_CURVATURE = 0.25  # relative


def near(value, share):
    """An interval about a positive value."""
    return value / (1 + share), value * (1 + share)


def short(value):
    return f"{value:.4g}"


def or_infinity(loss):
    return math.inf if loss is None else loss
