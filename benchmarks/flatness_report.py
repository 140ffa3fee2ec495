"""The part of RESULTS.md on flatness: curvature and rises, ratios to GaLore, and test scores."""

import math
import statistics

import numpy as np
from matplotlib import pyplot
from scipy import stats

from benchmarks import experiments, rank_correlation, tables
from benchmarks.tables import NAMES

TITLES = {"finetuning": "Fine-tuning", "pretraining": "Pre-training"}
MEASURES = {
    "largest": "largest eigenvalue",
    "rise": "worst rise",
    "relative_rise": "relative worst rise",
}
PARTS = ("train", "test")
BASELINE = "galore"
SUBJECTS = ("lorenza_zo", "lorenza", "lorenza_subspace", "lorenza_plus")
LEVEL = 0.05


def report(size, cells, records, folder):
    runs = _runs(cells, records)
    findings, body = [], [*_explanation(cells[0])]
    for kind in dict.fromkeys(key[0] for key in runs):
        here = {key[1:]: results for key, results in runs.items() if key[0] == kind}
        tasks = list(dict.fromkeys(task for task, _ in here))
        methods = list(dict.fromkeys(method for _, method in here))
        body += ["", f"### {TITLES[kind]} ({size} size)", "", _sameness(here)]
        for task in tasks:
            body += ["", *_values(here, task)]
        body += ["", *_ratios(here, methods, tasks), "", *_correlations(here, tasks)]
        path = folder / f"flatness-{size}-{kind}.png"
        _plot(here, tasks, path)
        body += ["", f"![Flatness and score](results/{folder.name}/{path.name})"]
        findings += _flatter(kind, size, here, methods)
        findings += _goes_with_score(kind, size, here, tasks)
    return experiments.Section(findings, body)


def _runs(cells, records):
    """{(kind, task, method): results by seed}."""
    found = {}
    for cell in cells:
        if record := records.get(cell["id"]):
            key = cell["kind"], cell["task"], cell["method"]
            found.setdefault(key, {})[cell["seed"]] = record["result"]
    return found


def _explanation(cell):
    return [
        "The final models, trained anew at the hyperparameters that were tuned for each method, "
        f"and the loss about them, in the mean over {cell['measured']} examples of their train "
        "set and as many held-out ones, the same for all methods of a seed. Largest eigenvalue: "
        "of the Hessian of all parameters, by Lanczos, until the residual is below "
        f"{100 * cell['tolerance']:g} % of it. Worst rise: the most that the loss rises at a "
        f"distance of at most {cell['rho']:g} (norm over all parameters), found in "
        f"{cell['ascent_steps']} steps of gradient ascent, so a lower bound. Relative worst rise: "
        f"the same at {cell['relative_rho']:g} where every weight is changed in units of its own "
        "size, as in adaptive SAM, which does not depend on how large the weights are. Random "
        f"rise: the mean in random directions of length {cell['rho']:g}, where float32 tells "
        "nothing below 1e-6.",
        "",
        "The methods differ in their tuned learning rates, too, and flatness comes of both. "
        "Intervals are of 95 % by Student's t on logarithms of paired ratios; they do not hold "
        "what the choice of the hyperparameters adds.",
    ]


def _sameness(here):
    results = [r for by_seed in here.values() for r in by_seed.values()]
    same = sum(r["is_same"] for r in results)
    text = f"{same} of {len(results)} models came out as recorded"
    gaps = [d for r in results for d in r["differences"].values() if d is not None]
    if gaps:
        text += f" (losses and predictions differ by at most {100 * max(gaps):.2g} %)"
    return text + "; so close a rerun should come to the losses below, and to 10 % to the rest."


def _values(here, task):
    rows, scored = [], ""
    for (of, method), by_seed in here.items():
        if of == task:
            results = list(by_seed.values())
            scored = results[0]["score_name"]
            rows.append([
                NAMES[method],
                str(len(results)),
                *(_spread([r[part][key] for r in results])
                  for key in ("loss", *MEASURES) for part in PARTS),
                f"{max(abs(r[part]['random_rise'] or 0) for r in results for part in PARTS):.0e}",
                _spread([r["weight_norm"] for r in results]),
                _spread([r["score"] for r in results]),
            ])  # fmt: skip
    columns = [f"{name}, {part}" for name in ("loss", *MEASURES.values()) for part in PARTS]
    parts = [r[p] for (of, _), s in here.items() if of == task for r in s.values() for p in PARTS]
    residuals = [abs(part["residual"] / part["largest"]) for part in parts if part["largest"]]
    return [
        f"{task}: mean ± standard deviation over seeds; the score is {scored}, recorded on all "
        f"held-out examples. Residuals of the eigenvalues are at most "
        f"{100 * max(residuals, default=0):.1g} %.",
        "",
        *tables.markdown(
            ["method", "seeds", *columns, "random rise, most", "norm of weights", "score"], rows
        ),
    ]


def _spread(values):
    if None in values:
        return "diverged"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"


# Ratios to GaLore.


def _log_ratios(here, method, measure, part, only=None):
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
    half = stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / len(logs) ** 0.5
    return tuple(_exp(x) for x in (mean, mean - half, mean + half))


def _exp(x):
    return math.exp(x) if x < 700 else math.inf


def _shown(logs):
    if not logs:
        return "-"
    ratio, low, high = _interval(logs)
    return f"{ratio:.2f}" + (" (one pair)" if low is None else f" ({low:.2g} to {high:.2g})")


def _ratios(here, methods, tasks):
    columns = [(measure, part) for measure in MEASURES for part in PARTS]
    rows = [
        [
            NAMES[method],
            name,
            *(_shown(_log_ratios(here, method, *c, only)) for c in columns),
        ]
        for method in methods
        if method != BASELINE and any(_log_ratios(here, method, *c) for c in columns)
        for name, only in [*((t, t) for t in tasks), *([("all", None)] if len(tasks) > 1 else [])]
    ]
    if not rows:
        return [f"Nothing to compare with {NAMES[BASELINE]} yet."]
    pairs = max(len(_log_ratios(here, m, *c)) for m in methods for c in columns if m != BASELINE)
    return [
        f"Ratios to {NAMES[BASELINE]} of the same task and seed, geometric means with intervals, "
        f"of at most {pairs} pairs; below 1 is flatter:",
        "",
        *tables.markdown(["method", "task", *(f"{MEASURES[m]}, {p}" for m, p in columns)], rows),
    ]


def _flatter(kind, size, here, methods):
    parts = []
    for method in SUBJECTS:
        logs = {m: _log_ratios(here, method, m, "train") for m in MEASURES}
        if method in methods and logs["largest"]:
            ratios = [f"{MEASURES[m]} {_shown(values)}" for m, values in logs.items() if values]
            parts.append(f"{NAMES[method]} is {_verdict(logs)} ({'; '.join(ratios)})")
    if not parts:
        return []
    return [
        f"{TITLES[kind]} ({size} size): against {NAMES[BASELINE]}, as ratios on training examples, "
        f"{', '.join(parts)}."
    ]


def _verdict(logs):
    intervals = [_interval(values) for values in logs.values() if values]
    flatter = sum(high is not None and high < 1 for _, _, high in intervals)
    sharper = sum(low is not None and low > 1 for _, low, _ in intervals)
    if flatter and sharper:
        return "by one measure flatter and by another sharper"
    if flatter or sharper:
        word, count = ("flatter", flatter) if flatter else ("sharper", sharper)
        return f"{word}, by {count} of {len(intervals)} measures"
    return "not shown to be flatter or sharper"


# Flatness and score.


def _correlation(here, task, measure, part):
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


def _correlations(here, tasks):
    columns = [(measure, part) for measure in MEASURES for part in PARTS]
    rows, counts = [], []
    for task in tasks:
        found = [_correlation(here, task, *column) for column in columns]
        counts += [f"{f[2]} methods and {f[3]} seeds" for f in found if f]
        rows.append([task, *("-" if f is None else f"{f[0]:+.2f} (p {f[1]:.2g})" for f in found)])
    if not counts:
        return ["Too few methods are finished to correlate flatness with scores."]
    return [
        "Spearman's correlation over runs of sharpness with the score (negative: flatter models "
        f"score higher), of {', '.join(dict.fromkeys(counts))}; p by exchanging the scores of "
        "whole methods, as the seeds of one are not independent:",
        "",
        *tables.markdown(["task", *(f"{MEASURES[m]}, {p}" for m, p in columns)], rows),
    ]


def _goes_with_score(kind, size, here, tasks):
    found = {
        (task, measure): c
        for task in tasks
        for measure in MEASURES
        if (c := _correlation(here, task, measure, "train"))
    }
    if not found:
        return []
    words = []
    for text, sign in (("with flatter models the better", -1), ("with sharper ones the better", 1)):
        count = sum(p < LEVEL and sign * rho > 0 for rho, p, *_ in found.values())
        if count:
            words.append(f"{text} in {count}")
    verdict = (
        f"goes with the score ({' and '.join(words)} of {len(found)} correlations at p < {LEVEL})"
        if words
        else f"is not shown to go with the score (none of {len(found)} correlations at p < {LEVEL})"
    )
    values = ", ".join(
        f"{task} {rho:+.2f} (p {p:.2g})"
        for (task, measure), (rho, p, *_) in found.items()
        if measure == "largest"
    )
    return [
        f"{TITLES[kind]} ({size} size): flatness on training examples {verdict}; Spearman's of "
        f"the largest eigenvalue with the score: {values}."
    ]


def _plot(here, tasks, path):
    figure, panels = pyplot.subplots(
        len(tasks), len(MEASURES), figsize=(4 * len(MEASURES), 3.4 * len(tasks)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    methods = list(dict.fromkeys(method for _, method in here))
    for row, task in zip(panels, tasks, strict=True):
        for axes, (measure, title) in zip(row, MEASURES.items(), strict=True):
            for index, method in enumerate(methods):
                points = [
                    (r["train"][measure], r["score"])
                    for r in here.get((task, method), {}).values()
                    if None not in (r["train"][measure], r["score"]) and r["train"][measure] > 0
                ]
                axes.plot(*zip(*points, strict=True) if points else ([], []), "o",
                          color=f"C{index}", label=NAMES[method])  # fmt: skip
            axes.set(xscale="log", xlabel=f"{title}, train")
            axes.grid(alpha=0.3)
        names = [r["score_name"] for (of, _), s in here.items() if of == task for r in s.values()]
        row[0].set_ylabel(f"{task}: {names[0]}")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
