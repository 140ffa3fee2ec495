"""Benchmarks; those that `python -m benchmarks.run` runs are listed in experiments.py."""

import pathlib
import sys

# The examples' modules are programs of their own and import each other by their bare names.
_HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent / "examples"))
# So do step_cost.py and its modules; last, so that none of them hides another's.
sys.path.append(str(_HERE))
