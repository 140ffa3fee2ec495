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
    retuned = {m: found for m, found in retuned.items() if set(found[1]) <= set(adamw)}
    width = training.MODELS[planned[0]["size"]][place[0]].config.hidden_size
    return Sweep(swept, runs, retuned, adamw, width)


def _place(cell):
    return cell["model"], cell.get("text")


def losses(results):
    return [result["validation_loss"] for result in results.values()]


def _state(sweep, results):
    """In AdamW's."""
    return f"{_bytes(results) / _bytes(sweep.adamw):.2f}x"


def _above(sweep, results):
    return list(percent_above(results, sweep.adamw).values())


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
    for rank in sorted({value for value, _ in sweep.retuned.values()}):
        row = [f"{rank}, tuned there"]
        for method in methods:
            value, results = sweep.retuned.get(method, (None, None))
            row += _columns(sweep, results) if value == rank else ["-"] * 3
        rows.append(row)
    titles = [t for m in methods for t in (tables.NAMES[m], "above AdamW", "state")]
    seeds = sorted({len(results) for _, results in sweep.retuned.values()})
    over = " or ".join(map(str, seeds))
    tuned = f" Tuned there are rates of that rank's own, over {over} seeds." if seeds else ""
    return [
        f"Validation loss over {count} seed{'s' if count > 1 else ''}, paired with AdamW's "
        f"({loss}), at the rates that were tuned for the shared value, and the state in AdamW's. "
        "Means and standard deviations: of so few seeds no interval says much. All rows share "
        f"AdamW's runs, so that rows can be told apart better than each from AdamW.{tuned}",
        "",
        *tables.markdown([TITLES[sweep.swept].split()[0].lower(), *titles], rows),
    ]


def _columns(sweep, results):
    loss = tables.mean_and_deviation(losses(results), 3)
    above = tables.mean_and_deviation(_above(sweep, results), 1, "%")
    return loss, above, _state(sweep, results)


def rank_finding(sweep):
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
    retuned = {m: found for m, found in sweep.retuned.items() if _above(sweep, found[1])}
    if "lorenza" in retuned:
        rank, results = retuned["lorenza"]
        how = "tuned there"
    above = tables.t_difference(_above(sweep, results))
    text = (
        f"At the best rank of those tried, {rank} of {sweep.width}, {how}, LORENZA's validation "
        f"loss differs from AdamW's by {above.shown(1, '%')}, {_within(above)}, with "
        f"{_state(sweep, results)} its state."
    )
    beside, of_galore = retuned.get("galore", (None, None))
    if beside == rank and "lorenza" in retuned:
        galore = tables.t_difference(_above(sweep, of_galore)).shown(1, "%")
        text += f" GaLore's, tuned there, too, by {galore}, with {_state(sweep, of_galore)}."
    return [f"{text} (That rank was LORENZA's best by this same loss.)"]


def _within(above, limit=1):
    """Whether a loss is as near to AdamW's as was asked for, in percent."""
    if not above.estimate <= limit:
        return f"not within {limit} %"
    is_sure = above.high is not None and above.high <= limit
    return f"within {limit} %" + ("" if is_sure else " in the mean, though not beyond doubt")


def state_finding(sweep):
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
        "At equal state: loss above AdamW's of LORENZA and of GaLore at the rank that keeps as "
        f"much (interpolated), by their state in AdamW's: {', '.join(parts)}."
    ]


def _bytes(results):
    return next(iter(results.values()))["optimizer_state_bytes"]
