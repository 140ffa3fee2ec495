"""The benchmarks run at tiny sizes; what they time, they check themselves."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import experiments
from benchmarks.ascent import __main__ as ascent

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


@pytest.mark.slow
def test_ascents_are_measured_where_training_takes_its_gradient(tmp_path):
    short = ["--steps", "30", "--every", "12", "--draws", "1", "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ascent", *short],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # If it measured elsewhere than training took its gradient, nothing is stored; 1 may be a bar.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads((tmp_path / "ascent.json").read_text())["tasks"]["main_job"]["choices"]
    assert found["SAM"]["share"]["0.05"] == 1
    assert 0.5 < found["subspace"]["share"]["0.05"] < 1
    assert abs(found["zo, q=1"]["share"]["0.05"]) < 0.1


def test_ascents_keep_the_tasks_of_an_earlier_run_under_the_same_conditions(tmp_path, monkeypatch):
    stored = json.loads((experiments.RESULTS / "ascent.json").read_text())["tasks"]
    monkeypatch.setattr(ascent, "follow", lambda name, *_: stored[name])
    monkeypatch.setattr(ascent.tasks, "TASKS", dict.fromkeys(stored, lambda _: None))

    def tasks_after(*arguments):
        monkeypatch.setattr(sys, "argv", ["ascent", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit):
            ascent.main()
        return list(json.loads((tmp_path / "ascent.json").read_text())["tasks"])

    assert tasks_after("--data-dir", "glue", "--task", "sst2") == ["sst2"]
    assert tasks_after("--task", "main_job") == ["main_job", "sst2"]
    assert tasks_after("--task", "main_job", "--seed", "1") == ["main_job"]
