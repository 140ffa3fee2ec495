"""Experiments resume, wait for what they need, and are reported from what is stored."""

import json
import re
import sys
import types

import jax
import numpy as np
import pytest

from tests import checkpoints

pytestmark = pytest.mark.usefixtures("compile_quickly")

from benchmarks import (  # noqa: E402
    experiments,
    finetuning,
    report,
    run,
    tables,
)
from benchmarks.finetuning import findings, inputs, methods, paired, plan, training  # noqa: E402

# The runner, on an experiment that adds.


@pytest.fixture
def toy(monkeypatch):
    """Two trials, their best squared, and one cell that needs nothing; `ran` says what ran."""
    ran = []
    trials = [{"id": f"trial{i}", "value": i, "group": "trial", "work": 1} for i in (3, 5)]
    squared = {"id": "squared", "needs": ["trial3", "trial5"], "group": "final", "work": 4}
    other = {"id": "other", "value": 1, "seed": 7}

    def run_cell(cell, display, needed):
        ran.append(cell["id"])
        display.step(1, 1)
        if toy.fails == cell["id"]:
            raise toy.error
        return max(needed.values()) ** 2 if needed else cell["value"]

    def write_report(size, cells, records, folder):
        text = [f"{name}: {record['result']}" for name, record in records.items()]
        return experiments.Section([f"{len(records)} found"], text)

    toy = types.ModuleType("toy_experiment")
    toy.cells = lambda size: [*trials, squared, other] if size == "cpu" else []
    toy.run, toy.report, toy.ran, toy.trials, toy.fails = run_cell, write_report, ran, trials, None
    monkeypatch.setitem(sys.modules, "toy_experiment", toy)
    monkeypatch.setattr(experiments, "MODULES", {"toy": "toy_experiment"})
    return toy


def result(folder, name):
    return json.loads((folder / "toy" / f"{name}.json").read_text())


def test_finished_cells_are_kept_and_never_run_again(toy, tmp_path):
    assert run.main(["toy", "--out", tmp_path]) == 0
    assert toy.ran == ["trial3", "trial5", "squared", "other"]
    stored = result(tmp_path, "squared")
    assert stored["result"] == 25
    assert stored["cell"] == toy.cells("cpu")[2]
    assert stored["versions"]["jax"] == jax.__version__
    assert {"machine", "commit", "dirty", "seconds"} <= set(stored)
    assert result(tmp_path, "other")["seed"] == 7
    assert run.main(["toy", "--out", tmp_path]) == 0
    assert len(toy.ran) == 4
    (tmp_path / "toy" / "other.json").unlink()
    assert run.main(["toy", "--out", tmp_path]) == 0
    assert toy.ran[4:] == ["other"]
    assert run.main(["toy", "--out", tmp_path, "--only", "trial?", "--again"]) == 0
    assert toy.ran[5:] == ["trial3", "trial5"]


def test_interrupted_run_says_how_to_go_on(toy, tmp_path, capsys):
    toy.fails, toy.error = "trial5", KeyboardInterrupt()
    assert run.main(["toy", "--out", tmp_path]) == 130
    assert f"python -m benchmarks.run toy --out {tmp_path}" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["trial3.json"]
    toy.fails = None
    assert run.main(["toy", "--out", tmp_path]) == 0
    assert toy.ran == ["trial3", "trial5", "trial5", "squared", "other"]


def test_a_cell_that_fails_holds_up_only_those_that_need_it(toy, tmp_path, capsys):
    toy.fails, toy.error = "trial3", RuntimeError("no luck")
    assert run.main(["toy", "--out", tmp_path]) == 1
    assert toy.ran == ["trial3", "trial5", "other"]
    printed = capsys.readouterr().out
    assert "no luck" in printed
    assert "squared: not run, for want of trial3" in printed


def test_only_brings_along_what_is_needed(toy, tmp_path):
    assert run.main(["toy", "--out", tmp_path, "--only", "square"]) == 0
    assert toy.ran == ["trial3", "trial5", "squared"]
    with pytest.raises(SystemExit, match="no cell's id matches"):
        run.main(["toy", "--out", tmp_path, "--only", "cube"])


def test_other_settings_make_stored_cells_stale(toy, tmp_path):
    assert run.main(["toy", "--out", tmp_path]) == 0
    toy.trials[0]["value"] = 4
    with pytest.raises(SystemExit, match="1 stored cells .* trial3"):
        run.main(["toy", "--out", tmp_path])
    assert "1 were made with other settings" in report.build(tmp_path)
    assert run.main(["toy", "--out", tmp_path, "--only", "trial3", "--again"]) == 0
    assert result(tmp_path, "trial3")["result"] == 4


def test_list_and_limit_estimate_from_finished_cells(toy, tmp_path, capsys):
    assert run.main(["toy", "--out", tmp_path, "--only", "trial3"]) == 0
    path = tmp_path / "toy" / "trial3.json"
    path.write_text(re.sub(r'"seconds": [\d.]+', '"seconds": 30', path.read_text()))
    # 30 s for the other trial, four times as much for what has four times the work, 30 s more.
    cells = toy.cells("cpu")
    expected = experiments.estimates(cells, experiments.read(tmp_path / "toy", cells)[0])
    assert expected == {"trial3": 30, "trial5": 30, "squared": 120, "other": 30}
    records = experiments.read(tmp_path / "toy", cells)[0]
    strange = [*cells, {"id": "strange", "group": "strange", "work": 9, "experiment": "another"}]
    assert experiments.estimates(strange, records) == {**expected, "strange": None}
    capsys.readouterr()
    assert run.main(["toy", "--out", tmp_path, "--list"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 4 cells are done" in printed
    assert "Time left: 3 min" in printed
    assert run.main(["toy", "--out", tmp_path, "--limit", "0.4"]) == 0
    assert toy.ran == ["trial3"]
    assert "3 cells are left" in capsys.readouterr().out
    assert run.main(["toy", "--out", tmp_path, "--limit", "2"]) == 0
    assert toy.ran == ["trial3", "trial5", "squared", "other"]  # faster than they were said to be


def test_cells_must_be_named_and_ordered():
    with pytest.raises(ValueError, match="needs b, not before it"):
        experiments.checked([{"id": "a", "needs": ["b"]}, {"id": "b"}])
    for cells in ([{"id": "a"}, {"id": "a"}], [{"id": "a/b"}]):
        with pytest.raises(ValueError, match="is not a file name, or is there twice"):
            experiments.checked(cells)


def test_every_experiment_is_whole_and_can_be_checked():
    for name in experiments.MODULES:
        experiment = experiments.load(name)
        for size in experiments.SIZES:
            cells = experiments.checked(experiment.cells(size))
            records, stale = experiments.read(experiments.RESULTS / name, cells)
            assert not stale
            expected = experiment.again(size, cells, records)
            in_tables = [r for r in records.values() if r["cell"].get("kind") != "tuning"]
            assert bool(expected) == bool(in_tables)
            for cell, label, value, low, high in expected:
                assert low <= value(records[cell]["result"]) <= high, label


def test_report_is_made_of_stored_cells(toy, tmp_path):
    assert "Nothing is finished yet" in report.build(tmp_path)
    assert run.main(["toy", "--out", tmp_path, "--only", "trial"]) == 0
    report.main(["--out", str(tmp_path)])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "- 2 found" in text
    assert "trial5: 5" in text
    assert "2 of the 4 cells of the cpu size are finished. **2 are missing**" in text
    assert f"jax {jax.__version__}" in text


# Paired differences.


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "pearson"])
def test_paired_differences_against_direct_computation(metric):
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 2, 12).astype(float)
    first_SxN, second_SxN = rng.integers(0, 2, (2, 3, 12)).astype(float)
    if metric == "pearson":
        labels_N, first_SxN = labels_N + rng.normal(size=12), rng.normal(size=(3, 12)) + labels_N
    found = paired.paired(metric, labels_N, first_SxN, second_SxN, 5, 50)

    def difference(seed, examples):
        of = training.glue.METRICS[metric]
        first, second = (x[seed, examples] for x in (first_SxN, second_SxN))
        return of(labels_N[examples], first) - of(labels_N[examples], second)

    by_seed = [difference(seed, np.arange(12)) for seed in range(3)]
    np.testing.assert_allclose(found.by_seed, by_seed, atol=1e-12)
    # The same draws, written out as lists of examples.
    counts = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), 50)
    drawn = [np.repeat(np.arange(12), count) for count in counts]
    replicates = [[difference(seed, examples) for examples in drawn] for seed in range(3)]
    covariance = np.cov(replicates)
    common = np.mean([covariance[0, 1], covariance[0, 2], covariance[1, 2]])
    own = np.mean(np.diag(covariance)) - common
    assert found.of_examples == pytest.approx(max(0, common))
    assert found.of_seeds == pytest.approx(max(np.var(by_seed, ddof=1), own) / 3)


def test_intervals_have_the_width_that_theory_gives():
    rng = np.random.default_rng(0)
    labels = np.zeros(400)
    # Seeds that are alike: what is left is the variance of examples.
    first, second = (np.tile(rng.random(400) < share, (100, 1)) for share in (0.2, 0.3))
    part = paired.paired("accuracy", labels, first, second)
    found = paired.interval([part])
    width = 2 * 1.96 * ((first == 0).astype(float) - (second == 0)).std() / 20
    assert found.high - found.low == pytest.approx(width, rel=0.1)
    halved = paired.interval([part, part])
    assert halved.estimate == pytest.approx(found.estimate)
    assert halved.high - halved.low == pytest.approx(width / 2**0.5, rel=0.1)
    # Three seeds that differ and examples that do not: Student's t.
    of_seeds = np.array([0.0, 0.25, 1.0])
    first = np.where(np.arange(400) < 400 * of_seeds[:, None], 0, 1)
    found = paired.interval([paired.paired("accuracy", labels, first, np.ones((3, 400)))])
    low, high = tables.t_edges(of_seeds)
    assert found.high - found.low == pytest.approx(high - low, rel=0.1)
    same = paired.paired("accuracy", labels, first, first)
    assert paired.interval([same]) == (0, 0, 0)


@pytest.mark.parametrize("of_seeds", [0.0, 0.2])
def test_intervals_hold_the_truth_as_often_as_they_say(of_seeds):
    """Of three seeds, whose examples flip here and there by themselves, and of two tasks."""
    rng, holds = np.random.default_rng(0), []
    for _ in range(200):
        parts = []
        for _ in range(2):
            # The methods differ on a fifth of the examples, and do so in favour of either.
            is_easy = rng.random(300) < 0.8
            share = 0.5 + rng.normal(0, of_seeds, (3, 1))
            first = is_easy | (rng.random((3, 300)) < share)
            second = is_easy | (rng.random((3, 300)) < 0.5)
            parts.append(paired.paired("accuracy", np.ones(300), first, second, count=200))
        found = paired.interval(parts)
        holds.append(found.low <= 0 <= found.high)
    assert np.mean(holds) >= 0.92


# Fine-tuning.

LENGTHS = {"sst2": (8, 9), "stsb": (8, 8)}
NANO = plan.Size(
    (20, 24),
    2,
    LENGTHS,
    {20: 2, 24: 1},
    {20: 20, 24: 20},
    {20: ((("adamw",), LENGTHS), (("lora",), LENGTHS)), 24: ((("adamw",), LENGTHS),)},
    {},
    {"batch_size": 4, "rank": 4, "update_proj_gap": 3},
)
ALL = NANO._replace(
    examples=(None,),
    epochs={None: 1},
    tuned_at={None: None},
    groups={None: ((("adamw",), {"sst2": ()}),)},
    starts_at=("cpu", 20),
)


@pytest.fixture
def nano(tmp_path, monkeypatch):
    """A nano BERT on a word that decides; the folder of results."""
    (tmp_path / "bert").mkdir()
    monkeypatch.setattr(inputs, "CHECKPOINT", checkpoints.write_bert(tmp_path / "bert"))
    monkeypatch.setattr(plan, "PLANS", {"cpu": NANO, "full": ALL})
    monkeypatch.setattr(plan, "HELD_OUT", 15)
    monkeypatch.setattr(inputs, "HELD_OUT", 15)
    rng = np.random.default_rng(0)
    for name in ("SST-2", "STS-B"):
        (tmp_path / name).mkdir()
    for part, count in (("train", 40), ("dev", 30)):
        rows = [
            (x, ["cat", "dog"][x], rng.choice(["sat", "ran"])) for x in rng.integers(0, 2, count)
        ]
        lines = [f"{x}\ta {animal} {verb}" for x, animal, verb in rows]
        (tmp_path / "SST-2" / f"{part}.tsv").write_text("\n".join(["label\tsentence", *lines]))
        lines = [f"x\tx\tx\tx\t{1 + 3 * x}\ta {animal}\ta cat {verb}" for x, animal, verb in rows]
        (tmp_path / "STS-B" / f"sts-{part}.csv").write_text("\n".join(lines))
    monkeypatch.setenv(experiments.DATA_DIR, str(tmp_path))
    inputs.dataset_of.cache_clear()
    return tmp_path / "out"


@pytest.mark.slow
def test_fine_tuning_from_trials_to_the_report(nano, monkeypatch):
    kept = {name: methods.METHODS[name] for name in ("adamw", "lora")}
    monkeypatch.setattr(
        plan, "METHODS", {name: m._replace(middle=2e-2) for name, m in kept.items()}
    )
    only = ["--only", "20-sst2-*", "20-stsb-adamw", "24-sst2-adamw-seed0"]
    assert run.main(["finetuning", "--out", nano, *only]) == 0
    cells = finetuning.cells("cpu")
    assert len(cells) == 2 * 2 * (6 + 3 + 2) + 2 * 2
    records, _ = experiments.read(nano / "finetuning", cells)
    assert len(records) == 3 * (6 + 3 + 2) + 1

    # The final runs use the best trial, which was scored on other examples of the train set.
    trials = [records[f"cpu-20-sst2-adamw-tune{i}"]["result"] for i in range(6)]
    better = sorted(trials, key=lambda r: (-r["metrics"]["accuracy"], r["loss"]))[:3]
    again = [records[f"cpu-20-sst2-adamw-again{i}"]["result"] for i in range(3)]
    assert [r["learning_rate"] for r in again] == [r["learning_rate"] for r in better]
    means = [
        (a["metrics"]["accuracy"] + b["metrics"]["accuracy"], -a["loss"] - b["loss"])
        for a, b in zip(better, again, strict=True)
    ]
    chosen = better[means.index(max(means))]
    final = records["cpu-20-sst2-adamw-seed1"]["result"]
    assert final["learning_rate"] == chosen["learning_rate"]
    assert (chosen["steps"], final["steps"]) == (10, 10)
    more = records["cpu-24-sst2-adamw-seed0"]["result"]  # tuned on fewer examples
    assert (more["learning_rate"], more["steps"]) == (final["learning_rate"], 6)
    agreement = [a == b for a, b in zip(final["labels"], final["predictions"], strict=True)]
    assert np.mean(agreement) == pytest.approx(final["metrics"]["accuracy"])
    scores = records["cpu-20-stsb-adamw-seed1"]["result"]
    found = np.corrcoef(scores["labels"], scores["predictions"])[0, 1]
    # Nine digits are stored, of numbers below 10 that in so small a model hardly differ.
    rounding = 5e-9 / np.std(scores["predictions"])
    assert rounding < 1e-3
    assert found == pytest.approx(scores["metrics"]["pearson"], abs=2 * rounding)
    lora = records["cpu-20-sst2-lora-seed0"]["result"]
    assert lora["trained_parameters"] < final["trained_parameters"]

    # With all examples, three rates round the one that was chosen with fewer.
    everything = finetuning.cells("full")
    assert [cell["kind"] for cell in everything] == 3 * ["tuning"] + 2 * ["final"]
    assert run.main(["finetuning", "--size", "full", "--out", nano]) == 0
    records |= experiments.read(nano / "finetuning", everything)[0]
    trials = [records[f"full-all-sst2-adamw-tune{i}"]["result"] for i in range(3)]
    tried = [trial["learning_rate"] for trial in trials]
    assert tried == pytest.approx(
        [factor * chosen["learning_rate"] for factor in (0.5, 1, 2)], rel=0.01
    )
    assert [trial["steps"] for trial in trials] == 3 * [7]  # of 25, and 15 are held out
    best = max(trials, key=lambda r: (r["metrics"]["accuracy"], -r["loss"]))
    full = records["full-all-sst2-adamw-seed0"]["result"]
    assert (full["learning_rate"], full["steps"]) == (best["learning_rate"], 10)

    text = report.build(nano, ["finetuning"])
    assert "34 of the 48 cells of the cpu size are finished. **14 are missing**" in text
    mean = 50 * sum(records[f"cpu-20-sst2-lora-seed{i}"]["result"]["metrics"]["accuracy"]
                    for i in (0, 1))  # fmt: skip
    assert re.search(rf"\| LoRA \| {mean:.1f} ± [\d.]+ \| - \| - \|", text), text
    assert "Points above AdamW" in text
    assert "Nothing to compare with SAM yet." in text
    assert (nano / "finetuning" / "differences-cpu-20.png").stat().st_size > 1000


def test_a_tuning_goes_on_from_that_of_another_size(monkeypatch, tmp_path):
    with_radius = {None: ((("lorenza_zo",), ("sst2", "cola")),)}
    everything = ALL._replace(groups=with_radius, max_len=dict.fromkeys(("sst2", "cola"), (8, 9)))
    small = NANO._replace(groups={20: ((("galore", "lorenza_zo"), LENGTHS),), 24: ()},
                          tuned_on={"cola": "sst2"})  # fmt: skip
    monkeypatch.setattr(plan, "PLANS", {"cpu": small, "full": everything})
    cells = experiments.checked(finetuning.cells("full"))
    trials = [cell for cell in cells if cell["kind"] == "tuning"]
    assert [cell["rate_factor"] for cell in trials] == 2 * [0.5, 1, 2]
    assert all("-sst2-lorenza_zo-" in name for cell in trials for name in cell["start"])
    asked = []

    def stored(name, cell):
        asked.append(cell["id"])
        best = cell["id"].endswith("tune4")
        found = {"metrics": {"accuracy": float(best)}, "loss": 1.0}
        return {
            "result": found | {"learning_rate": 0.1 if best else len(asked), "rho": 0.01 + best}
        }

    monkeypatch.setattr(experiments, "of_another", stored)
    monkeypatch.setattr(training, "fine_tune", lambda cell, chosen, display: chosen)
    assert finetuning.run(trials[3], None, {}) == {"learning_rate": 0.05, "rho": 1.01}
    assert asked == trials[3]["start"]
    last = {"metrics": {"accuracy": 1.0}, "loss": 1.0, "learning_rate": 0.2, "rho": 1.01}
    assert finetuning.run(cells[-1], None, {"": last}) == {"learning_rate": 0.2, "rho": 1.01}


def test_a_task_may_take_the_tuning_of_another_one(monkeypatch):
    groups = {20: ((("galore", "lorenza_zo"), LENGTHS),), 24: ((("lorenza_zo",), LENGTHS),)}
    lent = NANO._replace(groups=groups, tuned_on={"stsb": "sst2"})
    monkeypatch.setattr(plan, "PLANS", {"cpu": lent})
    cells = experiments.checked(finetuning.cells("cpu"))
    borrowers = [cell for cell in cells if cell["task"] == "stsb"]
    assert [cell["kind"] for cell in borrowers] == 6 * ["final"]
    needed = {need for cell in borrowers for need in cell["needs"]}
    assert needed == {cell["id"] for cell in cells if cell["kind"] == "tuning"}
    assert plan.borrowed_tunings(cells) == [("stsb", "sst2")]


def test_report_of_all_tasks_has_averages_and_findings(tmp_path):
    rng = np.random.default_rng(0)
    monkey = {"sst2": 0, "stsb": 1}
    cells, records = [], {}
    for task in monkey:
        for method, noise in (("galore", 0.5), ("lorenza_zo", 0.3)):
            for seed in range(2):
                labels = np.random.default_rng(monkey[task]).integers(0, 2, 40)
                predictions = np.where(rng.random(40) < noise, 1 - labels, labels)
                if task == "stsb":
                    labels, predictions = labels.astype(float), predictions + rng.normal(size=40)
                name = f"{task}-{method}-{seed}"
                cells.append({"id": name, "kind": "final", "task": task, "method": method,
                              "examples": 9, "epochs": 2, **NANO.shared})  # fmt: skip
                metrics = training.glue.TASKS[task].metrics
                records[name] = {"result": {
                    "labels": training.stored(labels),
                    "predictions": training.stored(predictions),
                    "metrics": {m: training.glue.METRICS[m](labels, predictions)
                                for m in metrics},
                    "learning_rate": 1e-3, "rho": 0.05, "seconds_per_step": 0.1,
                    "trained_parameters": 10, "optimizer_state_bytes": 20,
                }}  # fmt: skip
    found = finetuning.report("cpu", cells, records, tmp_path)
    [finding] = found.findings
    difference = np.mean([
        100 * (records[f"{t}-lorenza_zo-{s}"]["result"]["metrics"][m]
               - records[f"{t}-galore-{s}"]["result"]["metrics"][m])
        for t, m in (("sst2", "accuracy"), ("stsb", "pearson")) for s in (0, 1)
    ])  # fmt: skip
    assert re.search(
        rf"LORENZA, zo is [a-z ]+ GaLore {re.escape(f'{difference:+.1f}')} \(", finding
    )
    assert f"{difference:+.1f} (" in "\n".join(found.body)
    of_one = [cell for cell in cells if cell["task"] == "stsb"]
    [finding] = finetuning.report("cpu", of_one, records, tmp_path).findings
    assert "9 examples, STS-B: LORENZA, zo is" in finding


@pytest.mark.parametrize(
    ("edges", "words"),
    [((0.1, 2.0), "above"), ((-2.0, -0.1), "below"), ((-0.1, 2.0), "not told apart from"),
     ((None, None), "not told apart from")],
)  # fmt: skip
def test_verdicts_follow_the_intervals(edges, words):
    found = {("lorenza_zo", "galore"): {"sst2": tables.Difference(1.0, *edges)}}
    text = findings.of_number(found, "9 examples", ("sst2",))
    assert text.startswith(f"9 examples, SST-2: LORENZA, zo is {words} GaLore +1.0 (")


def test_every_method_has_the_same_budget():
    for name, method in methods.METHODS.items():
        trials = method.trials()
        assert len({tuple(trial.values()) for trial in trials}) == methods.TRIALS, name
        assert all(0.003 <= trial["rho"] <= 0.1 for trial in trials if method.radii)
    assert methods.METHODS["adamw"].trials()[0]["learning_rate"] == pytest.approx(3.18e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.METHODS)
def test_learning_rate_radius_and_seed_reach_the_compiled_step(nano, name, monkeypatch):
    groups = {20: (((name,), LENGTHS),), 24: ()}
    monkeypatch.setattr(plan, "PLANS", {"cpu": plan.PLANS["cpu"]._replace(groups=groups)})
    cell = next(c for c in finetuning.cells("cpu") if f"sst2-{name}-tune0" in c["id"])
    rho = cell["rho"]

    class Silent:
        def step(self, *told):
            pass

    def losses(**changes):
        return finetuning.run({**cell, **changes}, Silent(), {})["loss"]

    first = losses(learning_rate=1e-2)
    assert losses(learning_rate=1e-2) == first
    assert losses(learning_rate=2e-2) != first
    assert losses(learning_rate=1e-2, seed=1) != first
    if rho is not None:
        assert losses(learning_rate=1e-2, rho=10 * rho) != first
    assert np.isfinite(first)


def test_lora_starts_at_the_checkpoint_and_trains_adapters_and_head(nano):
    config, files = inputs.checkpoint_of(inputs.CHECKPOINT, "sst2")
    params = training.bert.read_parameters(files, config, 0)
    trained, frozen = methods.lora_split(params, 4, seed=0)
    joined = methods.lora_join(trained, frozen)
    jax.tree.map(np.testing.assert_array_equal, joined, params)
    projection = methods.lorenza_optax.projection_plan(params, 4)
    assert set(trained["adapters"]) == set(projection.projected)
    path, pair = next(iter(trained["adapters"].items()))
    pair["B"] = pair["B"] + 1.0
    moved = methods._by_path(methods.lora_join(trained, frozen))[path]
    before = methods._by_path(params)[path]
    np.testing.assert_allclose(moved - before, 2 * pair["A"] @ pair["B"], atol=1e-5)
