"""The part of RESULTS.md on pre-training: losses, differences, what state and time they cost."""

import statistics

import numpy as np
from matplotlib import pyplot

from benchmarks import experiments, tables
from benchmarks.pretraining_methods import METHODS

NAMES = {
    "adamw": "AdamW",
    "galore": "GaLore",
    "fira": "Fira",
    "lotus": "Lotus",
    "lorenza": "LORENZA, zo",
    "lorenza_subspace": "LORENZA, subspace",
    "lorenza_plus": "Lorenza+, zo",
    "muon": "Muon",
}
SUBJECTS = ("lorenza", "lorenza_subspace", "lorenza_plus")
BASELINES = ("adamw", "galore")
TEXTS = {"stdlib": "standard library", "text": "speeches and news"}


def report(size, cells, records, folder):
    finals, findings, body = _finals(cells, records), [], [*_explanation()]
    ratios = _time_ratios(cells, records)
    for model in dict.fromkeys(key[0] for key in finals):
        body += ["", f"### {model} parameters ({size} size)"]
        for text in dict.fromkeys(key[1] for key in finals if key[0] == model):
            runs = {key[2]: found for key, found in finals.items() if key[:2] == (model, text)}
            body += ["", *_losses(runs, text, ratios.get(model, {}))]
        path = folder / f"curves-{size}-{model}.png"
        _plot_curves(model, finals, ratios.get(model, {}), path)
        body += ["", f"![Losses of {model}](results/{folder.name}/{path.name})"]
        body += ["", *_differences(model, finals)]
        findings += _findings(size, model, finals)
    for swept, title in (("rank", "Rank"), ("update_proj_gap", "Interval T between subspaces")):
        if sweep := _sweep(cells, records, swept):
            path = folder / f"{swept}-{size}.png"
            adamw = _adamw_loss(cells, records)
            _plot_sweep(sweep, title, adamw, path)
            body += ["", f"### {title} ({size} size)", "", *_sweep_table(sweep, title, adamw)]
            body += ["", f"![{title}](results/{folder.name}/{path.name})"]
            if swept == "rank" and adamw:
                findings += _rank_finding(size, sweep, adamw)
    return experiments.Section(findings, body)


def _explanation():
    return [
        "Llamas on bytes, batches of 16 sequences of 128. All methods, AdamW too, have two "
        "learning rates, one of the matrices that LORENZA projects and one of all other leaves, "
        f"tuned with {len(METHODS['adamw'].trials())} trials on the smaller model and the "
        "standard library, scored on a twentieth of the train part; these rates serve both models "
        "and texts. The rank is a quarter of the width, T is 20, rho 0.05.",
    ]


def _finals(cells, records):
    """{(model, text, method): results by seed}."""
    found = {}
    for cell in cells:
        if cell["kind"] == "final" and (record := records.get(cell["id"])):
            key = cell["model"], cell["text"], cell["method"]
            found.setdefault(key, {})[cell["seed"]] = record["result"]
    return found


def _time_ratios(cells, records):
    """{model: {method: (time of a step over AdamW's, least, greatest), refreshes in it}}.

    The mean over a whole interval between refreshes; its spread by that over the quarters.
    """
    found = {}
    for cell in cells:
        if cell["kind"] == "race" and (record := records.get(cell["id"])):
            seconds = {m: np.asarray(s) for m, s in record["result"]["seconds"].items()}
            adamw = np.median(seconds["adamw"])
            refresh = {m: s.mean() / seconds["adamw"].mean() for m, s in seconds.items()}
            normal = {m: np.median(s) / adamw for m, s in seconds.items()}
            found[cell["model"]] = {m: (normal[m], refresh[m]) for m in seconds}
    return found


def _losses(runs, text, ratios):
    rows = []
    baseline = runs.get("adamw", {})
    for method, results in runs.items():
        some = next(iter(results.values()))
        losses = [r["validation_loss"] for r in results.values()]
        state = some["optimizer_state_bytes"]
        against = next(iter(baseline.values()))["optimizer_state_bytes"] if baseline else None
        rates = [float(f"{some[key]:.3g}") for key in ("matrices_rate", "others_rate")]
        offered = METHODS[method].trials()
        edges = {min(o[0] for o in offered), max(o[0] for o in offered)}
        edge = " (edge)" if some["matrices_rate"] in edges else ""
        normal, mean = ratios.get(method, (None, None))
        rows.append([
            NAMES[method],
            f"{rates[0]:g}{edge}, {rates[1]:g}",
            tables.mean_and_deviation(losses, 3),
            tables.mean_and_deviation(
                [100 * (losses_of(results)[s] / losses_of(baseline)[s] - 1)
                 for s in results if s in baseline
                 and None not in (losses_of(results)[s], losses_of(baseline)[s])], 2, "%"),
            f"{state / 1e6:.2f} MB" + (f" ({state / against:.2f}x)" if against else ""),
            "-" if normal is None else f"{normal:.2f}x, {mean:.2f}x",
        ])  # fmt: skip
    seeds = max(len(results) for results in runs.values())
    return [
        f"On the {TEXTS[text]}, mean and standard deviation over {seeds} "
        f"seed{'s' if seeds > 1 else ''}; time of a step relative to AdamW's, in turns in one "
        "process: the median, and the mean with the refreshes.",
        "",
        *tables.markdown(
            ["method", "rates of matrices, others", "validation loss", "above AdamW",
             "optimizer state", "time"], rows),
    ]  # fmt: skip


def losses_of(results):
    return {seed: result["validation_loss"] for seed, result in results.items()}


def _paired(model, finals, method, baseline):
    """Relative differences in percent, text by text and seed by seed."""
    return [
        100 * (ours / theirs - 1)
        for (m, text, name), results in finals.items()
        if (m, name) == (model, method)
        for seed, ours in losses_of(results).items()
        if ours is not None
        and (theirs := losses_of(finals.get((model, text, baseline), {})).get(seed)) is not None
    ]


def _differences(model, finals):
    methods = dict.fromkeys(key[2] for key in finals if key[0] == model)
    rows = [
        [NAMES[m], *(tables.t_interval(_paired(model, finals, m, b), "%") for b in BASELINES)]
        for m in methods
    ]
    return [
        "Validation loss above that of the baseline, in percent, paired over texts and seeds, "
        "with t intervals of 95 % (of few pairs, that share the tuning: a lower bound of the "
        "uncertainty):",
        "",
        *tables.markdown(["method", *(f"above {NAMES[b]}" for b in BASELINES)], rows),
    ]


def _findings(size, model, finals):
    found = []
    for method in SUBJECTS:
        parts = [
            f"{NAMES[b]} by {tables.t_interval(pairs, '%')}"
            for b in BASELINES
            if (pairs := _paired(model, finals, method, b))
        ]
        if parts:
            found.append(
                f"Pre-training {model} ({size} size): the validation loss of {NAMES[method]} is "
                f"above that of {', and above that of '.join(parts)}."
            )
    return found


def _adamw_loss(cells, records):
    """AdamW's mean loss where the sweeps are made, over the same seeds."""
    swept = [cell for cell in cells if cell["kind"] == "sweep"]
    if not swept:
        return None
    seeds = {cell["seed"] for cell in swept}
    losses = [
        records[cell["id"]]["result"]["validation_loss"]
        for cell in cells
        if cell["id"] in records and cell["kind"] == "final" and cell["method"] == "adamw"
        and cell["seed"] in seeds
        and (cell["model"], cell["text"]) == (swept[0]["model"], swept[0]["text"])
    ]  # fmt: skip
    return statistics.fmean(losses) if losses and None not in losses else None


def _sweep(cells, records, swept):
    """{method: {value: losses}}, with the runs at the shared value among them."""
    here = [cell for cell in cells if cell["kind"] == "sweep"]
    models = {(cell["model"], cell["text"]) for cell in here}
    methods, seeds = ({cell[key] for cell in here} for key in ("method", "seed"))
    found = {}
    for cell in cells:
        same = (
            cell["kind"] == "final" and (cell["model"], cell["text"]) in models
            and cell["method"] in methods and cell["seed"] in seeds
        )  # fmt: skip
        if (same or cell.get("swept") == swept) and (record := records.get(cell["id"])):
            loss = record["result"]["validation_loss"]
            by_value = found.setdefault(cell["method"], {})
            by_value.setdefault(cell[swept], []).append(float("nan") if loss is None else loss)
    return {m: dict(sorted(values.items())) for m, values in found.items()}


def _sweep_table(sweep, title, adamw):
    values = sorted({value for found in sweep.values() for value in found})
    rows = [
        [NAMES[m], *(tables.mean_and_deviation(found.get(value, []), 3) for value in values)]
        for m, found in sweep.items()
    ]
    note = "" if adamw is None else f" AdamW: {adamw:.3f}."
    return [f"Validation loss at each value, two seeds.{note}", "",
            *tables.markdown([title.split()[0].lower(), *map(str, values)], rows)]  # fmt: skip


def _rank_finding(size, sweep, adamw):
    if "lorenza" not in sweep:
        return []
    rank, losses = min(sweep["lorenza"].items(), key=lambda item: statistics.fmean(item[1]))
    above = 100 * (statistics.fmean(losses) / adamw - 1)
    verdict = "within" if above <= 1 else "not within"
    return [
        f"Pre-training ({size} size): at its best rank of those tried, {rank}, LORENZA's "
        f"validation loss is {above:+.1f} % above AdamW's, {verdict} 1 %."
    ]


def _plot_curves(model, finals, ratios, path):
    texts = list(dict.fromkeys(key[1] for key in finals if key[0] == model))
    figure, panels = pyplot.subplots(
        len(texts), 3, figsize=(13, 3.8 * len(texts)), layout="constrained", squeeze=False
    )
    for row, text in zip(panels, texts, strict=True):
        for index, method in enumerate(NAMES):
            if not (results := finals.get((model, text, method))):
                continue
            curve = np.asarray(next(iter(results.values()))["curve"])
            state = next(iter(results.values()))["optimizer_state_bytes"] / 1e6
            if not curve.size:
                continue
            style = {"color": f"C{index}", "label": NAMES[method]}
            row[0].plot(curve[:, 0], curve[:, 2], **style)
            if method in ratios:
                row[1].plot(curve[:, 0] * ratios[method][1], curve[:, 2], **style)
            row[2].plot(state, curve[-1, 2], "o", **style)
        row[0].set_ylabel(f"validation loss, {TEXTS[text]}")
        for axes, label in zip(
            row, ("steps", "time, in steps of AdamW", "optimizer state, MB"), strict=True
        ):
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_sweep(sweep, title, adamw, path):
    figure, axes = pyplot.subplots(figsize=(5.5, 3.8), layout="constrained")
    for method, found in sweep.items():
        axes.plot(list(found), [np.mean(v) for v in found.values()], "o-", label=NAMES[method])
    if adamw is not None:
        axes.axhline(adamw, color="gray", linestyle="--", label="AdamW")
    axes.set(xscale="log", xlabel=title, ylabel="validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
