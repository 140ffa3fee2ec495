"""Numbers as RESULTS.md shows them."""

import math
import statistics

from scipy import stats


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
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


def t_interval(values, unit="", digits=1):
    """The mean of paired differences and its interval of 95 % by Student's t."""
    if not values:
        return "-"
    unit = unit and f" {unit}"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:+.{digits}f}{unit} (one run)"
    low, high = (f"{edge:+.{digits}f}" for edge in t_edges(values))
    return f"{mean:+.{digits}f}{unit} ({low} to {high})"


def t_edges(values):
    """Where that interval begins and ends; of two values or more."""
    mean, count = statistics.fmean(values), len(values)
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5
    return mean - half, mean + half
