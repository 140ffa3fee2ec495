"""The benchmarks run at tiny sizes; what they time, they check themselves."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step_cost", "refresh", "zeroth_order_memory"])
def test_quick_run_passes_its_checks_and_stores_its_numbers(name, tmp_path):
    environment = {**os.environ, "XLA_FLAGS": ""}  # not the tests' own
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", tmp_path],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads((tmp_path / f"{name}.json").read_text())
    assert stored["bars"]
    assert stored["versions"]["jax"]
    if name != "zeroth_order_memory":
        assert (tmp_path / f"{name}.png").stat().st_size > 0
