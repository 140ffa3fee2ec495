"""The part of RESULTS.md on ranks and intervals T: losses beside AdamW's of the same seeds."""

import statistics
from typing import NamedTuple

import numpy as np

from benchmarks import tables
from benchmarks.pretraining import training
from benchmarks.pretraining.paired import percent_above

TITLES = {"rank": "Rank", "update_proj_gap": "Interval T between subspaces"}


class Sweep(NamedTuple):
    """Results by seed, of the seeds that all of them have."""

    swept: str
    runs: dict  # {method: {value: {seed: result}}}, the run at the shared value among them
    retuned: dict  # {method: (value, results by seed)}, at rates of their own
    adamw: dict  # {seed: result}
    width: int  # of the model; a rank as large projects nothing
    spread: tables.Spread | None  # that the differences from AdamW have in common


def of(cells, records, swept):
    """None where nothing is swept yet."""
    planned = [cell for cell in cells if cell["kind"] == "sweep"]
    if not planned:
        return None
    place, methods = _place(planned[0]), {cell["method"] for cell in planned}
    runs, retuned, adamw = {}, {}, {}
    for cell in cells:
        record = records.get(cell["id"])
        if record is None or _place(cell) != place:
            continue
        result, method = record["result"], cell.get("method")
        if cell["kind"] == "final" and method == "adamw":
            adamw[cell["seed"]] = result
        elif cell["kind"] == "retuned" and swept == "rank":
            retuned.setdefault(method, (cell["rank"], {}))[1][cell["seed"]] = result
        elif method in methods and (cell["kind"] == "final" or cell.get("swept") == swept):
            runs.setdefault(method, {}).setdefault(cell[swept], {})[cell["seed"]] = result
    runs = {m: dict(sorted(found.items())) for m, found in runs.items() if len(found) > 1}
    everything = [adamw, *(results for found in runs.values() for results in found.values())]
    if not runs or not (seeds := set.intersection(*map(set, everything))):
        return None

    def common(results):
        return {seed: results[seed] for seed in sorted(seeds)}

    runs = {m: {v: common(results) for v, results in found.items()} for m, found in runs.items()}
    differences = [percent_above(r, adamw).values() for f in runs.values() for r in f.values()]
    retuned = {m: found for m, found in retuned.items() if set(found[1]) <= set(adamw)}
    spread = tables.pooled(map(list, differences))
    width = training.MODELS[planned[0]["size"]][place[0]].config.hidden_size
    return Sweep(swept, runs, retuned, adamw, width, spread)


def _place(cell):
    return cell["model"], cell.get("text")


def losses(results):
    return [result["validation_loss"] for result in results.values()]


def _state(sweep, results):
    """In AdamW's."""
    return f"{_bytes(results) / _bytes(sweep.adamw):.2f}x"


def _above(sweep, results):
    percent = list(percent_above(results, sweep.adamw).values())
    return tables.t_interval(percent, "%", spread=sweep.spread)


def section(sweep):
    methods = list(sweep.runs)
    rows = []
    for value in sorted({value for found in sweep.runs.values() for value in found}):
        whole = sweep.swept == "rank" and value >= sweep.width
        row = [f"{value}, nothing is projected" if whole else value]
        for method in methods:
            results = sweep.runs[method].get(value)
            if results is None:
                row += ["-"] * 3
                continue
            row += _columns(sweep, results)
        rows.append(row)
    adamw = {seed: sweep.adamw[seed] for seed in next(iter(sweep.runs[methods[0]].values()))}
    loss, count = tables.mean_and_deviation(losses(adamw), 3), len(adamw)
    for method, (value, results) in sweep.retuned.items():
        row = [f"{value}, tuned there", *["-"] * (3 * len(methods))]
        at = 1 + 3 * methods.index(method)
        row[at : at + 3] = _columns(sweep, results)
        rows.append(row)
    titles = [t for m in methods for t in (tables.NAMES[m], "above AdamW", "state")]
    return [
        f"Validation loss over {count} seed{'s' if count > 1 else ''}, paired with AdamW's "
        f"({loss}), at the rates that were tuned for the shared value, and the state in AdamW's. "
        "Intervals of 95 % are by the standard deviation that all differences of a table have in "
        "common.",
        "",
        *tables.markdown([TITLES[sweep.swept].split()[0].lower(), *titles], rows),
    ]


def _columns(sweep, results):
    loss = tables.mean_and_deviation(losses(results), 3)
    return loss, _above(sweep, results), _state(sweep, results)


def rank_finding(size, sweep):
    """Whether there is a rank at which nothing is lost, and what of the state is saved there."""
    swept = {
        rank: results
        for rank, results in sweep.runs.get("lorenza", {}).items()
        if rank < sweep.width and None not in losses(results)
    }
    if not swept:
        return []
    rank = min(swept, key=lambda value: statistics.fmean(losses(swept[value])))
    results, how = swept[rank], "at the rates tuned for another"
    if "lorenza" in sweep.retuned:
        rank, results = sweep.retuned["lorenza"]
        how = "tuned there"
    above = statistics.fmean(percent_above(results, sweep.adamw).values())
    verdict = "within" if above <= 1 else "not within"
    return [
        f"**Rank.** Pre-training ({size} size): at the best rank of those tried, {rank} of "
        f"{sweep.width}, {how}, LORENZA's validation loss is {_above(sweep, results)} above "
        f"AdamW's, {verdict} 1 %, with {_state(sweep, results)} its state. (That rank was the best "
        "by this same loss.)"
    ]


def state_finding(size, sweep):
    """LORENZA beside GaLore of as much state, which is of a larger rank."""
    ours, theirs = (sweep.runs.get(method, {}) for method in ("lorenza", "galore"))
    points = sorted(
        (_bytes(results), statistics.fmean(percent_above(results, sweep.adamw).values()))
        for rank, results in theirs.items()
        if rank < sweep.width and None not in losses(results)
    )
    parts = []
    for rank, results in ours.items():
        state = _bytes(results)
        is_between = len(points) > 1 and points[0][0] <= state <= points[-1][0]
        if is_between and rank < sweep.width and None not in losses(results):
            above = np.interp(np.log(state), np.log([x for x, _ in points]), [y for _, y in points])
            mean = statistics.fmean(percent_above(results, sweep.adamw).values())
            parts.append(f"{_state(sweep, results)} {mean:+.1f} % and {above:+.1f} %")
    return parts and [
        f"**Equal state.** Pre-training ({size} size), validation loss above AdamW's of LORENZA "
        "and of GaLore at the rank that keeps as much (interpolated), by their state in AdamW's: "
        f"{', '.join(parts)}."
    ]


def _bytes(results):
    return next(iter(results.values()))["optimizer_state_bytes"]
