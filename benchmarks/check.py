"""Runs one cell of each table again and says whether it lands within its interval.

    python -m benchmarks.check --data-dir FOLDER               # half an hour
    python -m benchmarks.check pretraining memory

The same machine and versions give the same losses to the bit; others round otherwise, and training
carries that on. So each figure has an interval, as wide as one seed may differ from another: it
finds what is broken, and not small differences.
"""

import sys

import rich.table

from benchmarks import experiments, options, progress, tables


def parse_arguments(argv):
    parser = options.for_cells("check", __doc__)
    known = f"{', '.join(experiments.MODULES)} (default: all that are stored)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=known)
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.names) - set(experiments.MODULES):
        parser.error(f"no experiment {', '.join(sorted(unknown))}")
    return arguments


def rows_of(name, size, folder, display):
    """(cell, figure, stored, found, low, high) of an experiment's expectations."""
    experiment = experiments.load(name)
    cells = experiments.checked(experiment.cells(size))
    records, stale = experiments.read(folder / name, cells)
    if stale:
        raise SystemExit(f"{name}: {', '.join(stale)} were made with other settings.")
    by_id, results = {cell["id"]: cell for cell in cells}, {}
    expectations = experiment.again(size, cells, records)
    display.start(name, len({e.cell for e in expectations}))
    rows = []
    for cell, label, value, low, high in expectations:
        if cell not in results:
            display.cell(by_id[cell], records[cell]["seconds"], None)
            needed = {n: records[n]["result"] for n in by_id[cell].get("needs", ())}
            results[cell] = experiment.run(by_id[cell], display, needed)
            display.finished()
        stored = value(records[cell]["result"])
        rows.append((cell, label, stored, value(results[cell]), low, high))
    display.stop()
    return rows


def main(argv=None):
    """Returns the exit status: 1 if a figure is outside its interval."""
    arguments = parse_arguments(argv)
    options.set_folders(arguments)
    display, rows = progress.Display(), []
    try:
        for name in arguments.names or experiments.MODULES:
            rows += rows_of(name, arguments.size, arguments.out, display)
    finally:
        display.stop()
    if not rows:
        raise SystemExit("Nothing is stored that could be compared.")
    table = rich.table.Table(title="One cell of each table, run again")
    for heading in ("cell", "figure", "stored", "again", "interval", ""):
        justify = "left" if heading in ("cell", "figure") else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    wrong = 0
    for cell, label, stored, found, low, high in rows:
        inside = low <= found <= high
        wrong += not inside
        table.add_row(cell, label, *map(tables.short, (stored, found)),
                      f"{tables.short(low)} to {tables.short(high)}",
                      ("the same" if found == stored else "within") if inside else "OUTSIDE",
                      )  # fmt: skip
    display.console.print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
