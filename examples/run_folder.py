"""The folder of a run (`--out`): what was asked for, each optimizer's part, curves and summary."""

import json
from typing import NamedTuple

import machine
import optimizers
import reporting
import training

# What a resumed run may change; everything else would change its result.
FREE_ON_RESUME = {"optimizer", "out", "resume", "checkpoint_every", "eval_every"}


class Data(NamedTuple):
    """What a run was started with beside its arguments."""

    kind: str
    description: str
    fingerprint: str


def recorded(arguments):
    return json.loads(json.dumps(vars(arguments), default=str))


def check(arguments):
    """Refuses a run folder that cannot be used; changes nothing."""
    out, record = arguments.out, arguments.out / "run.json"
    if out.exists() and not out.is_dir():
        raise SystemExit(f"--out {out}: this is a file. Give a folder.")
    if not arguments.resume:
        if out.exists() and any(out.iterdir()) and not record.exists():
            raise SystemExit(
                f"--out {out}: the folder is not empty, and what is in it is not a run of this "
                "program. Give a new folder."
            )
        return
    if not record.exists():
        raise SystemExit(
            f"--resume: there is no run in {out}. Start one without --resume, or name its "
            "folder with --out."
        )
    earlier = json.loads(record.read_text())["arguments"]
    differing = [
        f"--{name.replace('_', '-')} {earlier.get(name)} (now {value})"
        for name, value in recorded(arguments).items()
        if name not in FREE_ON_RESUME and earlier.get(name) != value
    ]
    if differing:
        raise SystemExit(
            f"--resume: the run in {out} was started with {', '.join(differing)}. Resume it "
            "with the same arguments, or start a new run in another folder with --out."
        )


def prepare(arguments, data, display):
    """Makes the run folder; an older run in it is continued or moved aside, never overwritten."""
    out, record = arguments.out, arguments.out / "run.json"
    if arguments.resume:
        if json.loads(record.read_text())[data.kind] != data.fingerprint:
            raise SystemExit(
                f"--resume: the {data.kind} ({data.description}) is not what the run in {out} was "
                "started with. Restore it, or start a new run in another folder with --out."
            )
        return
    if out.exists() and any(out.iterdir()):
        number = 1
        while (aside := out.with_name(f"{out.name}-{number}")).exists():
            number += 1
        out.rename(aside)
        display.note(f"The earlier run in {out} was moved to {aside}.")
    out.mkdir(parents=True, exist_ok=True)
    _write(record, {"arguments": recorded(arguments), data.kind: data.fingerprint})


def train_all(arguments, problem, rates, display):
    """The result of each optimizer, at `--lr` or else at its own of the learning rates."""
    results = []
    for name in arguments.optimizer:
        own = getattr(optimizers.OPTIMIZERS[name], rates)
        peak = own if arguments.lr is None else arguments.lr
        results.append(training.train(name, peak, problem, arguments.out / name, display))
    return results


def conclude(arguments, results, described, display, *, title, loss_unit, metrics=()):
    """Curves, summary and the closing table; `metrics` are keys of the results, beside the loss."""
    out = arguments.out
    lines = {
        name: [json.loads(line) for line in (out / name / "metrics.jsonl").open()]
        for name in arguments.optimizer
    }
    reporting.plot(lines, out / "loss.png", loss_unit, metrics)
    if reporting.plot_diagnostics(lines, out / "diagnostics.png"):
        display.note(f"What the subspaces and the ascent did: {out / 'diagnostics.png'}")
    ratios = reporting.relative(results)
    summary = {
        "optimizers": {
            result["optimizer"]: result | {"relative_to_adamw": ratios[result["optimizer"]]}
            for result in results
        },
        **described,
        "seed": arguments.seed,
        "arguments": recorded(arguments),
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    _write(out / "summary.json", summary)
    display.console.print(reporting.table(results, title, metrics))
    display.note(f"Curves: {out / 'loss.png'}   numbers: {out / 'summary.json'}")


def _write(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")
