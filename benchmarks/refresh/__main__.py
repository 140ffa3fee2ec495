"""What a refresh costs and what it captures, beside GaLore's, and how LORENZA compiles.

    python -m benchmarks.refresh              # about half an hour on two cores
    python -m benchmarks.refresh --quick      # tiny sizes: does it run?

Sections: A the refresh of one matrix of a real gradient, beside optax.contrib.galore's; B the
energy that the randomized SVD captures, by power iterations; C a deep unrolled model, the time to
compile it and its slowest step, beside AdamW, SAM and GaLore; D the main job with refreshes from
the gradient and from sketches; E ways to find subspaces, on the same gradients. Programs are timed
in turns, and no two compile at once. Writes benchmarks/results/refresh.json and .png; a partial
run (--quick, --only) writes only where --out says. Exits with 1 if what is timed is not what it
should be.
"""

import json
import pathlib
import sys
from typing import NamedTuple

import jax
import rich.console

import machine
from benchmarks import experiments, options, programs
from benchmarks.bars import bars_table, stored
from benchmarks.programs import Shape
from benchmarks.refresh import report
from benchmarks.refresh.matrix import Matrix, captured, one_matrix
from benchmarks.refresh.sketches import sketches
from benchmarks.refresh.steps import deep_model
from benchmarks.refresh.training import main_job


class Deep(NamedTuple):
    """The model of section C, the interval of its refreshes, and its steps."""

    shape: Shape
    gap: int
    steps: int


SIZES = {
    "A": Matrix(1024, 2752, rank=64),
    "B": Matrix(1024, 2752, rank=64),
    "C": Deep(Shape(width=256, layers=24, batch=2, length=64, rank=32), gap=20, steps=100),
    "D": [],  # the defaults of examples/pretrain.py
    "E": [],
}
QUICK = {
    "A": Matrix(128, 344, rank=16),
    "B": Matrix(128, 344, rank=16),
    "C": Deep(Shape(width=64, layers=1, batch=2, length=32, rank=8), gap=5, steps=20),
    "D": ["--preset", "nano", "--steps", "16", "--update-proj-gap", "4"],
    "E": ["--preset", "nano", "--steps", "16", "--update-proj-gap", "4"],
}
SECTIONS = {"A": one_matrix, "B": captured, "C": deep_model, "D": main_job, "E": sketches}


def parse_arguments():
    parser = options.parser_of("refresh", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--rounds", type=int, help="timed calls in A and B (default: 7)")
    parser.add_argument("--compilations", type=int, help="of each program in C (default: 2)")
    parser.add_argument("--seeds", type=int, nargs="+", help="of D (default: 0 1 2)")
    parser.add_argument("--only", default="A,B,C,D,E", help="sections, such as A,C")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON and the plot")
    arguments = parser.parse_args()
    arguments.only = sorted(filter(None, arguments.only.upper().split(",")))
    if unknown := set(arguments.only) - set(SECTIONS):
        parser.error(f"--only: no section {', '.join(sorted(unknown))}")
    quick = arguments.quick
    arguments.rounds = arguments.rounds or (3 if quick else 7)
    arguments.compilations = arguments.compilations or (1 if quick else 2)
    arguments.seeds = arguments.seeds or ([0] if quick else [0, 1, 2])
    return arguments


def main():
    arguments = parse_arguments()
    # What is compiled is timed: none of it may come from another run.
    jax.config.update("jax_enable_compilation_cache", False)
    console = rich.console.Console(highlight=False)
    if not console.is_terminal:
        console.width = 130
    text, sizes = programs.Text(), QUICK if arguments.quick else SIZES
    partial = arguments.quick or arguments.only != list(SECTIONS)
    out = arguments.out or (None if partial else experiments.RESULTS)

    summary, bars, checks = {}, [], []
    for section in arguments.only:
        console.print(section)
        measure = SECTIONS[section]
        summary[section], reached, right = measure(sizes[section], arguments, text, console)
        bars, checks = bars + reached, checks + right
        for made in report.TABLES[section](summary[section]):
            console.print(made)
    console.print(bars_table(checks, "Checks of what is timed"))
    console.print(bars_table(bars))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        report.plot(summary, out / "refresh.png")
        kept = {key: getattr(arguments, key) for key in ("rounds", "compilations", "seeds")}
        summary = {
            "bars": stored(bars),
            "checks": stored(checks),
            "arguments": kept,
            **summary,
            "machine": machine.describe(),
            "versions": machine.versions(),
        }
        (out / "refresh.json").write_text(json.dumps(summary, indent=1) + "\n")
    if wrong := [check.claim for check in checks if not check.holds]:
        sys.exit(f"What was timed is not what it should be: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
