"""The folder of a run (`--out`): what was asked for, each optimizer's part, curves and summary."""

import json

import machine
import optimizers
import reporting
import run_record
import training


def prepare(arguments, data, display):
    """Makes the run folder; an older run in it is continued or moved aside, never overwritten."""
    out = arguments.out
    if arguments.resume:
        run_record.check_data(out, data)
        return
    if out.exists() and any(out.iterdir()):
        number = 1
        while (aside := out.with_name(f"{out.name}-{number}")).exists():
            number += 1
        out.rename(aside)
        display.note(f"The earlier run in {out} was moved to {aside}.")
    out.mkdir(parents=True, exist_ok=True)
    run_record.write(arguments, **{data.kind: data.fingerprint})


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
        "arguments": run_record.recorded(arguments),
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    run_record.write_json(out / "summary.json", summary)
    display.console.print(reporting.table(results, title, metrics))
    display.note(f"Curves: {out / 'loss.png'}   numbers: {out / 'summary.json'}")
