"""The part of RESULTS.md on flatness: curvature and rises, ratios to GaLore, and test scores."""

import math
import statistics

from matplotlib import pyplot

from benchmarks import experiments, tables
from benchmarks.flatness.findings import (
    BASELINE,
    ENOUGH,
    MEASURES,
    PARTS,
    TITLES,
    correlation,
    headline,
    log_ratios,
    of_kind,
    shown,
)
from benchmarks.tables import NAMES


def report(size, cells, records, folder):
    by_kind, findings, body = _runs(cells, records), [], [*_explanation(cells)]
    for kind, here in by_kind.items():
        tasks = list(dict.fromkeys(task for task, _ in here))
        methods = list(dict.fromkeys(method for _, method in here))
        body += ["", f"### {TITLES[kind]} ({size} size)", "", _sameness(here)]
        for task in tasks:
            body += ["", *_values(here, task)]
        body += ["", *_ratios(here, methods, tasks), "", *_correlations(here, tasks)]
        path = folder / f"flatness-{size}-{kind}.png"
        _plot(here, tasks, path)
        body += ["", f"![Flatness and score](results/{folder.name}/{path.name})"]
        findings += of_kind(kind, size, here)
    return experiments.Section([*headline(by_kind), *findings], body)


def again(size, cells, records):
    """Of each table a run, of LORENZA where there is one."""
    expected = {}
    for cell in sorted(cells, key=lambda cell: cell["method"] not in ("lorenza_zo", "lorenza")):
        key = cell["kind"], cell["task"]
        if cell["id"] in records and key not in expected:
            stored = _eigenvalue(records[cell["id"]]["result"])
            if stored > 0:
                edges = tables.near(stored, tables.SAME_CURVATURE)
                label = "largest eigenvalue, train"
                expected[key] = experiments.Expectation(cell["id"], label, _eigenvalue, *edges)
    return list(expected.values())


def _eigenvalue(result):
    found = result["train"]["largest"]
    return -math.inf if found is None else found


def _key(cell):
    return cell["kind"], cell["task"], cell["method"], cell["seed"]


def _runs(cells, records):
    """{kind: {(task, method): results by seed}}."""
    found = {}
    for cell in cells:
        if record := records.get(cell["id"]):
            kind, task, method, seed = _key(cell)
            found.setdefault(kind, {}).setdefault((task, method), {})[seed] = record["result"]
    return found


def _explanation(cells):
    cell = cells[0]
    counts = {TITLES[c["kind"]].lower(): c["measured"] for c in cells}
    measured = " and ".join(f"{count} ({kind})" for kind, count in counts.items())
    return [
        "The final models, trained anew at the hyperparameters that were tuned for each method, "
        f"and the loss about them, in the mean over {measured} examples of their train "
        "set and as many held-out ones, the same for all methods of a seed, texts cut as in "
        "training. Largest eigenvalue: "
        "of the Hessian of all parameters, by Lanczos, until the residual is below "
        f"{100 * cell['tolerance']:g} % of it. Worst rise: the most that the loss rises at a "
        f"distance of at most {cell['rho']:g} (norm over all parameters), found in "
        f"{cell['ascent_steps']} steps of gradient ascent, so a lower bound. Relative worst rise: "
        f"the same at {cell['relative_rho']:g} where every weight is changed in units of its own "
        "size, as in adaptive SAM, which does not depend on how large the weights are. Random "
        f"rise: the mean in random directions of length {cell['rho']:g}, where float32 tells "
        "nothing below 1e-6. Slope: what the gradient alone makes of the worst rise, which is much "
        "of it where training has not come near a minimum, as in pre-training.",
        "",
        "The methods differ in their tuned learning rates, too, and flatness comes of both. "
        "Intervals are of 95 % by Student's t on logarithms of paired ratios, of what seeds differ "
        "by within their tasks; they do not hold what the choice of the hyperparameters adds, nor "
        "what other tasks would say, and where three seeds agree by luck they are too narrow. A "
        "model is called flatter or sharper by the "
        f"measures whose interval lies beyond 1; fewer than {ENOUGH} of {len(MEASURES)} show "
        "nothing by themselves, as of so many intervals one is beyond 1 by chance, and are marked "
        '"only".',
    ]


def _sameness(here):
    results = [r for by_seed in here.values() for r in by_seed.values()]
    same = sum(r["is_same"] for r in results)
    text = f"{same} of {len(results)} models came out as recorded"
    gaps = [d for r in results for d in r["differences"].values() if d is not None]
    if gaps:
        text += f" (losses and predictions differ by at most {100 * max(gaps):.2g} %)"
    return text + "."


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
                ", ".join(_spread([r["train"][key] for r in results])
                           for key in ("slope", "relative_slope")),
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
            [
                "method",
                "seeds",
                *columns,
                "slope: worst, relative",
                "random rise, most",
                "norm of weights",
                "score",
            ],
            rows,
        ),
    ]


def _spread(values):
    if None in values:
        return "diverged"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"


def _ratios(here, methods, tasks):
    columns = [(measure, part) for measure in MEASURES for part in PARTS]
    rows = [
        [
            NAMES[method],
            name,
            *(shown(log_ratios(here, method, *c, only)) for c in columns),
        ]
        for method in methods
        if method != BASELINE and any(log_ratios(here, method, *c) for c in columns)
        for name, only in [*((t, t) for t in tasks), *([("all", None)] if len(tasks) > 1 else [])]
    ]
    if not rows:
        return [f"Nothing to compare with {NAMES[BASELINE]} yet."]
    pairs = max(
        sum(map(len, log_ratios(here, m, *c).values()))
        for m in methods for c in columns if m != BASELINE
    )  # fmt: skip
    return [
        f"Ratios to {NAMES[BASELINE]} of the same task and seed, geometric means with intervals, "
        f"of at most {pairs} pairs; below 1 is flatter:",
        "",
        *tables.markdown(["method", "task", *(f"{MEASURES[m]}, {p}" for m, p in columns)], rows),
    ]


def _correlations(here, tasks):
    columns = [(measure, part) for measure in MEASURES for part in PARTS]
    rows, counts = [], []
    together = [("all", tasks)] if len(tasks) > 1 else []
    for name, of in [*((task, [task]) for task in tasks), *together]:
        found = [correlation(here, of, *column) for column in columns]
        counts += [f"{f[2]} methods and {f[3]} seeds" for f in found if f]
        rows.append([name, *("-" if f is None else f"{f[0]:+.2f} (p {f[1]:.2g})" for f in found)])
    if not counts:
        return ["Too few methods are finished to correlate flatness with scores."]
    return [
        "Spearman's correlation of sharpness with the score over the methods of a task and a seed, "
        f"in the mean (negative: flatter models score higher), of "
        f"{', '.join(dict.fromkeys(counts))}; p, for each by itself, by exchanging the scores of "
        "whole methods (so of four methods it cannot be below 1/24, of five below 1/120, and "
        "little can be shown). The findings go by the last row, with Holm's correction for the "
        "three measures:",
        "",
        *tables.markdown(["task", *(f"{MEASURES[m]}, {p}" for m, p in columns)], rows),
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
