"""The part of RESULTS.md on memory: a table for each shape, what LORENZA saves, a plot."""

from matplotlib import pyplot

from benchmarks import experiments, tables
from benchmarks.memory.findings import (
    BASELINES,
    HEADLINE,
    MEASURES,
    SUBJECTS,
    counted,
    findings,
    kept,
    saved,
)
from benchmarks.memory.methods import METHODS

ROBERTA_NAMES = {
    "adamw": "AdamW",
    "galore": "GaLore of Optax",
    "lora": "LoRA",
    "lorenza": "LORENZA",
    "lorenza_embedding": "LORENZA, embeddings projected",
    "lorenza_sketch": "LORENZA, embeddings projected, sketched",
}


def report(size, cells, records, folder):
    finished = [
        {**cell, "device": record["machine"]["device_kind"], **record["result"]}
        for cell in cells
        if (record := records.get(cell["id"]))
    ]
    steps = [run for run in finished if run["kind"] == "step" and not run.get("target")]
    planned = by_shape(cells, [run for run in finished if run.get("target")])
    if not steps and not planned:
        return experiments.Section([], ["No step is compiled yet."])
    main = {"dtype": cells[0]["dtype"], "batch": cells[0]["batch"], "scanned": True}
    usual = [run for run in steps if all(run[key] == value for key, value in main.items())]
    shapes = by_shape(cells, usual)
    body = _explanation(main)
    path = folder / f"memory-{size}.png"
    if shapes:
        _plot(shapes, path)
        text = "Memory of a training step by method and shape"
        body += ["", f"![{text}](results/{folder.name}/{path.name})"]
    body += ["", *_savings_table(shapes), *_for_a_gpu(planned)]
    for (preset, rank), runs in shapes.items():
        body += ["", f"### {preset}, rank {rank} ({size} size)", "", *_table_of(runs)]
    body += _others(steps, main)
    roberta = [run for run in finished if run["kind"] == "count"]
    body += _roberta(roberta)
    body += _really_run(usual)
    return experiments.Section(findings(size, shapes, roberta, planned), body)


def by_shape(cells, runs):
    """{(preset, rank): {method: run}}; methods without a rank stand at every rank."""
    keys = dict.fromkeys((c["preset"], c["rank"]) for c in cells if c["kind"] == "step")
    found = {}
    for preset, rank in sorted((key for key in keys if key[1]), key=_parameters(runs)):
        here = {
            run["method"]: run
            for run in runs
            if run["preset"] == preset and run["rank"] in (None, rank)
        }
        if any(run["rank"] for run in here.values()):
            found[preset, rank] = {name: here[name] for name in METHODS if name in here}
    return found


def _parameters(runs):
    known = {run["preset"]: run["parameters"] for run in runs if run["method"] != "lora"}
    return lambda key: (known.get(key[0], 0), key[1])


def _explanation(main):
    return [
        "Llamas of the GaLore paper's shapes, layers scanned and each rematerialized "
        f"(`jax.checkpoint`), {main['batch'][0]} x {main['batch'][1]} tokens, "
        f"{main['dtype']} weights, moments in the weights' dtype unless int8 is said. Weights, "
        "gradients and state are counted from the shapes that the optimizers' own `init` gives, "
        "to the byte; of two gradients the larger, that of an update with a refresh, is shown. "
        "The whole step, with weights and state donated, gradient, refresh and updates in one "
        "program, is compiled from shapes: its temporaries (gradients and activations among "
        "them) are XLA's, `memory_analysis().temp_size_in_bytes`, and its peak is arguments + "
        "outputs - aliased + temporaries. (The peak that JAX names itself leaves the temporaries "
        "out on a CPU, so it is not used.)",
        "",
        '"Sketched" is `refresh="sketch"`, which forms no full gradient, with '
        "`factored_updates=True` and `lorenza_optax.apply_updates`, which add updates in place; "
        '"least" has besides int8 moments, bfloat16 factors, `proj_type="reverse_std"` and the '
        "embedding projected, too. Optax has no 8-bit AdamW: that here is the library's own "
        "quantization (`moment_dtype`) with nothing projected. LoRA's adapters stand on the "
        "matrices that LORENZA projects, and their product is never formed. GaLore holds a full "
        "gradient at every step, LORENZA by default at a refresh: the peak of a training run is "
        "that of its refreshes. At the GaLore paper's ranks, a quarter to a third of the width, "
        "each low-rank array (projected gradient, moment, update, factor, sketch) is itself a "
        "quarter of the weights or more, and a refresh holds several of them; at low ranks that "
        "vanishes.",
        "",
        "What a CPU's compiler plans is not what a GPU's does. It copies donated state through "
        "conditionals, transposes operands for its matrix products, and widens bfloat16 to "
        "float32, which is why the compiled steps are of float32. So the order of methods carries "
        "over better than the sizes of the temporaries, and counts of weights and state carry over "
        "exactly. A rerun with the same versions gives the same bytes, all of them; with another "
        "jaxlib temporaries and peaks may differ, counts not.",
    ]


def _table_of(runs):
    base = runs.get("adamw")
    allocator = any("peak" in run.get("run", {}) for run in runs.values())
    rows = []
    for name, run in runs.items():
        row = [METHODS[name].name]
        gradients = max(run["gradients"], run["refresh_gradients"])
        row += [_bytes(x) for x in (run["weights"], gradients, run["state"], run["temporaries"])]
        row += [_bytes(run["peak"])]
        row += [_ratio(value(run), base and value(base)) for _, value in MEASURES.values()]
        if allocator:
            row.append(_allocator_peak(run))
        rows.append(row)
    header = ["method", "weights", "gradients", "state", "temporaries", "peak"]
    header += [f"{title} / AdamW's" for title, _ in MEASURES.values()]
    return tables.markdown(header + ["allocator's peak"] * allocator, rows)


def _allocator_peak(run):
    ran = run.get("run", {})
    if ran.get("out_of_memory"):
        return "out of memory"
    # The first weights may have taken more than the steps did.
    is_edge = "peak" in ran and ran["peak"] == ran["peak_before"]
    return "at most " * is_edge + _bytes(ran.get("peak"))


def _savings_table(shapes):
    rows = []
    for (preset, rank), runs in shapes.items():
        for subject in SUBJECTS:
            if subject in runs:
                row = [preset, str(rank), METHODS[subject].name]
                for base in BASELINES:
                    shares = [saved(runs, subject, base, measure) for measure in MEASURES]
                    row.append(" / ".join("-" if s is None else f"{100 * s:.0f}" for s in shares))
                rows.append(row)
    if not rows:
        return []
    return [
        "What LORENZA saves, in % of what the other takes (negative where it takes more): optimizer"
        " state / weights, gradients and state / peak of the compiled step. LoRA and GaLore are at "
        "the same rank.",
        "",
        *tables.markdown(
            ["shape", "rank", "", *(f"of {METHODS[b].name}'s" for b in BASELINES)], rows
        ),
    ]


def _for_a_gpu(shapes):
    lines = []
    for (preset, rank), runs in shapes.items():
        if not lines:
            target, [batch, length] = next((r["target"], r["batch"]) for r in runs.values())
            lines += [
                "",
                f"The same on a GPU, whose usual dtype is bfloat16: compiled for an {target} on a "
                f"machine without one (`benchmarks/memory/deviceless.py`), {batch} x {length} "
                "tokens. Most conversions to float32 are fused there into what reads them; what "
                "is kept in float32 (low-rank gradients, sketches) weighs twice as much beside "
                "bfloat16 weights, so at rank 1024 sketches take more than the "
                "gradient that they spare.",
            ]
        lines += ["", f"### {preset}, rank {rank}, bfloat16, for an {target}", ""]
        lines += _table_of(runs)
    return lines


def _others(steps, main):
    """Larger batches, layers unrolled, another dtype: each beside the usual step."""
    lines = []
    for preset, *batch in dict.fromkeys((run["preset"], *run["batch"]) for run in steps):
        here = _chosen(steps, preset=preset, batch=batch) if batch != main["batch"] else {}
        if here:
            rank = next((run["rank"] for run in here.values() if run["rank"]), None)
            lines += ["", f"### {preset}, rank {rank}, {batch[0]} x {batch[1]} tokens", ""]
            lines += ["Activations and logits, which no optimizer changes, take their part:", ""]
            lines += _table_of(here)
    for preset in dict.fromkeys(run["preset"] for run in steps):
        if here := _chosen(steps, preset=preset, scanned=False):
            lines += ["", f"### {preset}, layers unrolled", ""]
            lines += ["Optax's own GaLore knows no stacks of matrices:", "", *_table_of(here)]
        for dtype in dict.fromkeys(run["dtype"] for run in steps):
            here = _chosen(steps, preset=preset, dtype=dtype) if dtype != main["dtype"] else {}
            if here:
                lines += ["", f"### {preset}, {dtype} weights", ""]
                lines += [
                    "Counts halve; the temporaries are what a CPU makes of it, with float32 "
                    "copies of what it computes with:",
                    "",
                    *_table_of(here),
                ]
    return lines


def _chosen(steps, **wanted):
    here = [run for run in steps if all(run[key] == value for key, value in wanted.items())]
    return {run["method"]: run for run in here}


def _roberta(runs):
    lines = []
    for run in runs:
        rows = [
            [
                title,
                *(_bytes(run[name][key]) for key in ("weights", "gradients", "refresh_gradients")),
                _bytes(run[name]["state"]),
                f"{100 * (1 - kept(run[name]) / kept(run['adamw'])):.1f}",
                f"{100 * (1 - counted(run[name]) / counted(run['adamw'])):.1f}",
            ]
            for name, title in ROBERTA_NAMES.items()
        ]
        header = ["method", "weights", "gradients", "at a refresh", "state"]
        header += ["weights and state: % less than AdamW", "with gradients: % less than AdamW"]
        lines += ["", f"### RoBERTa-base, rank {run['rank']}, bfloat16, counted", ""]
        lines += [*tables.markdown(header, rows)]
    if lines:
        lines += [
            "",
            "Weights and AdamW's two moments are three copies of the model: 66.7 % less than that "
            "is a model without any optimizer state, the limit of every method in this count. "
            "With the gradient counted it is four copies, and the limit is 50 % for a method that "
            "forms it, 75 % for one that does not.",
        ]
    return lines


def _really_run(usual):
    rows = [
        [
            f"{run['preset']}, {METHODS[run['method']].name}",
            f"{run['state']:,}",
            f"{run['run']['state']:,}",
            f"{run['weights']:,}",
            f"{run['run']['weights']:,}",
        ]
        for run in usual
        if "state" in run.get("run", {})
    ]
    if not rows:
        return []
    head = ["", "state, counted", "state, allocated", "weights, counted", "weights, allocated"]
    return ["", "Bytes of steps that were really run:", "", *tables.markdown(head, rows)]


def _plot(shapes, path):
    columns = min(4, len(shapes))
    rows = -(-len(shapes) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(2 + 2.6 * columns, 0.5 + 3.5 * rows), layout="constrained",
        squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    for panel in axes.flat[len(shapes) :]:
        panel.axis("off")
    order = [name for name in METHODS if any(name in runs for runs in shapes.values())]
    for panel, ((preset, rank), runs) in zip(axes.flat, shapes.items(), strict=False):
        model = next(run for name, run in runs.items() if name != "lora")["weights"]
        for row, name in enumerate(reversed(order)):
            if run := runs.get(name):
                left = 0.0
                rest = run["peak"] - run["weights"] - run["state"]
                for part, color in ((run["weights"], "C7"), (run["state"], "C0"), (rest, "C1")):
                    panel.barh(row, part / model, left=left, color=color)
                    left += part / model
        if "adamw" in runs:
            panel.axvline((1 - HEADLINE) * runs["adamw"]["peak"] / model, color="k", ls=":", lw=1)
        panel.set_title(f"{preset}, rank {rank}")
        panel.set_xlabel("copies of the weights")
        panel.set_yticks(range(len(order)), [METHODS[name].name for name in reversed(order)])
        panel.grid(axis="x", alpha=0.3)
    colors = {"weights": "C7", "optimizer state": "C0", "temporaries, gradients among them": "C1"}
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    handles.append(pyplot.Line2D([0], [0], color="k", ls=":", lw=1))
    labels = [*colors, f"{100 * HEADLINE:.0f} % less than AdamW"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bytes(count):
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _ratio(value, base):
    return f"{value / base:.2f}" if base else "-"
