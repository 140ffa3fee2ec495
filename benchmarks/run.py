"""Runs an experiment, cell by cell; what is finished is skipped, so it goes on where it stopped.

    python -m benchmarks.run finetuning --data-dir FOLDER
    python -m benchmarks.run finetuning --list
    python -m benchmarks.run finetuning --data-dir FOLDER --only sst2-galore --limit 60

Results are files in benchmarks/results/NAME/; `python -m benchmarks.report` makes tables and plots
of them. Several processes may share the work: each looks for a cell's file before it begins it.
"""

import fnmatch
import shlex
import signal
import sys
import time
import traceback

import rich.table

from benchmarks import experiments, options, progress


def parse_arguments(argv):
    parser = options.for_cells("run", __doc__)
    add = parser.add_argument
    add("name", choices=experiments.MODULES, metavar="NAME",
        help=f"the experiment: {', '.join(experiments.MODULES)}")  # fmt: skip
    add("--only", nargs="+", metavar="PATTERN",
        help="cells whose id has this in it, * and ? as for files, and their needs")  # fmt: skip
    add("--list", action="store_true", help="say what is done and what the rest will take")
    add("--limit", type=float, metavar="MINUTES", help="begin no cell that would not fit")
    add("--again", action="store_true", help="run stale and finished cells anew")
    return parser.parse_args(argv)


def chosen(cells, patterns):
    """Those that match a pattern and, through any number of links, those they need."""
    if not patterns:
        return cells
    by_id = {cell["id"]: cell for cell in cells}
    wanted = {n for n in by_id if any(fnmatch.fnmatchcase(n, f"*{p}*") for p in patterns)}
    if not wanted:
        raise SystemExit(f"--only {' '.join(patterns)}: no cell's id matches. See --list.")
    waiting = list(wanted)
    while waiting:
        for name in set(by_id[waiting.pop()].get("needs", ())) - wanted:
            wanted.add(name)
            waiting.append(name)
    return [cell for cell in cells if cell["id"] in wanted]


def show(cells, records, stale, expected, console):
    table = rich.table.Table(title=f"{len(records)} of {len(cells)} cells are done")
    for heading in ("cell", "", "time"):
        table.add_column(heading, justify="right" if heading == "time" else "left", no_wrap=True)
    for cell in cells:
        name = cell["id"]
        state = "done" if name in records else "stale" if name in stale else "-"
        about = "" if name in records else "about "
        table.add_row(name, state, about + progress.duration(expected[name]))
    console.print(table)
    console.print(f"Time left: {progress.duration(seconds_left(cells, records, expected))}")


def seconds_left(cells, records, expected):
    """None where it cannot be told yet."""
    open_ones = [expected[cell["id"]] for cell in cells if cell["id"] not in records]
    return None if None in open_ones else sum(open_ones)


def run_all(arguments, experiment, cells, display):
    """Runs what is open; returns (cells that failed, cells that did not fit in the limit)."""
    folder, started = arguments.out / arguments.name, time.monotonic()
    known, _ = experiments.read(folder, experiments.checked(experiment.cells(arguments.size)))
    records = (
        {} if arguments.again else {c["id"]: known[c["id"]] for c in cells if c["id"] in known}
    )
    todo, failed = [cell for cell in cells if cell["id"] not in records], []
    origin = experiments.origin()
    display.start(arguments.name, len(todo))
    for index, cell in enumerate(todo):
        name, needs = cell["id"], cell.get("needs", ())
        if not arguments.again:  # perhaps another process was faster
            records |= experiments.read(folder, [cell])[0]
        if name in records:
            display.skipped()
            continue
        expected = experiments.estimates(cells, records or known)
        spent = time.monotonic() - started
        if arguments.limit and spent + (expected[name] or 0) > 60 * arguments.limit:
            return failed, len(todo) - index
        if missing := [need for need in needs if need not in records]:
            display.note(f"{name}: not run, for want of {', '.join(missing)}")
            failed.append(name)
            continue
        display.cell(cell, expected[name], seconds_left(cells, records, expected))
        needed = {need: records[need]["result"] for need in needs}
        began = time.perf_counter()
        try:
            result = experiment.run(cell, display, needed)
            seconds = time.perf_counter() - began
            records[name] = experiments.write(folder, cell, result, seconds, origin)
        except Exception:  # a night's other cells are not lost with this one
            display.note(f"{name} failed:\n{traceback.format_exc()}")
            failed.append(name)
        else:
            display.finished(result.get("summary", "") if isinstance(result, dict) else "")
    return failed, 0


def main(argv=None):
    """Returns the exit status: 0, 1 if cells failed, 130 after an interruption."""
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    arguments = parse_arguments(argv)
    options.set_folders(arguments)
    experiment, display = experiments.load(arguments.name), progress.Display()
    everything = experiments.checked(experiment.cells(arguments.size))
    cells = chosen(everything, arguments.only)
    records, stale = experiments.read(arguments.out / arguments.name, cells)
    if arguments.list:
        known, _ = experiments.read(arguments.out / arguments.name, everything)
        expected = experiments.estimates(everything, known)
        show(cells, records, stale, expected, display.console)
        return 0
    if stale and not arguments.again:
        raise SystemExit(
            f"{len(stale)} stored cells were made with other settings, {stale[0]} among them. "
            "Remove their files, or run them anew with --only and --again."
        )
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    again = f"  python -m benchmarks.run {shlex.join(a for a in argv if a != '--again')}"
    try:
        failed, unfit = run_all(arguments, experiment, cells, display)
    except KeyboardInterrupt:
        display.stop()
        display.note(f"Interrupted; finished cells are kept. Go on with\n{again}")
        return 130
    finally:
        display.stop()
        signal.signal(signal.SIGTERM, earlier)
    if unfit:
        display.note(f"--limit: {unfit} cells are left. Go on with\n{again}")
    if failed:
        display.note(f"{len(failed)} cells failed; finished ones are kept. Try again with\n{again}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
