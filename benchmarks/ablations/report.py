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
from benchmarks.finetuning import paired
from benchmarks.tables import Difference

# What the measurements led to, by question. A default changes where a change is better beyond its
# interval in one place and not worse in any other.
DECISIONS = {
    variants.SIGN: "`rho > 0`, an ascent, stays. With the published probe the signs cannot be told "
    "apart. With the exact direction the printed one lowers the loss of these short runs from "
    "scratch, as looking ahead downhill would, which is not what SAM is for, and gains nothing "
    "that shows in fine-tuning.",
    variants.RADIUS: "0.05 stays, for want of a difference: with the published probe nothing from "
    "no perturbation to ten times the radius stands out, so who wants the time sets `rho=0`. With "
    '`ascent="subspace"` a third of it ends lower from scratch, though within its interval, and '
    "three times costs there and in fine-tuning. SAM, whose tuning chose the smaller of its radii "
    "on both tasks, is not better at a third of it.",
    variants.DIFFERENCE: '`"auto"` and 1e-3 stay: nothing else is told apart.',
    variants.PROBES: "1 stays: 4 and 16 find no more that shows in the loss.",
    variants.ASCENT: '`"zo"` stays, as published: from scratch the first moment\'s direction '
    "loses and the exact one ends higher, though within its interval, and in fine-tuning at the "
    "radius of zo those of the moments lose up to 20 points on some seeds and nothing on others.",
    variants.TRANSPORT: '`"keep"` stays, in doubt: `"rotate"` and `"reset"` are ahead on the '
    'smaller Llama, `"rotate"` on the main job, too (pretrain_tuning below, one seed, where '
    '`"reset"` is behind), but of `"rotate"` nothing can be seen on the larger one, nor in '
    "fine-tuning. With 20 updates between refreshes these runs are where it would matter most. Who "
    'trains from scratch should try `"rotate"`.',
    variants.SIDE: 'Of a square matrix `"std"` compresses the side that meets the input, as the '
    "published code does; until these runs it had GaLore's index and not its meaning, for PyTorch "
    'holds a layer transposed. `"std"` stays: the output side ends higher from scratch, on '
    "the larger Llama beyond its interval, at no less state.",
    variants.STEP: "1.0 stays, and the learning rate is what to tune: half the step loses, twice "
    "is within the noise.",
    variants.DTYPES: "Left to the user: moments in bfloat16 and int8, and factors in bfloat16, "
    "cost nothing that shows here.",
    variants.ADD_BACK: '`"fira"` stays: `"sumo"` ends higher from scratch, though within its '
    "interval, and does not differ in fine-tuning.",
}
ARGUMENTS = ("rho", "mu", "estimator", "num_probes", "ascent", "moment_transport", "proj_type",
             "scale", "factor_dtype", "moment_dtype", "refresh")  # fmt: skip
LOSS, POINTS, ALL = "pretraining", "finetuning", "all tasks"
PANELS = {
    LOSS: "validation loss, % above the unchanged run's",
    POINTS: "points above the unchanged run",
}


def report(size, cells, records, folder):
    found, outdated = _differences(cells, records, folder.parent)
    columns_of = _Columns(found)
    rows, better, worse, asked = [], [], [], None
    for name, variant in VARIANTS.items():
        if name not in found:
            continue
        question = variant.question if variant.question != asked else ""
        asked = variant.question
        columns = columns_of.of(name)
        rows.append([question, variant.label, _base(variant), *(c.shown() for c in columns)])
        if variant.is_of_default:
            for found_so, holds in ((better, _Column.is_better), (worse, _Column.is_worse)):
                if any(map(holds, columns)):
                    places = [c.shown_in_short() for c in columns if c.is_in_short() or holds(c)]
                    found_so.append(f"{variant.question}: {variant.label} ({', '.join(places)})")
    path = folder / f"changes-{size}.png"
    _plot(columns_of, path)
    findings = [
        f"**Defaults.** {len(rows)} changes, one at a time ({size} size), of which these change "
        "LORENZA's defaults and differ beyond an interval of 95 %; wherever else such a change was "
        "tried stands beside it. Rows share their unchanged runs, and of forty one seems to help "
        f"by chance.\n  - Help: {'; '.join(better) or 'none'}.\n  - Harm: "
        f"{'; '.join(worse) or 'none'}."
    ]
    body = [
        "Each row is a tuned run of pre-training (the loss, in percent; less is better) and of "
        "fine-tuning (points; more is better) with one change, against the unchanged run of the "
        "same method, seed and data, with intervals of 95 %. Those of losses are by Student's t, "
        "over seeds (of several texts, their mean), by a row's own standard deviation or by what "
        "all rows of a column have in common, whichever is wider: two or three seeds may agree by "
        "luck, and changes that hardly touch training vary less than the others; those of points "
        "are as under finetuning, over seeds and examples. The learning rates are those tuned for "
        "the unchanged run, which favours it.",
        "",
        f"The defaults are {_defaults()}.",
        "",
        *tables.markdown(["question", "changed to", "against", *columns_of.titles], rows),
        "",
        f"![Each change](results/{folder.name}/{path.name})",
    ]
    if outdated:
        body += ["", f"Left out, as what they change has been tuned anew: {', '.join(outdated)}."]
    if size == "cpu":  # that they are made from
        body += ["", "What they led to:", ""]
        body += [f"- {question}: {text}" for question, text in DECISIONS.items()]
    return experiments.Section(findings, body)


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
    """A change's difference in one place."""

    title: str
    experiment: str
    found: Difference | None = None  # without edges, of one seed

    def shown(self):
        if self.found is None:
            return "-"
        return self.found.shown(2, "%" * (self.experiment == LOSS))

    def shown_in_short(self):
        unit = "%" if self.experiment == LOSS else "points"
        return f"{self.title} {self.found.shown(2, unit)}"

    def is_in_short(self):
        """Not of single tasks, where all of them together say more."""
        return self.found is not None and (self.experiment == LOSS or self.title == ALL)

    def is_better(self):
        return self._is_beyond(-1 if self.experiment == LOSS else 1)

    def is_worse(self):
        return self._is_beyond(1 if self.experiment == LOSS else -1)

    def _is_beyond(self, sign):
        edges = () if self.found is None else self.found[1:]
        return bool(edges) and None not in edges and min(sign * edge for edge in edges) > 0


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
            _Column(
                f"loss, {place[1]}", LOSS,
                tables.t_difference(of[place], self._spreads[place]) if place in of else None,
            )
            for place in self._losses
        ]  # fmt: skip
        if not self._tasks:
            return columns
        tasks = [of.get(place) for place in self._tasks]
        columns += [
            _Column(place[1], POINTS, task and _of_points([task]))
            for place, task in zip(self._tasks, tasks, strict=True)
        ]
        return [*columns, _Column(ALL, POINTS, _of_points(tasks) if all(tasks) else None)]

    @property
    def titles(self):
        return [column.title for column in self.of(None)]

    def of_plot(self, name, experiment):
        """The smaller Llama, or all tasks."""
        columns = [column for column in self.of(name) if column.experiment == experiment]
        return columns[0 if experiment == LOSS else -1] if columns else None


def _of_points(tasks):
    if any(len(task.by_seed) == 1 for task in tasks):
        return Difference(statistics.fmean(float(task.by_seed[0]) for task in tasks), None, None)
    return paired.interval(tasks)


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
    """({variant: {place: a loss's percents by seed, or Paired points}}, [cells of other rates])."""
    pairs, outdated, bases = {}, [], {}
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
        else:
            of = pairs.setdefault(cell["variant"], {}).setdefault(_place(cell), [])
            of.append((cell, ours, theirs))
    found = {
        variant: {place: of for place, runs in by_place.items() if (of := _paired(place, runs))}
        for variant, by_place in pairs.items()
    }
    return found, outdated


def _paired(place, runs):
    if place[0] == POINTS:
        return paired.of_results(place[1], *([run[i] for run in runs] for i in (1, 2)))
    by_seed = {}
    for cell, ours, theirs in runs:
        losses = ours["validation_loss"], theirs["validation_loss"]
        if None not in losses:
            by_seed.setdefault(cell["seed"], []).append(100 * (losses[0] / losses[1] - 1))
    # One seed's runs on several texts share their initial weights.
    texts = len({cell["text"] for cell, *_ in runs})
    return [statistics.fmean(of) for of in by_seed.values() if len(of) == texts]


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
            if column is None or column.found is None:
                continue
            estimate, *edges = column.found
            color = "C2" if column.is_better() else "C3" if column.is_worse() else "C0"
            if None not in edges:
                axes.plot(edges, [row, row], color=color)
            axes.plot(estimate, row, "o", color=color)
        # Wide intervals of few seeds would hide the rest.
        axes.set_xscale("symlog", linthresh=1.0)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    labels = [f"{VARIANTS[n].question.partition(' (')[0]}: {VARIANTS[n].label}" for n in names]
    panels[0].set_yticks(range(len(names)), labels, fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
