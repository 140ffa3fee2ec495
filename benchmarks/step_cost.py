"""What a step of LORENZA costs beside AdamW's, GaLore's and SAM's: time, memory, bytes sent.

    python -m benchmarks.step_cost              # some minutes on two cores
    python -m benchmarks.step_cost --quick      # tiny sizes: does it run?

All optimizers run in one process, in turns, each with its whole step compiled and its state
donated. Sections: A the ascents; B a step without perturbation; C a scanned stack of layers; D
data parallel on eight simulated devices; and always E, the check of what is timed against
gradients in full and NumPy. Writes benchmarks/results/step_cost.json and .png; a partial run
(--quick, --only) writes only where --out says. Exits with 1 if E fails.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import rich.console
import rich.table

import lorenza_optax
import machine
from benchmarks import experiments, measuring, options, programs
from benchmarks.bars import Bar, bars_table, stored
from benchmarks.programs import Shape, Variant
from reporting import pyplot

SIZES = {
    "A": Shape(width=512, layers=4, batch=2, length=128, rank=32),
    "B": Shape(width=1024, layers=2, batch=16, length=128, rank=64),
    "C": Shape(width=512, layers=12, batch=2, length=128, rank=32, scanned=True),
    "D": Shape(width=512, layers=2, batch=8, length=32, rank=32),
}
QUICK = {
    section: size._replace(width=128, layers=1 + 2 * size.scanned, length=size.length // 4, rank=8)
    for section, size in SIZES.items()
}
CHECKED = Shape(width=64, layers=1, batch=2, length=16, rank=8)
OTHERS = ("adamw", "galore", "sam")
SCANNED = ("rho=0", "rho=0, optax's apply", "rho=0, own apply")
ASCENTS = tuple(name for name in programs.OPTIMIZERS if name not in (*OTHERS, *SCANNED[1:]))
SENDING = ("rho=0", "zo, q=1", "zo, q=1, gradient", "subspace")
ONE_STEP = ("rho=0", "rho=0, own apply", "subspace")
TOLERANCE = 1e-3  # of an update, relative, in E
DEVICES = 8


def ascents(shape, rounds, text, note):
    found = measuring.race(shape, (*OTHERS, *ASCENTS), rounds, text, note)
    costs = found["optimizers"]
    saved = 1 - measuring.ratio(costs["subspace"], costs["sam"])
    return found, [
        Bar("A", "q=4: extra temporary memory, copies", costs["zo, q=4"]["extra_copies"], "<=", 1),
        Bar("A", "q=1: time / AdamW's", costs["zo, q=1"]["time_ratio"], "<=", 1.7),
        Bar("A", "q=4: time / AdamW's", costs["zo, q=4"]["time_ratio"], "<=", 3.5),
        Bar("A", "subspace: time / AdamW's", costs["subspace"]["time_ratio"], "<=", 1.45),
        Bar("A", "subspace: share of SAM's time saved", saved, ">=", 0.25),
    ]


def without_perturbation(shape, rounds, text, note):
    found = measuring.race(shape, (*OTHERS, *ONE_STEP), max(3, rounds // 3), text, note)
    batch = text.batch(shape, 0)
    note("  compiling without the refresh")
    variants = [Variant("adamw"), Variant("sam"), *(Variant(name, False) for name in ONE_STEP)]
    for variant, program in programs.compile_steps(variants, shape, batch).items():
        found["optimizers"][variant.name]["flops"] = program.cost_analysis()["flops"]
    costs = found["optimizers"]
    share = costs["rho=0"]["flops"] / costs["adamw"]["flops"]
    return found, [
        Bar("B", "rho=0: time / AdamW's", costs["rho=0"]["time_ratio"], "<=", 0.85),
        Bar("B", "rho=0: FLOPs / AdamW's, no refresh", share, "<=", 0.8),
    ]


def scanned_stack(shape, rounds, text, note):
    del rounds
    batch = text.batch(shape, 0)
    params = jax.eval_shape(lambda: programs.init(shape))
    stack = programs.tree_bytes(params["layers"])
    # optax.contrib.galore cannot train stacks of matrices.
    note("  compiling")
    variants = [Variant(name) for name in ("adamw", "sam", *SCANNED)]
    variants += [Variant(name, False) for name in SCANNED]
    compiled = programs.compile_steps(variants, shape, batch)
    needed = {variant: programs.temporary_bytes(one) for variant, one in compiled.items()}
    results = {}
    for (name, refresh), needs in needed.items():
        saved = (needed[Variant("adamw")] - needs) / stack
        suffix = "" if refresh else "_without_refresh"
        found = {f"temporary_bytes{suffix}": needs, f"saved_stacks{suffix}": saved}
        results.setdefault(name, {}).update(found)
    saved = results["rho=0, own apply"]["saved_stacks"]
    bar = Bar("C", "own apply: memory below AdamW's, stacks", saved, ">=", 0.8)
    return {"shape": shape._asdict(), "stack_bytes": stack, "optimizers": results}, [bar]


def data_parallel(shape, rounds, text, note):
    """Compiles in a process of its own, which pretends to have eight devices."""
    del rounds, text
    note(f"  in a process with {DEVICES} devices")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.step_cost", "--collectives", json.dumps(shape)],
        cwd=experiments.ROOT.parent,
        env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(child.stdout.splitlines()[-1])
    costs, floor = found["optimizers"], found["floor_bytes"]
    whole = costs["rho=0"]["bytes"] / costs["adamw"]["bytes"]
    normal = costs["rho=0"]["bytes_without_refresh"] / floor
    return found, [
        Bar("D", "rho=0: all collectives / AdamW's", whole, "<=", 0.5),
        Bar("D", "rho=0: a normal step's / (r n + others)", normal, "<=", 1.2),
    ]


def collectives(shape):
    """What the child of `data_parallel` prints."""
    assert jax.device_count() == DEVICES
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = programs.Text().batch(shape, 0)
    params = jax.eval_shape(lambda: programs.init(shape))
    plan = lorenza_optax.projection_plan(params, shape.rank)
    numbers = [np.prod(leaf.low_rank_shape) for leaf in plan.projected.values()]
    numbers += [np.prod(leaf.shape) for leaf in plan.others.values()]
    results = {name: {} for name in (*OTHERS, *SENDING)}
    variants = [*map(Variant, results), *(Variant(name, False) for name in SENDING)]
    for variant, program in programs.compile_steps(variants, shape, batch, mesh).items():
        found = programs.collective_bytes(program.as_text())
        key = "bytes" if variant.refresh else "bytes_without_refresh"
        results[variant.name] |= {key: sum(found.values()), f"kinds_of_{key}": found}
    return {
        "shape": shape._asdict(),
        "devices": DEVICES,
        "weights_bytes": programs.tree_bytes(params),
        "floor_bytes": int(4 * sum(numbers)),
        "optimizers": results,
    }


def updates_agree(text, note):
    """E: each step that is timed against an independent one, at a tiny size."""
    cases = {CHECKED: ASCENTS, CHECKED._replace(layers=2, scanned=True): SCANNED}
    bars, shares = [], {}
    for shape, names in cases.items():
        note(f"  compiling {len(names)} programs")
        variants = [Variant(name) for name in names]
        compiled = programs.compile_steps(variants, shape, text.batch(shape, 0))
        for (name, _), program in compiled.items():
            label = f"{name}, scanned" if shape.scanned else name
            error, shares[label] = measuring.error_of_update(name, shape, text, program)
            if 0 < shares[label] < 5 * TOLERANCE:
                raise RuntimeError(f"{label}: a perturbation that is missing would not be seen")
            bars.append(Bar("E", f"{label}: error of the update", error, "<=", TOLERANCE))
    return {"share_of_perturbation": shares}, bars


SECTIONS = {"A": ascents, "B": without_perturbation, "C": scanned_stack, "D": data_parallel}


def costs_table(section, found):
    made = rich.table.Table(title=f"{section}: {Shape(**found['shape'])}")
    made.add_column("optimizer")
    columns = {
        "min_seconds": ("min", lambda x: f"{1e3 * x:.4g} ms"),
        "median_seconds": ("median", lambda x: f"{1e3 * x:.4g} ms"),
        "time_ratio": ("/ AdamW's", lambda x: f"{x:.2f}"),
        "refresh_seconds": ("refresh", lambda x: f"{1e3 * x:.4g} ms"),
        "flops": ("GFLOPs", lambda x: f"{1e-9 * x:.4g}"),
        "temporary_bytes": ("temporary", lambda x: f"{1e-6 * x:.4g} MB"),
        "extra_copies": ("extra copies", lambda x: f"{x:+.2f}"),
        "saved_stacks": ("stacks saved", lambda x: f"{x:+.2f}"),
        "saved_stacks_without_refresh": ("between refreshes", lambda x: f"{x:+.2f}"),
        "optimizer_state_bytes": ("state", lambda x: f"{1e-6 * x:.4g} MB"),
        "bytes": ("collectives", lambda x: f"{1e-6 * x:.4g} MB"),
        "bytes_without_refresh": ("normal step", lambda x: f"{1e-6 * x:.4g} MB"),
    }
    results = found["optimizers"]
    columns = {key: c for key, c in columns.items() if any(key in r for r in results.values())}
    for heading, _ in columns.values():
        made.add_column(heading, justify="right")
    for name, result in results.items():
        cells = [show(result[key]) if key in result else "-" for key, (_, show) in columns.items()]
        made.add_row(name, *cells)
    return made


def plot(found, path):
    """Time and extra temporary memory of section A, an optimizer a row."""
    results = found["optimizers"]
    names = list(results)[::-1]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    headings = {
        "time_ratio": "time of a step / AdamW's",
        "extra_copies": "temporary memory beyond AdamW's (copies of the weights)",
    }
    for axes, (key, heading) in zip(panels, headings.items(), strict=True):
        values = [results[name][key] for name in names]
        colors = ["C7" if name in OTHERS else "C0" for name in names]
        drawn = axes.barh(names, values, color=colors)
        axes.bar_label(drawn, fmt="%.2f", padding=3)
        axes.axvline(1.0 if key == "time_ratio" else 0.0, color="black", linewidth=0.8)
        axes.margins(x=0.15)
        axes.set_xlabel(heading)
        axes.grid(axis="x", alpha=0.3)
    size = "d={width}, {layers} layers, r={rank}, {batch} x {length} tokens".format(
        **found["shape"]
    )
    figure.suptitle(f"Compiled training steps: {size}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse_arguments():
    parser = options.parser_of("step_cost", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--rounds", type=int, help="timed steps in A; B makes a third")
    parser.add_argument("--only", default="A,B,C,D", help="sections, such as A,C")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON and the plot")
    parser.add_argument("--collectives", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.only = sorted(filter(None, arguments.only.upper().split(",")))
    if unknown := set(arguments.only) - set(SECTIONS):
        parser.error(f"--only: no section {', '.join(sorted(unknown))}")
    return arguments


def main():
    arguments = parse_arguments()
    if arguments.collectives:
        print(json.dumps(collectives(Shape(*json.loads(arguments.collectives)))))
        return
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 120
    note = functools.partial(console.print, highlight=False, markup=False)
    text, sizes = programs.Text(), QUICK if arguments.quick else SIZES
    rounds = arguments.rounds or (3 if arguments.quick else 12)
    partial = arguments.quick or arguments.only != list(SECTIONS)
    out = arguments.out or (None if partial else experiments.RESULTS)

    summary, bars = {}, []
    for section in arguments.only:
        note(section)
        summary[section], reached = SECTIONS[section](sizes[section], rounds, text, note)
        bars += reached
        console.print(costs_table(section, summary[section]))
    note("E")
    summary["E"], reached = updates_agree(text, note)
    bars += reached
    console.print(bars_table(bars))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        summary = {
            "bars": stored(bars),
            "rounds": rounds,
            **summary,
            "machine": machine.describe(),
            "versions": machine.versions(),
        }
        (out / "step_cost.json").write_text(json.dumps(summary, indent=1) + "\n")
        if "A" in summary:
            plot(summary["A"], out / "step_cost.png")
    if wrong := [bar.claim for bar in bars if bar.section == "E" and not bar.holds]:
        sys.exit(f"The update is not what it should be: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
