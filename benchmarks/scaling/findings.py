"""The findings, in words that the numbers choose."""

import operator
import statistics

from benchmarks import experiments
from benchmarks.programs import Shape
from benchmarks.scaling.devices import PLACEMENTS, sent_bytes
from benchmarks.scaling.fits import growth, ratio, significant
from benchmarks.scaling.results import PLACES, making, name_of

OURS = ("rho=0", "zo, q=1", "subspace")


def again(size, cells, records):
    """The first cell of each kind: counts as they were, times nearly."""
    figures = {
        "flops": ("FLOPs of zo, of AdamW's", _flops_ratio, 0.02),
        "devices": ("bytes of rho = 0, of AdamW's", _bytes_ratio, 0.02),
        "compile": ("instructions", operator.itemgetter("instructions"), 0.1),
        "time": ("time of rho = 0, of AdamW's", _time_ratio, 0.5),
    }
    expected = {}
    for cell in cells:
        if cell["id"] in records and cell["kind"] not in expected:
            label, value, slack = figures[cell["kind"]]
            stored = value(records[cell["id"]]["result"])
            edges = stored / (1 + slack), stored * (1 + slack)
            found = experiments.Expectation(cell["id"], label, value, *edges)
            expected[cell["kind"]] = found
    return list(expected.values())


def _flops_ratio(result):
    return result["zo, q=1"]["step"] / result["adamw"]["step"]


def _bytes_ratio(result):
    sent = {
        name: sum(size for _, size in result["optimizers"][name]["step"].values())
        for name in ("rho=0", "adamw")
    }
    return sent["rho=0"] / sent["adamw"]


def _time_ratio(result):
    seconds = [result["optimizers"][name]["seconds"] for name in ("rho=0", "adamw")]
    return ratio(*seconds).median


def findings(found):
    return [*of_cost(found), *of_work(found), *of_growth(found), *of_messages(found)]


def of_cost(found):
    """Over the sizes of the races."""
    names, counted = ("sam", "galore", *OURS), found.points(found.flops, "race")
    flops = _over_sizes(counted, names, lambda at, name: at[name]["step"] / at["adamw"]["step"])
    races = found.points(found.times, "race")
    times = _over_sizes(
        races, names, lambda at, name: ratio(at[name]["seconds"], at["adamw"]["seconds"]).median
    )
    parts = []
    if times:
        refreshing = _over_sizes(races, OURS, _refreshing)
        parts.append(f"in AdamW's time {times} (one that refreshes {refreshing})")
    if flops:
        more = _over_sizes(counted, OURS[:1], _refresh)
        added = more.rpartition("= 0 ")[2]
        parts.append(
            f"in AdamW's FLOPs {flops}; a refresh adds {added}, decompositions not counted"
        )
    if not parts:
        return []
    ranks = _by_rank(found)
    return [
        f"Between refreshes a step ({_shapes(found)}) takes {'; and '.join(parts)}"
        + (f". {ranks}" if ranks else "")
    ]


def _refreshing(at, name):
    """The time of a step that refreshes, in AdamW's usual one."""
    seconds = at[name]["refresh_step_seconds"]
    return statistics.median(seconds) / statistics.median(at["adamw"]["seconds"])


def _shapes(found):
    """Of the races: what their figures are of, and may not be of others."""
    shapes = [
        Shape(*shape)
        for of in (found.flops, found.times)
        for (axis, _), (_, shape) in of.items()
        if axis == "race"
    ]
    layers, widths, lengths, shares = (
        sorted(set(values))
        for values in zip(
            *((s.layers, s.width, s.batch * s.length, s.rank / s.width) for s in shapes),
            strict=True,
        )
    )
    return (
        f"{_range(layers)} layers, width {_range(widths)}, {_range(lengths)} tokens, rank "
        f"{_range(shares)} of the width, refreshed from sketches"
    )


def _range(values):
    return " to ".join(f"{value:g}" for value in dict.fromkeys((values[0], values[-1])))


def _by_rank(found):
    """What the rank adds, on the axis of ranks."""
    shapes = {point: Shape(*of) for (axis, point), (_, of) in found.flops.items() if axis == "rank"}
    if not shapes:
        return ""
    shape = next(iter(shapes.values()))
    at = found.points(found.flops, "rank")
    parts = [
        f"{name_of(name)} "
        + ", ".join(f"{of[name]['step'] / of['adamw']['step']:.2f}" for of in at.values())
        for name in ("rho=0", "zo, q=1")
    ]
    refresh = ", ".join(f"{_refresh(of, 'zo, q=1'):.2f}" for of in at.values())
    return (
        f"In FLOPs at rank {', '.join(map(str, at))} of width {shape.width} ({shape.layers} "
        f"layers, {shape.batch * shape.length} tokens): {'; '.join(parts)}; a refresh adds "
        f"{refresh}"
    )


def _refresh(at, name):
    return (at[name]["refresh_step"] - at[name]["step"]) / at["adamw"]["step"]


def _over_sizes(points, names, value):
    texts = []
    for name in names:
        values = [value(at, name) for at in points.values() if name in at]
        if values:
            ends = dict.fromkeys(f"{end:.2f}" for end in (min(values), max(values)))
            texts.append(f"{name_of(name)} {' to '.join(ends)}")
    return ", ".join(texts)


def of_work(found):
    parts = []
    for axis, word in (("unrolled", "layers"), ("width", "width"), ("rank", "rank"),
                       ("probes", "probes")):  # fmt: skip
        points = found.points(found.flops, axis)
        name = "zo" if axis == "probes" else "zo, q=1"
        if len(points) < 3:
            continue
        steps = [at[name]["step"] for at in points.values()]
        of = growth(list(points), steps)
        exponent = "" if of.word in ("linear", "constant") else f", exponent {of.exponent:.2f}"
        how = {"linear": "a constant and a linear part"}.get(of.word, of.word)
        parts.append(f"{word} from {min(points)} to {max(points)} ({how}{exponent})")
    text = ", ".join(parts)
    return [f"The FLOPs of a step of LORENZA with zo grow with {text}"] if parts else []


def of_growth(found):
    parts = []
    for axis in ("unrolled", "scanned"):
        by_name = found.programs.get(axis, {})
        results = by_name.get("zo, q=1", {})
        common = sorted(set(results) & set(by_name.get("adamw", ())))
        if len(common) < 2:
            continue
        values = [results[point]["instructions"] for point in common]
        last = common[-1]
        ours, theirs = results[last], by_name["adamw"][last]
        seconds = making(ours), making(theirs)
        word = growth(common, values).word
        parts.append(
            f"from {common[0]} to {last} {axis} layers its program grows "
            f"{significant(values[-1] / values[0])}-fold{'' if word == 'grows' else f' ({word})'}, "
            f"and at {last} takes {significant(seconds[0])} CPU seconds to make, "
            f"{seconds[0] / seconds[1]:.1f} times AdamW's {significant(seconds[1])}"
        )
    return [f"LORENZA with zo: {'; '.join(parts)}"] if parts else []


def of_messages(found):
    parts = []
    for placement in PLACEMENTS:
        strong, _ = found.strong_and_weak(placement)
        if not strong:
            continue
        devices, result = max(strong.items())
        sent = {
            name: sent_bytes(steps["step"], devices) for name, steps in result["optimizers"].items()
        }
        shares = ", ".join(
            f"{name_of(name)} {sent[name] / sent['adamw']:.2f}"
            for name in ("galore", "sam", *OURS) if name in sent
        )  # fmt: skip
        parts.append(f"with parameters {PLACES[placement]} over {devices} devices {shares}")
    if not parts:
        return []
    shape = next(Shape(*c["shape"]) for c in found.cells.values() if c["kind"] == "devices")
    return [
        f"Between refreshes a device sends, in AdamW's bytes (layers: {shape.layers}, width "
        f"{shape.width}, rank {shape.rank}; counted as a CPU reduces, a GPU's may be larger, see "
        f"below), {'; '.join(parts)}"
    ]
