"""The part of RESULTS.md on speed and scale: what steps cost, how that grows, what is sent."""

import operator
import statistics

from benchmarks import experiments, tables
from benchmarks.scaling import plots
from benchmarks.scaling.devices import PLACEMENTS, sent_bytes
from benchmarks.scaling.findings import findings
from benchmarks.scaling.fits import growth, ratio, significant
from benchmarks.scaling.results import PLACES, Found, making, name_of

AXES = {
    "unrolled": "layers, unrolled",
    "scanned": "layers, scanned",
    "width": "width",
    "rank": "rank",
    "probes": "probes",
}


def report(size, cells, records, folder):
    found = Found(cells, records)
    parts = [_races(found), _work(found), _programs(found), _times(found), _messages(found)]
    body = [*_explanation(), *(line for part in parts for line in part)]
    if path := plots.growth_plot(found, folder / f"growth-{size}.png"):
        body += ["", f"![How programs and work grow](results/{folder.name}/{path.name})"]
    if path := plots.devices_plot(found, folder / f"devices-{size}.png"):
        body += ["", f"![What a device sends](results/{folder.name}/{path.name})"]
    texts = [f"**Speed.** ({size} size) {text}." for text in findings(found)]
    return experiments.Section(texts, body)


def _explanation():
    return [
        "The transformer of `benchmarks/programs.py` in float32, on bytes of text; LORENZA "
        'refreshes from sketches (`refresh="sketch"`). FLOPs and bytes come out the same in a '
        "rerun with the same versions; instructions do so on the same kind of processor. CPU "
        "seconds of compilers differ by tens of per cent. Growth is linear where each further "
        "layer or rank adds as much as the last, within 10 %, beside what does not grow. Times "
        "are of steps in turns, in one process: the ratio of each round, its median, and in "
        "brackets where 10 and 90 % of the rounds lie, within which the median of a rerun on such "
        "a machine should be. A step that refreshes is told in AdamW's median: AdamW's own steps "
        "are slower beside it.",
    ]


def _races(found):
    points = sorted({point for kind in (found.flops, found.times) for axis, point in kind
                     if axis == "race"})  # fmt: skip
    lines = []
    for point in points:
        flops, shape = found.flops.get(("race", point), ({}, None))
        times, shape = found.times.get(("race", point), ({}, shape))
        width, layers, batch, length, rank, _ = shape
        rows = []
        for name in dict.fromkeys((*flops, *times)):
            row = [name_of(name), *_flops_of(flops, name), *_time_of(times, name)]
            if name in times:
                seconds = times[name]["seconds"]
                median = statistics.median(seconds)
                row += [significant(1e3 * median), f"{batch * length / median:.0f}"]
            rows.append(row)
        lines += [
            "",
            f"Width {width}, {layers} layers, batches of {batch} x {length} tokens, rank {rank}; "
            "a step, and one that refreshes, in AdamW's:",
            "",
            *tables.markdown(
                ["optimizer", "FLOPs", "with refresh", "time", "with refresh", "ms", "tokens/s"],
                rows,
            ),
        ]
    return lines and ["", "### What a step costs", *lines]


def _flops_of(flops, name):
    if name not in flops:
        return "-", "-"
    ours, theirs = flops[name], flops["adamw"]["step"]
    refresh = ours["refresh_step"]
    return f"{ours['step'] / theirs:.2f}", "-" if refresh is None else f"{refresh / theirs:.2f}"


def _time_of(times, name):
    if name not in times:
        return ()
    ours, theirs = times[name], times["adamw"]["seconds"]
    refresh = ours["refresh_step_seconds"]
    step = _shown(ratio(ours["seconds"], theirs))
    usual = [statistics.median(theirs)] * len(refresh)
    return step, _shown(ratio(refresh, usual)) if refresh else "-"


def _shown(found):
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _work(found):
    rows = []
    for axis, title in AXES.items():
        points = found.points(found.flops, axis)
        names = dict.fromkeys(name for at in points.values() for name in at)
        for name in names if len(points) > 1 else ():
            steps = [at[name]["step"] for at in points.values()]
            ratios = [at[name]["step"] / at["adamw"]["step"] for at in points.values()]
            refreshes = [
                (at[name]["refresh_step"] - at[name]["step"]) / at["adamw"]["step"]
                for at in points.values() if at[name]["refresh_step"] is not None
            ]  # fmt: skip
            if axis in ("rank", "probes") and name == "adamw":
                continue  # has neither
            rows.append([
                title, name_of(name), _ends(points), f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                f"{refreshes[0]:.3f} to {refreshes[-1]:.3f}" if refreshes else "-",
                *_growth_columns(growth(list(points), steps)),
            ])  # fmt: skip
    head = ["axis", "optimizer", "from, to", "FLOPs, in AdamW's", "a refresh adds",
            "exponent", "last two", "FLOPs"]  # fmt: skip
    return rows and [
        "", "### How the work grows", "",
        "FLOPs of a step without a refresh in AdamW's, and what a refresh adds, at both ends; the "
        "exponents are those of a power fitted to the FLOPs themselves, and between the last two "
        "points. Decompositions are not counted (of matrices with one side of the rank).", "",
        *tables.markdown(head, rows),
    ]  # fmt: skip


def _ends(points):
    first, *_, last = points
    return f"{first}, {last}"


def _growth_columns(found):
    return f"{found.exponent:.2f}", f"{found.last_exponent:.2f}", found.word


def _programs(found):
    rows = []
    for axis, title in AXES.items():
        for name, results in found.programs.get(axis, {}).items():
            if len(results) < 2:
                continue
            points = sorted(results)
            for quantity, of_program in (
                ("instructions", operator.itemgetter("instructions")),
                ("CPU seconds", making),
            ):
                values = [of_program(results[point]) for point in points]
                first, last = values[0], values[-1]
                of = growth(points, values)
                adds = " to ".join(dict.fromkeys(map(significant, (of.smallest, of.largest))))
                rows.append([
                    title, _ends(points), "LORENZA, zo" if axis == "probes" else name_of(name),
                    quantity, significant(first), significant(last), adds, *_growth_columns(of),
                ])  # fmt: skip
    head = ["axis", "from, to", "optimizer", "quantity", "first", "last", "one more adds",
            "exponent", "last two", "growth"]  # fmt: skip
    return rows and [
        "", "### How programs grow", "",
        "Instructions of a whole step's program, those inside fusions too, and CPU seconds of all "
        "threads to trace and compile it.", "", *tables.markdown(head, rows),
    ]  # fmt: skip


def _times(found):
    rows = []
    for axis, title in AXES.items():
        for point, at in found.points(found.times, axis).items():
            for name in at:
                if name != "adamw":
                    rows.append([title, str(point), name_of(name), *_time_of(at, name)])
    head = ["axis", "at", "optimizer", "time", "with refresh"]
    return rows and [
        "", "### How times grow", "", "Times of a step and of one that refreshes, in AdamW's:", "",
        *tables.markdown(head, rows),
    ]  # fmt: skip


def _messages(found):
    lines = []
    for placement in PLACEMENTS:
        strong, weak = found.strong_and_weak(placement)
        both = [("strong", strong), ("weak", weak)]
        if strong == weak:
            both = [("strong and weak", strong)]
        for word, results in both:
            if results:
                title = f"Parameters {PLACES[placement]}, {word} scaling"
                lines += ["", *_messages_table(title, results, placement == "fsdp")]
    return lines and [
        "", "### What devices send", "",
        "MB that one device sends in a step / in one that refreshes, and the first in AdamW's. "
        "From the collectives in XLA's programs, as carried out by rings; parameters and state "
        "are replicated or fully sharded, the batch is split. Strong scaling keeps the "
        "batch, weak scaling the batch of a device; one device sends nothing. XLA chooses whether "
        "weights or, of few tokens, activations travel. For a CPU it "
        "reduces gradients in whole and slices them, where for a GPU it may leave each device its "
        'part, which sends half: "scattered" is the ratio if it did so with all.', *lines,
    ]  # fmt: skip


def _messages_table(title, results, scattering):
    first, (devices, last) = next(iter(results.values())), max(results.items())
    weights, low = (1e-6 * first[k] for k in ("weights_bytes", "low_rank_gradient_bytes"))

    def scattered(name):
        return sent_bytes(last["optimizers"][name]["step"], devices, scattered=True)

    rows = [
        [
            name_of(name),
            *(_sent_cell(at["optimizers"], name, n) for n, at in results.items()),
            *([f"{scattered(name) / scattered('adamw'):.2f}"] if scattering else []),
        ]
        for name in first["optimizers"]
    ]
    head = ["optimizer", *(f"{n} devices" for n in results)]
    head += [f"{devices}, scattered"] if scattering else []
    return [
        f"{title} (weights {weights:.2f} MB, gradients in the subspaces {low:.2f} MB):",
        "",
        *tables.markdown(head, rows),
    ]


def _sent_cell(optimizers, name, devices):
    ours = optimizers[name]
    step = sent_bytes(ours["step"], devices)
    text = significant(1e-6 * step)
    if "refresh_step" in ours:
        text += f" / {significant(1e-6 * sent_bytes(ours['refresh_step'], devices))}"
    return f"{text} ({step / sent_bytes(optimizers['adamw']['step'], devices):.2f})"
