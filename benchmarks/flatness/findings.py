"""What the stored numbers say of flatness: ratios to a baseline, correlation with the scores.

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
ENOUGH = 2  # of the three measures: of so many intervals one is beyond 1 by chance
TITLES = {"finetuning": "Fine-tuning", "pretraining": "Pre-training"}


def baseline(method):
    """The same without perturbation, at the same rank."""
    return "adamw" if method == CONTROL else BASELINE


def log_ratios(here, method, measure, part, only=None, base=BASELINE):
    """{task: of its seeds that both have}; pairs without a logarithm are left out."""
    found = {}
    for (task, name), by_seed in here.items():
        if name != method or (task, base) not in here or only not in (None, task):
            continue
        pairs = [
            (result[part][measure], here[task, base][seed][part][measure])
            for seed, result in by_seed.items()
            if seed in here[task, base]
        ]
        if logs := [math.log(a / b) for a, b in pairs if None not in (a, b) and min(a, b) > 0]:
            found[task] = logs
    return found


def _interval(by_task):
    """(ratio, low, high), geometric means over tasks; the bounds are None where a task has a pair.

    What makes it uncertain is how seeds differ within their tasks: tasks are the same for all.
    """
    estimate = statistics.fmean(map(statistics.fmean, by_task.values()))
    if min(map(len, by_task.values())) == 1:
        return math.exp(estimate), None, None
    spreads = [(statistics.variance(logs), len(logs)) for logs in by_task.values()]
    parts = [(of / count / len(by_task) ** 2, count - 1) for of, count in spreads]
    return tuple(_exp(x) for x in tables.difference(estimate, parts))


def _exp(x):
    return math.exp(x) if x < 700 else math.inf


def shown(by_task):
    if not by_task:
        return "-"
    ratio, low, high = map(_ratio, _interval(by_task))
    return ratio + (" (a task has one pair)" if low == "-" else f" ({low} to {high})")


def _ratio(x):
    return "-" if x is None else f"{x:.2f}" if x < 10 else f"{x:.2g}"


def headline(by_kind):
    """One finding on all kinds of training: {kind: here}."""
    parts = []
    for kind, here in by_kind.items():
        subjects = _of_subjects(here)
        words = [
            f"{NAMES[method]} is {_verdict(logs)} than {NAMES[baseline(method)]} (largest "
            f"eigenvalue of the Hessian {shown(logs['largest'])} times: {_beside(here, method)}; "
            f"on held-out examples {_verdict(_logs(here, method, 'test'))})"
            for method, logs in subjects.items()
            if method != "lorenza_plus"  # which is in the section
        ]
        words += [f"flatness {score[0]}" for score in _with_score(here, PARTS[:1])]
        if words:
            parts.append(f"{TITLES[kind]}: {'; '.join(words)}.")
    text = "**Flatness** of the final models, on training examples."
    return ["\n  - ".join([text, *parts])] if parts else []


def of_kind(kind, size, here):
    """Sentences with the figures of each of the subjects, and of the correlations."""
    found = []
    for method, logs in _of_subjects(here).items():
        ratios = (
            f"{MEASURES[m]} {part} {shown(values)}"
            for m in MEASURES
            for part in PARTS
            if (values := log_ratios(here, method, m, part, base=baseline(method)))
        )
        found.append(
            f"{TITLES[kind]} ({size} size): {NAMES[method]} is {_verdict(logs)} than "
            f"{NAMES[baseline(method)]} on training examples, and on held-out ones "
            f"{_verdict(_logs(here, method, 'test'))}. Ratios: {', '.join(ratios)}. The first by "
            f"task: {_beside(here, method)}."
        )
    found += [
        f"{TITLES[kind]} ({size} size): flatness {verdict}. Spearman's of sharpness with the score "
        f"within tasks and seeds: {values}."
        for verdict, values in _with_score(here, PARTS)
    ]
    return found


def _of_subjects(here):
    """{method: {measure: log_ratios on training examples}}, of those with any."""
    ratios = {method: _logs(here, method, "train") for method in SUBJECTS}
    return {method: logs for method, logs in ratios.items() if logs["largest"]}


def _logs(here, method, part):
    base = baseline(method)
    return {measure: log_ratios(here, method, measure, part, base=base) for measure in MEASURES}


def _beside(here, method):
    """Of each task the eigenvalue, and what else differs that flatness may come of."""
    base, parts = baseline(method), []
    for task, logs in log_ratios(here, method, "largest", "train", base=base).items():
        rates = [
            _rate(next(iter(here[task, name].values()))["hyperparameters"])
            for name in (method, base)
        ]
        losses = log_ratios(here, method, "loss", "train", task, base).get(task)
        times = f"{_mean(losses)} times the loss and " if losses else ""
        parts.append(
            f"{task} {_mean(logs)} at {times}{_ratio(rates[0] / rates[1])} times the learning rate"
        )
    return "; ".join(parts)


def _mean(logs):
    return _ratio(math.exp(statistics.fmean(logs)))


def _rate(hyperparameters):
    return hyperparameters.get("matrices_rate", hyperparameters.get("learning_rate", math.nan))


def _verdict(logs):
    intervals = [_interval(by_task) for by_task in logs.values() if by_task]
    flatter = sum(high is not None and high < 1 for _, _, high in intervals)
    sharper = sum(low is not None and low > 1 for _, low, _ in intervals)
    found = [
        f"{word} (by {count} of {len(intervals)} measures{' only' if count < ENOUGH else ''})"
        for word, count in (("flatter", flatter), ("sharper", sharper))
        if count
    ]
    return " and ".join(found) or "not shown to be flatter or sharper"


def correlation(here, tasks, measure, part):
    """(Spearman's, p-value, number of methods, number of seeds), or None."""
    runs = {}  # of a method, all (task, seed)
    for (task, method), by_seed in here.items():
        if task in tasks:
            finite = {
                (task, seed): result
                for seed, result in by_seed.items()
                if None not in (result[part][measure], result["score"])
            }
            runs.setdefault(method, {}).update(finite)
    blocks = sorted(set().union(*runs.values()))
    whole = [method for method in runs if blocks and set(runs[method]) == set(blocks)]
    if len(whole) < 4:
        return None  # of three methods no order is rare
    flatness, scores = (
        np.array([[of(runs[method][block]) for block in blocks] for method in whole])
        for of in (lambda r: r[part][measure], lambda r: r["score"])
    )
    seeds = {seed for _, seed in blocks}
    return *rank_correlation.of_methods(flatness, scores), len(whole), len(seeds)


def _with_score(here, parts):
    """(whether flatness goes with the score, the correlations) in words, for each part."""
    tasks, said = {task for task, _ in here}, []
    for part in parts:
        found = {m: c for m in MEASURES if (c := correlation(here, tasks, m, part))}
        if not found:
            continue
        holds = rank_correlation.holm([p for _, p, *_ in found.values()])
        signs = {rho < 0 for (rho, *_), held in zip(found.values(), holds, strict=True) if held}
        goes = {
            (): "is not shown to go with the score",
            (True,): "goes with the score",
            (False,): "goes against the score",
        }.get(tuple(signs), "goes either way with the score")
        values = ", ".join(
            f"{MEASURES[m]} {rho:+.2f} (p {p:.2g})" for m, (rho, p, *_) in found.items()
        )
        on = {"train": "training", "test": "held-out"}[part]
        by = f" (by {sum(holds)} of {len(holds)} measures)" if any(holds) else ""
        said.append((f"on {on} examples {goes}{by}", values))
    return said
