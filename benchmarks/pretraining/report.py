"""The part of RESULTS.md on pre-training: losses, differences, what state and time they cost."""

import statistics

import numpy as np

from benchmarks import experiments, tables
from benchmarks.pretraining import plots
from benchmarks.pretraining.methods import METHODS

SUBJECTS = ("lorenza", "lorenza_subspace")  # of the findings
BASELINES = ("adamw", "galore")


def report(size, cells, records, folder):
    finals, findings, body = _finals(cells, records), [], [*_explanation(cells[0])]
    ratios = _time_ratios(cells, records)
    for model in dict.fromkeys(key[0] for key in finals):
        body += ["", f"### {model} parameters ({size} size)"]
        for text in dict.fromkeys(key[1] for key in finals if key[0] == model):
            runs = {key[2]: found for key, found in finals.items() if key[:2] == (model, text)}
            body += ["", *_losses(runs, text, ratios.get(model, {}))]
        path = folder / f"curves-{size}-{model}.png"
        plots.curves(model, finals, ratios.get(model, {}), path)
        body += ["", f"![Losses of {model}](results/{folder.name}/{path.name})"]
        body += ["", *_differences(model, finals)]
        findings += _findings(size, model, finals)
    for swept, title in (("rank", "Rank"), ("update_proj_gap", "Interval T between subspaces")):
        if sweep := _sweep(cells, records, swept):
            path = folder / f"{swept}-{size}.png"
            adamw = _adamw_loss(cells, records)
            plots.sweep(sweep, title, adamw, path)
            body += ["", f"### {title} ({size} size)", "", *_sweep_table(sweep, title, adamw)]
            body += ["", f"![{title}](results/{folder.name}/{path.name})"]
            if swept == "rank" and adamw:
                findings += _rank_finding(size, sweep, adamw)
    return experiments.Section(findings, body)


def again(size, cells, records):
    """A final run of LORENZA, one of each sweep, and the times of AdamW's and LORENZA's steps."""

    def loss(result):
        return tables.or_infinity(result["validation_loss"])

    def ratio(result):
        ours, theirs = (np.median(result["seconds"][m]) for m in ("lorenza", "adamw"))
        return ours / theirs

    found = {}
    for cell in cells:
        key = cell["kind"], cell.get("swept")
        # As wide as LORENZA's seeds say, also for the sweeps, which have but two.
        if cell["id"] in records and cell.get("method", "lorenza") == "lorenza":
            found.setdefault(key, []).append(cell)
    seeds = [c for c in found.get(("final", None), []) if c["model"] == _first(cells)["model"]
             and c["text"] == _first(cells)["text"]]  # fmt: skip
    if len(seeds) < 2:
        return []
    low, high = tables.prediction_edges([loss(records[c["id"]]["result"]) for c in seeds])
    expected = []
    for (kind, _), [cell, *_] in found.items():
        stored = records[cell["id"]]["result"]
        if kind == "race":
            # Times of small programs on a busy machine.
            edges = ratio(stored) / 1.5, ratio(stored) * 1.5
            expected.append(experiments.Expectation(cell["id"], "time, of AdamW's", ratio, *edges))
        elif kind != "tuning":
            half = (high - low) / 2
            edges = loss(stored) - half, loss(stored) + half
            expected.append(experiments.Expectation(cell["id"], "validation loss", loss, *edges))
    return expected


def _first(cells):
    """Tuning's: the smaller model and the standard library."""
    return cells[0]


def _explanation(cell):
    return [
        f"Llamas in batches of {cell['batch_size']} sequences of {cell['seq_len']} tokens, which "
        "at the CPU's size are bytes. All methods, AdamW too, have two "
        "learning rates, one of the matrices that LORENZA projects and one of all other leaves, "
        f"tuned with {len(METHODS['adamw'].trials())} trials on the standard library, "
        "scored on a twentieth of the train part; these rates serve both texts. The rank is a "
        f"quarter of the width, T is {cell['update_proj_gap']}, rho {cell['rho']:g}.",
    ]


def _finals(cells, records):
    """{(model, text, method): results by seed}, of the seeds that all methods have, if any."""
    found = {}
    for cell in cells:
        if cell["kind"] == "final" and (record := records.get(cell["id"])):
            key = cell["model"], cell["text"], cell["method"]
            found.setdefault(key, {})[cell["seed"]] = record["result"]
    for place in {key[:2] for key in found}:
        here = [key for key in found if key[:2] == place]
        if common := set.intersection(*(set(found[key]) for key in here)):
            found |= {key: {seed: found[key][seed] for seed in sorted(common)} for key in here}
    return found


def _time_ratios(cells, records):
    """{model: {method: times of a step over AdamW's, (median, mean over a whole interval T)}}."""
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
            tables.NAMES[method],
            f"{rates[0]:g}{edge}, {rates[1]:g}",
            tables.mean_and_deviation(losses, 3),
            "-" if method == "adamw" else tables.mean_and_deviation(
                _percent_above(results, baseline), 2, "%"),
            f"{state / 1e6:.2f} MB" + (f" ({state / against:.2f}x)" if against else ""),
            "-" if normal is None else f"{normal:.2f}x, {mean:.2f}x",
        ])  # fmt: skip
    seeds = max(len(results) for results in runs.values())
    return [
        f"On the {plots.TEXTS[text]}, mean and standard deviation over {seeds} "
        f"seed{'s' if seeds > 1 else ''}; time of a step relative to AdamW's, in turns in one "
        "process: the median, and the mean with the refreshes.",
        "",
        *tables.markdown(
            ["method", "rates of matrices, others", "validation loss", "above AdamW",
             "optimizer state", "time"], rows),
    ]  # fmt: skip


def _percent_above(results, baseline):
    """Of the seeds that both have and that did not diverge."""
    pairs = [
        (result["validation_loss"], baseline[seed]["validation_loss"])
        for seed, result in results.items()
        if seed in baseline
    ]
    return [100 * (ours / theirs - 1) for ours, theirs in pairs if None not in (ours, theirs)]


def _paired(model, finals, method, baseline):
    """Relative differences in percent, text by text and seed by seed."""
    return [
        percent
        for (m, text, name), results in finals.items()
        if (m, name) == (model, method)
        for percent in _percent_above(results, finals.get((model, text, baseline), {}))
    ]


def _differences(model, finals):
    methods = dict.fromkeys(key[2] for key in finals if key[0] == model)
    rows = [
        [
            tables.NAMES[m],
            *(
                "-" if m == b else tables.t_interval(_paired(model, finals, m, b), "%")
                for b in BASELINES
            ),
        ]
        for m in methods
    ]
    return [
        "Validation loss above that of the baseline, in percent, paired over texts and seeds, "
        "with t intervals of 95 % (of few pairs, that share the tuning: a lower bound of the "
        "uncertainty):",
        "",
        *tables.markdown(["method", *(f"above {tables.NAMES[b]}" for b in BASELINES)], rows),
    ]


def _findings(size, model, finals):
    parts = []
    for method in SUBJECTS:
        against = [
            f"{tables.t_interval(pairs, '%')} to {tables.NAMES[baseline]}'s"
            for baseline in BASELINES
            if (pairs := _paired(model, finals, method, baseline))
        ]
        if against:
            parts.append(f"of {tables.NAMES[method]} {' and '.join(against)}")
    if not parts:
        return []
    return [
        f"**Loss.** Pre-training, {model} parameters ({size} size), relative difference of the "
        f"validation loss: {'; '.join(parts)}."
    ]


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
    # Nothing is swept yet where there is but the shared value.
    return {m: dict(sorted(values.items())) for m, values in found.items() if len(values) > 1}


def _sweep_table(sweep, title, adamw):
    values = sorted({value for found in sweep.values() for value in found})
    rows = [
        [tables.NAMES[m], *(tables.mean_and_deviation(found.get(value, []), 3) for value in values)]
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
        f"**Rank.** Pre-training ({size} size): at its best rank of those tried, {rank}, LORENZA's "
        f"validation loss is {above:+.1f} % above AdamW's, {verdict} 1 %."
    ]
