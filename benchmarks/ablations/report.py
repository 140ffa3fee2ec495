"""The part of RESULTS.md on ablations: each change against the default, question by question."""

import inspect
import statistics
from typing import NamedTuple

from matplotlib import pyplot

import glue
import lorenza_optax
from benchmarks import experiments, finetuning, pretraining, tables
from benchmarks.ablations import training, variants
from benchmarks.ablations.variants import VARIANTS

# What the measurements led to, by question. A default changes where a change is better beyond its
# interval in one place and not worse in any other.
DECISIONS = {
    variants.SIGN: "`rho > 0`, an ascent, stays. With the published probe the signs cannot be told "
    "apart. With the exact direction the printed one lowers the loss of these short runs from "
    "scratch, as looking ahead downhill would; that is not what SAM is for.",
    variants.RADIUS: "0.05 stays, for want of a difference: with the published probe nothing from "
    "no perturbation to three times the radius stands out (ten times costs on STS-B), so who wants "
    "the time sets `rho=0`. With "
    '`ascent="subspace"` from scratch a smaller radius is better.',
    variants.ASCENT: '`"zo"` stays, as published: from scratch the directions that see more of the '
    "ascent lose, or gain nothing.",
    variants.TRANSPORT: '`"keep"` stays: `"rotate"` gains on the smaller Llama and loses as much '
    "or more on the larger, as in the main job (pretrain_tuning below); in fine-tuning it changes "
    "nothing that can be seen.",
    variants.SIDE: '`"std"` stays: the smaller moments of `"reverse_std"` cost loss.',
    variants.DTYPES: "Left to the user: moments in bfloat16 and int8 cost nothing that shows here.",
}
ARGUMENTS = ("rho", "mu", "estimator", "num_probes", "ascent", "moment_transport", "proj_type",
             "scale", "factor_dtype", "moment_dtype", "refresh")  # fmt: skip
LOSS, POINTS = "pretraining", "finetuning"
PANELS = {
    LOSS: "validation loss, % above the unchanged run's",
    POINTS: "points above the unchanged run",
}


def report(size, cells, records, folder):
    found, outdated = _differences(cells, records, folder.parent)
    columns_of = _Columns(found)
    rows, better, asked = [], [], None
    for name, variant in VARIANTS.items():
        if name not in found:
            continue
        question = variant.question if variant.question != asked else ""
        asked = variant.question
        columns = columns_of.of(name)
        rows.append([question, variant.label, _base(variant), *(c.shown() for c in columns)])
        if variant.is_of_default and (words := _better(columns)):
            better.append(f"{variant.question}: {variant.label} ({words})")
    path = folder / f"changes-{size}.png"
    _plot(columns_of, path)
    helpful = "none helps" if not better else f"these help: {'; '.join(better)}"
    findings = [
        f"**Defaults.** Of {len(rows)} changes ({size} size), those of LORENZA's defaults and "
        f"beyond an interval of 95 %, {helpful}. (Rows share their unchanged runs, and of forty "
        "one seems to help by chance.)"
    ]
    body = [
        "Each row is a tuned run of pre-training (the loss, in percent; less is better) and of "
        "fine-tuning (points; more is better) with one change, against the unchanged run of the "
        "same method, seed and data, with t intervals of 95 %. Two or three seeds say little of "
        "their own spread: losses go by the standard deviation that all rows of a column have in "
        "common, points, where some changes fail, by that of their own row, of all tasks about the "
        "mean of each. The learning rates are those tuned for the unchanged run, which favours it.",
        "",
        f"The defaults are {_defaults()}.",
        "",
        *tables.markdown(["question", "changed to", "against", *columns_of.titles], rows),
        "",
        f"![Each change](results/{folder.name}/{path.name})",
    ]
    if outdated:
        body += ["", f"Left out, as what they change has been tuned anew: {', '.join(outdated)}."]
    body += ["", "What they led to:", ""]
    body += [f"- {question}: {text}" for question, text in DECISIONS.items()]
    return experiments.Section(findings, body)


def _better(columns):
    """Where a change is better, and where worse; "" if it is better nowhere."""
    better, worse = (
        ", ".join(f"{column.title} {column.shown()}" for column in columns if holds(column))
        for holds in (_Column.is_better, _Column.is_worse)
    )
    return better and better + (f"; but worse in {worse}" if worse else "")


def again(size, cells, records):
    """The first change in each place."""
    expected = {}
    for cell in cells:
        if cell["id"] in records:
            result, experiment = records[cell["id"]]["result"], cell["experiment"]
            if experiment == LOSS:
                value, edges = _loss, tables.near(_loss(result), tables.SAME_LOSS)
            else:
                value = _score(cell["task"])
                edges = value(result) - tables.SAME_SCORE, value(result) + tables.SAME_SCORE
            place = _place(cell)
            expected.setdefault(place, experiments.Expectation(cell["id"], place[1], value, *edges))
    return list(expected.values())


class _Column(NamedTuple):
    """A change's differences in one place."""

    title: str
    experiment: str
    values: list
    spread: tables.Spread | None  # None for their own

    def shown(self):
        return tables.t_interval(self.values, "%" * (self.experiment == LOSS), 2, self.spread)

    def edges(self):
        return tables.t_edges(self.values, self.spread) if len(self.values) > 1 else None

    def is_better(self):
        if not (edges := self.edges()):
            return False
        return edges[1] < 0 if self.experiment == LOSS else edges[0] > 0

    def is_worse(self):
        mirrored = self._replace(values=[-value for value in self.values])
        return mirrored.is_better()


class _Columns:
    """Of all changes: a column for each Llama, for each task, and for all tasks together."""

    def __init__(self, found):
        self._found = found
        places = list(dict.fromkeys(place for of in found.values() for place in of))
        self._losses, self._tasks = (
            [place for place in places if place[0] == experiment] for experiment in (LOSS, POINTS)
        )
        self._spreads = {
            place: tables.pooled(of[place] for of in found.values() if place in of)
            for place in self._losses
        }

    def of(self, name):
        of = self._found.get(name, {})
        columns = [
            _Column(f"loss, {place[1]}", LOSS, of.get(place, []), self._spreads[place])
            for place in self._losses
        ]
        if not self._tasks:
            return columns
        tasks = [of.get(place, []) for place in self._tasks]
        columns += [
            _Column(place[1], POINTS, values, None)
            for place, values in zip(self._tasks, tasks, strict=True)
        ]
        # An average of tasks counts each alike.
        whole = len({len(values) for values in tasks}) == 1
        together = [value for values in tasks for value in values] if whole else []
        return [*columns, _Column("all tasks", POINTS, together, tables.pooled(tasks))]

    @property
    def titles(self):
        return [column.title for column in self.of(None)]

    def of_plot(self, name, experiment):
        """The smaller Llama, or all tasks."""
        columns = [column for column in self.of(name) if column.experiment == experiment]
        return columns[0 if experiment == LOSS else -1] if columns else None


def _place(cell):
    key = "model" if cell["experiment"] == LOSS else "task"
    return cell["experiment"], cell[key]


def _base(variant):
    return tables.NAMES[variant.pretraining or variant.fine_tuning]


def _loss(result):
    return tables.or_infinity(result["validation_loss"])


def _score(task):
    name = glue.TASKS[task].metrics[0]
    return lambda result: result["metrics"][name]


def _differences(cells, records, results):
    """({variant: {place: differences from the unchanged runs}}, [cells made at other rates])."""
    found, outdated, bases = {}, [], {}
    for module in (pretraining, finetuning):
        experiment = module.__name__.rpartition(".")[2]
        bases[experiment], _ = experiments.read(
            results / experiment, module.cells(cells[0]["size"])
        )
    for cell in cells:
        base = bases[cell["experiment"]].get(cell["base"])
        if cell["id"] not in records or base is None:
            continue
        ours, theirs = records[cell["id"]]["result"], base["result"]
        rates = training.rates(cell, theirs)
        if any(ours[key] != rate for key, rate in rates.items()):
            outdated.append(cell["id"])
        elif (difference := _difference(cell, ours, theirs)) is not None:
            found.setdefault(cell["variant"], {}).setdefault(_place(cell), []).append(difference)
    return found, outdated


def _difference(cell, result, base):
    if cell["experiment"] == LOSS:
        ours, theirs = result["validation_loss"], base["validation_loss"]
        return None if None in (ours, theirs) else 100 * (ours / theirs - 1)
    name = glue.TASKS[cell["task"]].metrics[0]
    ours, theirs = result["metrics"][name], base["metrics"][name]
    return None if None in (ours, theirs) else 100 * (ours - theirs)


def _defaults():
    of = inspect.signature(lorenza_optax.lorenza).parameters
    return ", ".join(f"`{name}={of[name].default!r}`" for name in ARGUMENTS)


def _plot(columns, path):
    figure, panels = pyplot.subplots(
        1, 2, figsize=(12, 1 + 0.25 * len(VARIANTS)), layout="constrained", sharey=True
    )
    names = list(reversed(VARIANTS))
    for axes, (experiment, title) in zip(panels, PANELS.items(), strict=True):
        axes.axvline(0, color="gray", linewidth=1)
        for row, name in enumerate(names):
            column = columns.of_plot(name, experiment)
            if column is None or not column.values:
                continue
            mean = statistics.fmean(column.values)
            color = "C2" if column.is_better() else "C3" if column.is_worse() else "C0"
            axes.plot(column.edges() or (mean, mean), [row, row], color=color)
            axes.plot(mean, row, "o", color=color)
        # Wide intervals of few seeds would hide the rest.
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    labels = [f"{VARIANTS[n].question.partition(' (')[0]}: {VARIANTS[n].label}" for n in names]
    panels[0].set_yticks(range(len(names)), labels, fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
