"""What the stored numbers say of flatness: ratios to GaLore, correlation with the scores.

`here` is {(task, method): results by seed} of one kind of training.
"""

import math
import statistics

import numpy as np

from benchmarks import tables
from benchmarks.flatness import rank_correlation
from benchmarks.tables import NAMES

MEASURES = {
    "largest": "largest eigenvalue",
    "rise": "worst rise",
    "relative_rise": "relative worst rise",
}
PARTS = ("train", "test")
BASELINE = "galore"
CONTROL = "sam"  # which is made for flat minima: what it does not show, nobody can
SUBJECTS = ("lorenza_zo", "lorenza", "lorenza_subspace", "lorenza_plus", CONTROL)
LEVEL = 0.05
TITLES = {"finetuning": "Fine-tuning", "pretraining": "Pre-training"}


def log_ratios(here, method, measure, part, only=None):
    """Of all pairs of a task and a seed that both have; those without a logarithm are left out."""
    pairs = [
        (result[part][measure], here[task, BASELINE][seed][part][measure])
        for (task, name), by_seed in here.items()
        if name == method and (task, BASELINE) in here and only in (None, task)
        for seed, result in by_seed.items()
        if seed in here[task, BASELINE]
    ]
    return [math.log(a / b) for a, b in pairs if a is not None and b is not None and min(a, b) > 0]


def _interval(logs):
    """(ratio, low, high); the bounds are None for one pair."""
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return math.exp(mean), None, None
    return tuple(_exp(x) for x in (mean, *tables.t_edges(logs)))


def _exp(x):
    return math.exp(x) if x < 700 else math.inf


def shown(logs):
    if not logs:
        return "-"
    ratio, low, high = _interval(logs)
    return f"{ratio:.2f}" + (" (one pair)" if low is None else f" ({low:.2g} to {high:.2g})")


def headline(by_kind):
    """One sentence on all kinds of training: {kind: here}."""
    parts = []
    for kind, here in by_kind.items():
        subjects = _of_subjects(here)
        words = [
            f"{NAMES[method]} is {_verdict(logs)} than {NAMES[BASELINE]} (largest eigenvalue "
            f"of the Hessian {shown(logs['largest'])} times {NAMES[BASELINE]}'s; on held-out "
            f"examples {_verdict(_logs(here, method, 'test'))})"
            for method, logs in subjects.items()
            if method != "lorenza_plus"  # which is in the section
        ]
        if score := _with_score(here):
            words.append(f"flatness {score[0]}")
        if words:
            parts.append(f"in {TITLES[kind].lower()}, {', '.join(words)}")
    return (
        [f"**Flatness** of the final models, on training examples: {'; '.join(parts)}."]
        if parts
        else []
    )


def of_kind(kind, size, here):
    """Sentences with the figures of each of the subjects, and of the correlations."""
    found = []
    for method, logs in _of_subjects(here).items():
        ratios = (
            f"{MEASURES[m]} {part} {shown(values)}"
            for m in MEASURES
            for part in PARTS
            if (values := log_ratios(here, method, m, part))
        )
        found.append(
            f"{TITLES[kind]} ({size} size): {NAMES[method]} is {_verdict(logs)} than "
            f"{NAMES[BASELINE]} on training examples, and on held-out ones "
            f"{_verdict(_logs(here, method, 'test'))}. Ratios: {', '.join(ratios)}."
        )
    if score := _with_score(here):
        found.append(
            f"{TITLES[kind]} ({size} size): flatness on training examples {score[0]}; Spearman's "
            f"of the largest eigenvalue with the score: {score[1]}."
        )
    return found


def _of_subjects(here):
    """{method: {measure: logarithms of ratios on training examples}}, of those with any."""
    ratios = {method: _logs(here, method, "train") for method in SUBJECTS}
    return {method: logs for method, logs in ratios.items() if logs["largest"]}


def _logs(here, method, part):
    return {measure: log_ratios(here, method, measure, part) for measure in MEASURES}


def _verdict(logs):
    intervals = [_interval(values) for values in logs.values() if values]
    flatter = sum(high is not None and high < 1 for _, _, high in intervals)
    sharper = sum(low is not None and low > 1 for _, low, _ in intervals)
    if flatter and sharper:
        return "by one measure flatter and by another sharper"
    if flatter or sharper:
        word, count = ("flatter", flatter) if flatter else ("sharper", sharper)
        return f"{word} (by {count} of {len(intervals)} measures)"
    return "not shown to be flatter or sharper"


def correlation(here, task, measure, part):
    """(Spearman's, p-value, number of methods, number of seeds), or None."""
    runs = {method: by_seed for (of, method), by_seed in here.items() if of == task}
    finite = {
        m: {s for s, r in by_seed.items() if None not in (r[part][measure], r["score"])}
        for m, by_seed in runs.items()
    }
    seeds = sorted(set().union(*finite.values()))
    whole = [m for m in runs if seeds and finite[m] == set(seeds)]
    if len(whole) < 4:
        return None  # of three methods no order is rare
    flatness, scores = (
        np.array([[of(runs[m][s]) for s in seeds] for m in whole])
        for of in (lambda r: r[part][measure], lambda r: r["score"])
    )
    return *rank_correlation.of_methods(flatness, scores), len(whole), len(seeds)


def _with_score(here):
    """(whether flatness goes with the score, the eigenvalue's correlations), in words, or None."""
    found = {
        (task, measure): c
        for task in dict.fromkeys(task for task, _ in here)
        for measure in MEASURES
        if (c := correlation(here, task, measure, "train"))
    }
    if not found:
        return None
    counts = {
        sign: sum(p < LEVEL and sign * rho > 0 for rho, p, *_ in found.values()) for sign in (-1, 1)
    }
    words = [
        f"{kind} models score higher in {counts[sign]}"
        for kind, sign in (("flatter", -1), ("sharper", 1))
        if counts[sign]
    ]
    of = f"of {len(found)} correlations, p < {LEVEL}"
    with_or_against = "either way with" if counts[1] else "with"
    goes = f"goes {with_or_against if counts[-1] else 'against'}"
    verdict = (
        f"{goes} the score ({' and '.join(words)} {of})" if words
        else f"is not shown to go with the score (in none {of})"
    )  # fmt: skip
    values = ", ".join(
        f"{task} {rho:+.2f} (p {p:.2g})"
        for (task, measure), (rho, p, *_) in found.items()
        if measure == "largest"
    )
    return verdict, values
