"""Benchmarks, each run as `python -m benchmarks.NAME`, from the repository's root.

`run`, `report` and `check` are the commands of the experiments, which experiments.py lists; each of
these is a package. The rest are single scripts, whose tables scripts_report.py makes.
"""

import pathlib
import sys

# The examples' modules are programs of their own and import each other by their bare names.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples"))
