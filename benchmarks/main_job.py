"""Runs the main job and keeps its numbers and its figure for the README.

    python benchmarks/main_job.py [arguments of examples/pretrain.py]

Writes benchmarks/results/main_job.json (the run's summary: results, arguments, machine, versions)
and benchmarks/results/main_job.png, and prints the README's table from them.
"""

import json
import pathlib
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT.parent / "examples"))

import pretrain  # noqa: E402


def markdown(summary):
    """The closing table in Markdown."""
    rows = [
        "| optimizer | learning rate | validation loss | optimizer state | temporary memory |"
        " time per step |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in summary["optimizers"].items():
        ratio = result["relative_to_adamw"]

        def cell(field, scale, unit, result=result, ratio=ratio):
            return f"{result[field] / scale:.1f} {unit} ({ratio[field]:.2f}x)"

        rows.append(
            f"| {name} | {result['learning_rate']:g} | {result['validation_loss']:.3f} | "
            + " | ".join(
                [
                    cell("optimizer_state_bytes", 1e6, "MB"),
                    cell("temporary_bytes", 1e6, "MB"),
                    cell("seconds_per_step", 1e-3, "ms"),
                ]
            )
            + " |"
        )
    return "\n".join(rows)


def main():
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "run"
        status = pretrain.main([*sys.argv[1:], "--out", str(out)])
        if status:
            sys.exit(status)
        summary = json.loads((out / "summary.json").read_text())
        summary["arguments"].pop("out")
        for result in summary["optimizers"].values():
            # An optimizer that does nothing would be fast and small too.
            if not result["train_loss"] < 3.0:
                sys.exit(f"{result['optimizer']} has not learned: {result['train_loss']}")
        (RESULTS / "main_job.json").write_text(json.dumps(summary, indent=1) + "\n")
        shutil.copy(out / "loss.png", RESULTS / "main_job.png")
    print(markdown(summary))


if __name__ == "__main__":
    main()
