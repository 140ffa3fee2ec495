"""What an experiment is, and where its finished cells are kept.

An experiment is a package, named in MODULES, that exports four functions:

    cells(size) -> list of cells, in the order in which they are to be run; size is one of SIZES
    run(cell, display, needed) -> result, anything that JSON can say
    report(size, cells, records, folder) -> Section of RESULTS.md; plots go into the folder
    again(size, cells, records) -> list of Expectations for `python -m benchmarks.check`: of one
        stored cell of each table, the interval in which a rerun has to land

A cell is a dict of JSON values that says all there is to say about one run. Of its keys these have
a meaning here: "id" (letters, digits, "-", "_", "."; it names the file), "needs" (ids of earlier
cells, whose results `run` gets as a dict by id), "seed", and for the estimates of time "group"
(cells that take the same time for the same work), "work" and "experiment" (cells of one have one
unit of work).
While it runs, a cell tells `display.step(done, total, text)` of its progress.

A finished cell is one file `<id>.json` in the experiment's folder, with the cell, the result and
where it comes from: machine, versions, XLA's flags, seed, commit. Its cell is compared with the
one that is asked for: a file that was made with other settings is stale and never passes for a
result.
"""

import importlib
import json
import os
import pathlib
import re
import subprocess
from collections.abc import Callable
from typing import NamedTuple

import machine

ROOT = pathlib.Path(__file__).resolve().parent
RESULTS = ROOT / "results"
SIZES = ("cpu", "full")
MODULES = {
    "finetuning": "benchmarks.finetuning",
    "pretraining": "benchmarks.pretraining",
    "flatness": "benchmarks.flatness",
    "ablations": "benchmarks.ablations",
    "memory": "benchmarks.memory",
    "scaling": "benchmarks.scaling",
}

DATA_DIR = "LORENZA_DATA_DIR"  # the environment variable; --data-dir sets it
RESULTS_DIR = "LORENZA_RESULTS_DIR"  # set by --out, for those that read another's results


class Section(NamedTuple):
    """An experiment's part of RESULTS.md, in Markdown."""

    findings: list[str]  # sentences made from the stored numbers; the first is for all readers
    body: list[str]  # lines


class Expectation(NamedTuple):
    """A figure of a cell's result, and the interval in which it is to be found again."""

    cell: str  # id
    label: str
    value: Callable[[dict], float]
    low: float
    high: float


def load(name):
    return importlib.import_module(MODULES[name])


def data_dir():
    if folder := os.environ.get(DATA_DIR):
        return folder
    raise SystemExit(
        f"This experiment needs data: name their folder with --data-dir, or in {DATA_DIR}."
    )


def of_another(name, cell):
    """The record of a finished cell of the experiment `name`."""
    out = pathlib.Path(os.environ.get(RESULTS_DIR, RESULTS))
    records, stale = read(out / name, [cell])
    if cell["id"] in records:
        return records[cell["id"]]
    state = "was made with other settings" if stale else "is not finished"
    again = " --again" if stale else ""
    raise RuntimeError(
        f"{name}'s cell {cell['id']} {state}. Run it with\n  python -m benchmarks.run {name} "
        f"--data-dir FOLDER --out {out} --only {cell['id']}{again}"
    )


def checked(cells):
    """The cells, if ids are unique and needs come before those who need them."""
    seen = set()
    for cell in cells:
        name = cell["id"]
        if not re.fullmatch(r"[\w.-]+", name) or name in seen:
            raise ValueError(f"cell id {name!r} is not a file name, or is there twice")
        if missing := set(cell.get("needs", ())) - seen:
            raise ValueError(f"cell {name} needs {', '.join(sorted(missing))}, not before it")
        seen.add(name)
    return cells


def path_of(folder, cell):
    return folder / f"{cell['id']}.json"


def load_record(path):
    return json.loads(path.read_text())


def read(folder, cells):
    """({id: record of a finished cell}, [ids of stale ones])."""
    records, stale = {}, []
    for cell in cells:
        path = path_of(folder, cell)
        if path.exists():
            record = load_record(path)
            if record["cell"] == json.loads(json.dumps(cell)):
                records[cell["id"]] = record
            else:
                stale.append(cell["id"])
    return records, stale


def write(folder, cell, result, seconds, origin):
    """Stores a finished cell; a file is there as a whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "cell": cell,
        "result": result,
        "seconds": round(seconds, 3),
        "seed": cell.get("seed"),
        **origin,
    }
    # One line for each part: predictions on a line each would make long files.
    parts = [f" {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in record.items()]
    path = path_of(folder, cell)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    os.replace(unfinished, path)
    return record


def origin():
    """Where results of this process come from; to be called at its start, as its code is read."""
    # A GPU's step may take several times as long with other flags.
    flags = {"xla_flags": given} if (given := os.environ.get("XLA_FLAGS")) else {}
    return {"machine": machine.describe(), "versions": machine.versions(), **flags, **_commit()}


def _commit():
    # Results and the report do not make a tree dirty: a run writes them itself.
    changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".",
               ":!benchmarks/results", ":!benchmarks/RESULTS.md"]  # fmt: skip
    try:
        commit, status = (
            subprocess.run(
                command, cwd=ROOT.parent, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["git", "rev-parse", "HEAD"], changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}  # not a clone
    return {"commit": commit, "dirty": bool(status)}


def estimates(cells, records):
    """{id: seconds} of all cells: finished ones as measured, others by those of their group.

    Of a group without any, by all with the same unit of work; None where there are none yet.
    """
    by_group, by_unit = {}, {}
    for cell in cells:
        if record := records.get(cell["id"]):
            for known, key in ((by_group, "group"), (by_unit, "experiment")):
                sums = known.setdefault(cell.get(key), [0.0, 0.0])
                sums[0] += record["seconds"]
                sums[1] += cell.get("work", 1)
    found = {}
    for cell in cells:
        of_unit = by_unit.get(cell.get("experiment"), (0.0, 0.0))
        seconds, work = by_group.get(cell.get("group"), of_unit)
        measured = records.get(cell["id"], {}).get("seconds")
        found[cell["id"]] = (
            measured if measured is not None
            else seconds / work * cell.get("work", 1) if work else None
        )  # fmt: skip
    return found
