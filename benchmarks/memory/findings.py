"""What the sentences on memory say: what LORENZA saves, and where the headline is reached."""

import operator

from benchmarks import experiments
from benchmarks.memory import deviceless
from benchmarks.memory.methods import METHODS

HEADLINE = 0.67  # published: "up to 67 % less memory"
BASELINES = ("adamw", "sam", "galore_randomized", "lora")
SUBJECTS = ("lorenza", "lorenza_sketch", "lorenza_int8", "lorenza_least")
# In the sentences on single shapes.
FEATURED = ("lorenza", "lorenza_sketch", "lorenza_int8")
AGAINST = ("adamw", "galore_randomized", "galore_sketch", "lora")
BESIDE = ("galore_sketch", "lora")  # what a reader in a hurry should know, too
MEASURES = {
    "state": ("optimizer state", lambda run: run["state"]),
    "counted": ("weights, gradients and state", lambda run: counted(run)),
    "peak": ("peak of the compiled step", lambda run: run["peak"]),
}


def counted(run):
    return run["weights"] + run["state"] + max(run["gradients"], run["refresh_gradients"])


def saved(runs, subject, base, measure):
    if subject not in runs or base not in runs:
        return None
    value = MEASURES[measure][1]
    return 1 - value(runs[subject]) / value(runs[base])


def kept(run):
    return run["weights"] + run["state"]


def again(size, cells, records):
    """A step's state to the byte, and its peak nearly, as XLA plans it: LORENZA's, if it is there.

    One that is compiled for a GPU, too, where its compiler is installed.
    """
    names = (f"{size}-60M-lorenza-r128", *records)
    chosen = [name for name in names if name in records][:1]
    if deviceless.compiler() and (name := "gpu-7B-lorenza_sketch-r128") in records:
        chosen.append(name)
    expected = []
    for name in chosen:
        for key, slack in (("state", 0.0), ("peak", 0.1)):
            stored = records[name]["result"][key]
            edges = (1 - slack) * stored, (1 + slack) * stored
            expected.append(experiments.Expectation(name, key, operator.itemgetter(key), *edges))
    return expected


def findings(size, shapes, roberta, planned=None):
    found = [_on_limit(size, run) for run in roberta[:1]]
    if not shapes:
        return found
    if headline := _on_headline(size, shapes):
        found.insert(0, headline)
    preset = list(shapes)[-1][0]  # the largest
    if short := _in_short(size, preset, shapes, planned or {}):
        found.insert(0, short)
    for subject in FEATURED:
        parts = []
        for rank in sorted(rank for name, rank in shapes if name == preset):
            shares = [
                f"{_less(share)} {METHODS[base].name}'s"
                for base in AGAINST
                if (share := saved(shapes[preset, rank], subject, base, "peak")) is not None
            ]
            if shares:
                parts.append(f"at rank {rank}, {', '.join(shares)}")
        if parts:
            found.append(
                f"Memory, {preset}, {size} size: the peak of a compiled step of "
                f"{METHODS[subject].name} is, {'; '.join(parts)}."
            )
    return found


def _in_short(size, preset, shapes, planned):
    """The peak against AdamW's, by rank: of LORENZA, and of others that save as much."""
    parts = _by_rank(preset, shapes)
    if not parts:
        return parts
    dtype = next(run["dtype"] for (name, _), of in shapes.items() if name == preset
                 for run in of.values())  # fmt: skip
    text = (
        f"A Llama of {preset}, 1 x 256 tokens, in {dtype} ({size} size): the peak of a "
        f"compiled step is below AdamW's, {parts}."
    )
    if given := _given_out(preset, shapes):
        return f"**Memory on a GPU.** {text} Of steps that have run, by its allocator: {given}."
    if on_gpu := _by_rank(preset, planned):
        text += f" In bfloat16, compiled for an H100: {on_gpu}."
    if smaller := _of_smaller(preset, shapes):
        text += f" Of LORENZA at smaller shapes: {smaller}."
    return f"**Memory.** {text} Published for LORENZA: up to {100 * HEADLINE:.0f} %."


def _of_smaller(preset, shapes):
    parts = [
        f"{name} {100 * share:.0f} % (rank {rank})"
        for (name, rank), runs in shapes.items()
        if name != preset and (share := saved(runs, "lorenza", "adamw", "peak")) is not None
    ]
    return ", ".join(parts)


def _given_out(preset, shapes):
    """Of runs whose peak was that of the steps, not of what came before."""
    parts = []
    for (name, rank), runs in shapes.items():
        for subject, run in runs.items():
            ran = run.get("run", {})
            if name == preset and ran.get("peak", 0) > ran.get("peak_before", 0):
                on = [f"rank {rank}"] * METHODS[subject].has_rank + [run["device"]]
                peak = f"{ran['peak'] / 1e9:.1f} GB ({', '.join(on)})"
                parts.append(f"{METHODS[subject].name} {peak}")
    return ", ".join(dict.fromkeys(parts))


def _by_rank(preset, shapes):
    if not any(subject in runs for runs in shapes.values() for subject in FEATURED):
        return []
    ranks = sorted(rank for name, rank in shapes if name == preset)
    parts = []
    for subject in (*FEATURED, *BESIDE):
        shares = [saved(shapes[preset, rank], subject, "adamw", "peak") for rank in ranks]
        if any(share is not None for share in shares):
            percent = " / ".join("-" if s is None else f"{100 * s:.0f}" for s in shares)
            parts.append(f"{METHODS[subject].name} {percent} %")
    return parts and f"at rank {' / '.join(map(str, ranks))}, with {', '.join(parts)}"


def _on_limit(size, run):
    names = {"LORENZA": "lorenza", "with embeddings projected, too,": "lorenza_embedding"}
    shares = {text: 1 - kept(run[name]) / kept(run["adamw"]) for text, name in names.items()}
    limit = 1 - run["adamw"]["weights"] / kept(run["adamw"])
    parts = [f"{text} {100 * share:.1f} %" for text, share in shares.items()]
    return (
        f"Memory, {size} size, counted as weights and state alone (RoBERTa-base, rank "
        f"{run['rank']}, bfloat16), less than AdamW takes {', '.join(parts)}; a method without any "
        f"state would take {100 * limit:.1f} % less. In this count that is the most there can be."
    )


def _less(share):
    percent = f"{100 * abs(share):.0f}"
    if percent == "0":
        return "as much as"
    return f"{percent} % {'less' if share > 0 else 'more'} than"


def _on_headline(size, shapes):
    """Where 67 % less than AdamW is reached, and the best of what is not."""
    parts = []
    for measure, (title, _) in MEASURES.items():
        shares = {
            (preset, rank, subject): share
            for (preset, rank), runs in shapes.items()
            for subject in SUBJECTS
            if (share := saved(runs, subject, "adamw", measure)) is not None
        }
        if not shares:
            continue
        best = max(shares, key=shares.__getitem__)
        default = {key: share for key, share in shares.items() if key[2] == "lorenza"}
        counts = []
        for subject in SUBJECTS:
            of = [share for key, share in shares.items() if key[2] == subject]
            if of:
                reached = sum(share >= HEADLINE for share in of)
                counts.append(f"{METHODS[subject].name} in {reached} of {len(of)}")
        text = f"in {title} it is reached by {', '.join(counts)} cases"
        alone = [
            100 * share
            for runs in shapes.values()
            if (share := saved(runs, "adamw_int8", "adamw", measure)) is not None
        ]
        if alone:
            ends = dict.fromkeys(f"{share:.1f}" for share in (min(alone), max(alone)))
            text += f", and {METHODS['adamw_int8'].name} by itself saves {' to '.join(ends)} %"
        text += f" (best {_setting(best, shares)}"
        if default:
            text += f"; of the defaults {_setting(max(default, key=default.get), default)}"
        parts.append(f"{text})")
    return parts and (
        f"Memory, {size} size, the published headline of up to {100 * HEADLINE:.0f} % less, taken "
        f"against AdamW over shapes and ranks: {'; '.join(parts)}."
    )


def _setting(key, shares):
    preset, rank, subject = key
    gap = 100 * (shares[key] - HEADLINE)
    beside = f"{abs(gap):.1f} points {'above' if gap >= 0 else 'short'}"
    return f"{100 * shares[key]:.1f} %, {beside}: {METHODS[subject].name}, {preset}, rank {rank}"
