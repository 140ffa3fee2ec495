"""The part of RESULTS.md on ablations: each change against the default, question by question."""

import inspect

from matplotlib import pyplot

import glue
import lorenza_optax
from benchmarks import experiments, tables
from benchmarks.ablations import variants
from benchmarks.ablations.variants import VARIANTS

# What the measurements led to, by question. No change was better beyond noise in both places.
DECISIONS = {
    variants.SIGN: "`rho > 0`, an ascent, stays. With the published probe the signs cannot be told "
    "apart. With the exact direction the printed one lowers the loss of these short runs from "
    "scratch, as looking ahead downhill would; that is not what SAM is for.",
    variants.RADIUS: "0.05 stays, for want of a difference: with the published probe nothing from "
    "no perturbation to ten times the radius stands out, so who wants the time sets `rho=0`. With "
    '`ascent="subspace"` from scratch a smaller radius is better.',
    variants.ASCENT: '`"zo"` stays, as published. The directions that see the ascent need the '
    "radii of SAM: at those that suit a blind probe the first moment destroys fine-tuning (STS-B).",
    variants.TRANSPORT: '`"keep"` stays: what `"rotate"` gains here it neither gains in '
    "fine-tuning nor in the main job (pretrain_tuning below).",
    variants.SIDE: '`"std"` stays: the smaller moments of `"reverse_std"` cost loss.',
    variants.DTYPES: "Left to the user: moments in bfloat16 and int8 cost nothing that shows here.",
}
ARGUMENTS = ("rho", "mu", "estimator", "num_probes", "ascent", "moment_transport", "proj_type",
             "scale", "factor_dtype", "moment_dtype", "refresh")  # fmt: skip
PANELS = {  # by experiment: what is compared, whether more of it is better
    "pretraining": ("validation loss, % above the default's", False),
    "finetuning": ("points above the default", True),
}


def report(size, cells, records, folder):
    found = _differences(cells, records, folder.parent)
    spread = _spread(found)
    rows, better, asked = [], [], None
    for name, variant in VARIANTS.items():
        loss, points = (found.get((name, experiment), []) for experiment in PANELS)
        if not loss and not points:
            continue
        question = variant.question if variant.question != asked else ""
        asked = variant.question
        shown = tables.t_interval(loss, "%", 2, spread), tables.t_interval(points, "", 2)
        rows.append([question, variant.label, *shown])
        if len(loss) > 1 and tables.t_edges(loss, spread)[1] < 0:
            better.append(f"{variant.question}: {variant.label} (loss {shown[0]})")
        if len(points) > 1 and tables.t_edges(points)[0] > 0:
            better.append(f"{variant.question}: {variant.label} (points {shown[1]})")
    path = folder / f"changes-{size}.png"
    _plot(found, path)
    helpful = "none helps" if not better else f"these help: {'; '.join(better)}"
    findings = [
        f"**Defaults.** Of {len(rows)} changes to LORENZA's choices ({size} size), beyond an "
        f"interval of 95 % {helpful}. (Of forty independent comparisons one does by chance.)"
    ]
    body = [
        "Each row is the tuned run of pre-training (the smaller Llama, standard library; a loss, "
        "so less is better) and of fine-tuning (SST-2 and STS-B; points, so more is better) "
        "with one change, against the unchanged run of the same seed, with t intervals of 95 %; "
        "of losses by the standard deviation that all changes have in common, for two or three "
        "seeds say little of their own. "
        "The learning rates are those tuned for the unchanged run, which favours it.",
        "",
        f"The defaults are {_defaults()}.",
        "",
        *tables.markdown(["question", "changed to", "loss", "points"], rows),
        "",
        f"![Each change](results/{folder.name}/{path.name})",
    ]
    if DECISIONS:
        body += ["", "What they led to:", ""]
        body += [f"- {question}: {text}" for question, text in DECISIONS.items()]
    return experiments.Section(findings, body)


def again(size, cells, records):
    """The first change in each place: its figure as far off as the changes' own seeds are."""
    expected = {}
    for cell in cells:
        of_variant = [
            c for c in cells
            if c["id"] in records
            and all(c.get(k) == cell.get(k) for k in ("variant", "experiment", "task", "method"))
        ]  # fmt: skip
        place = cell["experiment"]
        if cell["id"] in records and len(of_variant) > 1 and place not in expected:
            value = _loss if place == "pretraining" else _score(cell["task"])
            values = [value(records[c["id"]]["result"]) for c in of_variant]
            edges = tables.prediction_edges(values)
            expected[place] = experiments.Expectation(cell["id"], place, value, *edges)
    return list(expected.values())


def _spread(found):
    """Of the losses of all changes."""
    return tables.pooled(values for (_, place), values in found.items() if place == "pretraining")


def _loss(result):
    return tables.or_infinity(result["validation_loss"])


def _score(task):
    name = glue.TASKS[task].metrics[0]
    return lambda result: result["metrics"][name]


def _differences(cells, records, results):
    """{(variant, experiment): differences from the unchanged runs, one for each seed and task}."""
    found = {}
    for cell in cells:
        base = experiments.path_of(results / cell["experiment"], {"id": cell["base"]})
        if cell["id"] not in records or not base.exists():
            continue
        ours, theirs = records[cell["id"]]["result"], experiments.load_record(base)["result"]
        if (difference := _difference(cell, ours, theirs)) is not None:
            found.setdefault((cell["variant"], cell["experiment"]), []).append(difference)
    return found


def _difference(cell, result, base):
    if cell["experiment"] == "pretraining":
        ours, theirs = result["validation_loss"], base["validation_loss"]
        return None if None in (ours, theirs) else 100 * (ours / theirs - 1)
    name = glue.TASKS[cell["task"]].metrics[0]
    ours, theirs = result["metrics"][name], base["metrics"][name]
    return None if None in (ours, theirs) else 100 * (ours - theirs)


def _defaults():
    of = inspect.signature(lorenza_optax.lorenza).parameters
    return ", ".join(f"`{name}={of[name].default!r}`" for name in ARGUMENTS)


def _plot(found, path):
    figure, panels = pyplot.subplots(
        1, 2, figsize=(12, 1 + 0.25 * len(VARIANTS)), layout="constrained", sharey=True
    )
    names, spread = list(reversed(VARIANTS)), _spread(found)
    for axes, (experiment, (title, more_is_better)) in zip(panels, PANELS.items(), strict=True):
        axes.axvline(0, color="gray", linewidth=1)
        for row, name in enumerate(names):
            if values := found.get((name, experiment)):
                common = spread if experiment == "pretraining" else None
                low, high = (values[0],) * 2
                if len(values) > 1:
                    low, high = tables.t_edges(values, common)
                good = low > 0 if more_is_better else high < 0
                bad = high < 0 if more_is_better else low > 0
                color = "C2" if good else "C3" if bad else "C0"
                axes.plot([low, high], [row, row], color=color)
                axes.plot(sum(values) / len(values), row, "o", color=color)
        # Wide intervals of few seeds would hide the rest.
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    labels = [f"{VARIANTS[n].question.partition(' (')[0]}: {VARIANTS[n].label}" for n in names]
    panels[0].set_yticks(range(len(names)), labels, fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
