"""The part of RESULTS.md on pre-training: losses, differences, what state and time they cost."""

import numpy as np

from benchmarks import experiments, tables
from benchmarks.pretraining import paired, plots, sweeps
from benchmarks.pretraining.methods import METHODS, OTHERS

SUBJECTS = ("lorenza", "lorenza_subspace")  # of the findings
BASELINES = ("adamw", "galore")
BESIDE = ("fira", "lorenza_plus", "muon")  # in short


def report(size, cells, records, folder):
    finals, findings, body = _finals(cells, records), [], [*_explanation(cells, records)]
    ratios = _time_ratios(cells, records)
    for model in dict.fromkeys(key[0] for key in finals):
        body += ["", f"### {model} parameters ({size} size)"]
        for text in dict.fromkeys(key[1] for key in finals if key[0] == model):
            runs = {key[2]: found for key, found in finals.items() if key[:2] == (model, text)}
            body += ["", *_losses(runs, text, ratios.get(model, {}), model == cells[0]["model"])]
        path = folder / f"curves-{size}-{model}.png"
        plots.curves(model, finals, ratios.get(model, {}), path)
        body += ["", f"![Losses of {model}](results/{folder.name}/{path.name})"]
        body += ["", *_differences(model, finals)]
    findings += _findings(size, finals)
    for swept, title in sweeps.TITLES.items():
        if sweep := sweeps.of(cells, records, swept):
            path = folder / f"{swept}-{size}.png"
            plots.sweep(sweep, title, path)
            body += ["", f"### {title} ({size} size)", "", *sweeps.section(sweep)]
            body += ["", f"![{title}](results/{folder.name}/{path.name})"]
            if swept == "rank":
                findings += sweeps.rank_finding(sweep) + sweeps.state_finding(sweep)
    return experiments.Section(_together(size, findings), body)


def again(size, cells, records):
    """A final run of LORENZA, one of each sweep, and the times of AdamW's and LORENZA's steps."""

    def loss(result):
        return tables.or_infinity(result["validation_loss"])

    def ratio(result):
        ours, theirs = (np.median(result["seconds"][m]) for m in ("lorenza", "adamw"))
        return ours / theirs

    figures = {"race": ("time, of AdamW's", ratio, 0.5)}  # of small programs on a busy machine
    expected = {}
    for cell in cells:
        key = cell["kind"], cell.get("swept")
        is_ours = cell["kind"] != "tuning" and cell.get("method", "lorenza") == "lorenza"
        if is_ours and cell["id"] in records and key not in expected:
            other = "validation loss", loss, tables.SAME_LOSS
            label, value, share = figures.get(cell["kind"], other)
            edges = tables.near(value(records[cell["id"]]["result"]), share)
            expected[key] = experiments.Expectation(cell["id"], label, value, *edges)
    return list(expected.values())


def _explanation(cells, records):
    cell = cells[0]
    finals = {c["model"]: c for c in cells if c["kind"] == "final"}
    budgets = "; ".join(
        f"{model}: {c['steps']} steps, {1e-6 * _tokens(c):.2f} M tokens, rank {c['rank']}"
        for model, c in finals.items()
    )
    return [
        f"Llamas in batches of {cell['batch_size']} sequences of {cell['seq_len']} tokens, which "
        f"at the CPU's size are bytes ({budgets}). All methods, "
        "AdamW too, have two learning rates, one of the matrices that LORENZA projects and one of "
        f"all other leaves, tuned with {len(METHODS['adamw'].trials(True))} trials (three rates of "
        "the matrices, of which tables mark the edges, and two of the others, which are edges both)"
        " on the standard library, scored on a twentieth of the train part; these rates serve both "
        f"texts.{_upper_rates(cells, records)} The rank is a quarter of the width, T is "
        f"{cell['update_proj_gap']}. The radius is not tuned, {cell['rho']:g} for all that have "
        "one; others are asked under ablations. Muon is Optax's, whose other leaves take Adam with "
        "Nesterov's momentum. Lotus refreshes by its own rule at every T-th step at most, with a "
        "threshold of 0.5 / T that is not tuned.",
    ]


def _tokens(cell):
    return cell["steps"] * cell["batch_size"] * cell["seq_len"]


def _upper_rates(cells, records):
    """Where the larger of the others' rates was chosen, a still larger one might be better."""
    chosen = {
        (cell["model"], cell["method"]): records[cell["id"]]["result"]["others_rate"]
        for cell in cells
        if cell["kind"] == "final" and cell["id"] in records
    }
    upper = [key for key, rate in chosen.items() if rate == max(OTHERS)]
    always = [m for m in METHODS if all((model, m) in upper for model, _ in chosen)]
    names = ", ".join(tables.NAMES[method] for method in always)
    if not upper:
        return ""
    return (
        f" In {len(upper)} of {len(chosen)} tunings the larger of the latter was chosen"
        + (f", of {names} always, who might gain by a still larger one" if always else "")
        + "."
    )


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


def _losses(runs, text, ratios, is_smallest):
    rows = []
    baseline = runs.get("adamw", {})
    for method, results in runs.items():
        some = next(iter(results.values()))
        losses = [r["validation_loss"] for r in results.values()]
        state = some["optimizer_state_bytes"]
        against = next(iter(baseline.values()))["optimizer_state_bytes"] if baseline else None
        rates = [float(f"{some[key]:.3g}") for key in ("matrices_rate", "others_rate")]
        offered = METHODS[method].trials(is_smallest)
        edges = {min(o[0] for o in offered), max(o[0] for o in offered)}
        edge = " (edge)" if some["matrices_rate"] in edges else ""
        normal, mean = ratios.get(method, (None, None))
        rows.append([
            tables.NAMES[method],
            f"{rates[0]:g}{edge}, {rates[1]:g}",
            tables.mean_and_deviation(losses, 3),
            "-" if method == "adamw" else tables.mean_and_deviation(
                list(paired.percent_above(results, baseline).values()), 2, "%"),
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


def _differences(model, finals):
    methods = dict.fromkeys(key[2] for key in finals if key[0] == model)
    rows = [
        [
            tables.NAMES[m],
            *("-" if m == b else _percent(model, finals, m, b) for b in BASELINES),
        ]
        for m in methods
    ]
    return [
        "Validation loss above that of the baseline, in percent, the mean over texts, paired seed "
        "by seed, with t intervals of 95 % over seeds: of a row's own standard deviation, or of "
        "what all rows have in common where that is wider, as three seeds may agree by luck. They "
        "do not hold what tuning and the choice of held-out text add, so they are a lower bound of "
        "the uncertainty:",
        "",
        *tables.markdown(["method", *(f"above {tables.NAMES[b]}" for b in BASELINES)], rows),
    ]


def _percent(model, finals, method, baseline):
    """The mean of the differences and its interval, or nothing where there are none."""
    methods = dict.fromkeys(key[2] for key in finals if key[0] == model)
    groups = (paired.over_texts(model, finals, m, baseline) for m in methods if m != baseline)
    pairs = paired.over_texts(model, finals, method, baseline)
    if not pairs:
        return ""
    return tables.t_interval(pairs, "%", spread=tables.pooled(groups))


def _findings(size, finals):
    """One for each model."""
    return [
        text for model in dict.fromkeys(key[0] for key in finals) if (text := _of(model, finals))
    ]


def _of(model, finals):
    states = {
        method: next(iter(results.values()))["optimizer_state_bytes"]
        for (name, _, method), results in finals.items()
        if name == model
    }
    parts = []
    for method in SUBJECTS:
        against = [
            f"{shown} to {tables.NAMES[baseline]}'s"
            for baseline in BASELINES
            if (shown := _percent(model, finals, method, baseline))
        ]
        if against:
            parts.append(f"of {tables.NAMES[method]} {' and '.join(against)}")
    others = [
        f"{tables.NAMES[method]} {shown}"
        for method in BESIDE
        if (shown := _percent(model, finals, method, "adamw"))
    ]
    if parts and others:
        parts.append(f"of others to AdamW's {', '.join(others)}")
    kept = [
        f"{tables.NAMES[method]} {states[method] / states['adamw']:.2f}x"
        for method in (*SUBJECTS[:1], *BASELINES[1:], *BESIDE)
        if method in states and "adamw" in states
    ]
    if parts and kept:
        parts.append(f"in AdamW's state {', '.join(kept)}")
    return parts and f"With {model} parameters: {'; '.join(parts)}."


def _together(size, parts):
    text = (
        f"**Loss.** Pre-training ({size} size) in short runs, at a rank of a quarter of the width "
        "but where another is named, relative difference of the validation loss."
    )
    return ["\n  - ".join([text, *parts])] if parts else []
