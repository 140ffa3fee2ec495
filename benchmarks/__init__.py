"""Benchmarks; those that `python -m benchmarks.run` runs are listed in experiments.py."""

import pathlib
import sys

# The examples' modules are programs of their own and import each other by their bare names.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples"))
