"""Curvature against dense Hessians and closed forms; the experiment from records to its report."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import optimize, stats

from tests.test_evidence import nano  # noqa: F401
from tests.test_evidence_pretraining import nano as nano_llama  # noqa: F401

pytestmark = pytest.mark.usefixtures("compile_quickly")

from benchmarks import (  # noqa: E402
    experiments,
    finetuning,
    flatness,
    pretraining,
    report,
    run,
)
from benchmarks.flatness import curvature, findings, models, plan, rank_correlation  # noqa: E402
from benchmarks.pretraining import training  # noqa: E402

# Curvature.


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


def net(seed=0):
    """(loss, params, two batches of 5) of a net of two layers, away from any minimum."""
    rng = np.random.default_rng(seed)
    params = {"first": rng.normal(size=(3, 4)), "second": rng.normal(size=(4,))}
    rows = [{"x": rng.normal(size=(5, 3)), "y": rng.normal(size=5)} for _ in range(2)]

    def loss(params, batch):
        return jnp.mean(
            (jnp.tanh(batch["x"] @ params["first"]) @ params["second"] - batch["y"]) ** 2
        )

    return loss, jax.tree.map(jnp.asarray, params), rows


def dense_hessian(loss, params, batches):
    flat, unravel = ravel_pytree(params)
    both = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    return np.asarray(jax.hessian(lambda w: loss(unravel(w), both))(flat)), np.asarray(flat)


@pytest.mark.parametrize("relative", [False, True])
def test_largest_eigenvalue_is_that_of_the_dense_hessian(in_float64, relative):
    loss, params, batches = net()
    hessian, flat = dense_hessian(loss, params, batches)
    scale = curvature.relative_scale(params) if relative else None
    if relative:
        hessian = np.abs(flat)[:, None] * hessian * np.abs(flat)
    values = np.linalg.eigvalsh(hessian)
    key = jax.random.key(0)
    found = curvature.largest_eigenvalue(loss, params, batches, 16, key, scale)
    assert found.largest == pytest.approx(values[-1], rel=1e-9)
    assert found.smallest == pytest.approx(values[0], rel=1e-9)
    for steps in (3, 5):
        part = curvature.largest_eigenvalue(loss, params, batches, steps, key, scale)
        assert part.steps == steps
        assert values[0] - 1e-9 <= part.smallest <= part.largest <= values[-1] + 1e-9
        assert np.abs(values - part.largest).min() <= part.residual * (1 + 1e-9)
    early = curvature.largest_eigenvalue(loss, params, batches, 16, key, scale, tolerance=0.05)
    assert early.steps < 16
    assert early.residual <= 0.05 * early.largest
    assert early.largest == pytest.approx(values[-1], rel=0.01)


def test_lanczos_ends_where_its_space_is_exhausted(in_float64):
    params = {"w": jnp.arange(6.0)}

    def loss(params, batch):  # two eigenvalues, 3 and -1
        return 0.5 * jnp.sum(batch * params["w"] ** 2)

    batch = jnp.array([3.0, 3, 3, -1, -1, -1])
    found = curvature.largest_eigenvalue(loss, params, [batch], 6, jax.random.key(1))
    assert found.steps == 2
    assert (found.largest, found.smallest) == (pytest.approx(3), pytest.approx(-1))
    nothing = curvature.largest_eigenvalue(
        loss, params, [jnp.full(6, jnp.nan)], 6, jax.random.key(1)
    )
    assert np.isnan(nothing.largest)


def quadratic(seed=0):
    """(loss, params, batches, A, b): b'w + w'Aw / 2 in the mean over the two batches."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(6, 6))
    a, b = root @ root.T, rng.normal(size=6)

    def loss(params, batch):
        return batch * (b @ params["w"] + 0.5 * params["w"] @ a @ params["w"])

    return loss, {"w": jnp.asarray(rng.normal(size=6))}, [0.5, 1.5], a, b


def worst_of_quadratic(a, slope, rho):
    """The most of slope'u + u'Au / 2 on |u| = rho: u = (m - A)^-1 slope, for the m > A."""
    values, vectors = np.linalg.eigh(a)
    along = vectors.T @ slope
    m = optimize.brentq(
        lambda m: np.linalg.norm(along / (m - values)) - rho,
        values[-1] + 1e-9, values[-1] + np.linalg.norm(slope) / rho + 1,
    )  # fmt: skip
    u = vectors @ (along / (m - values))
    return slope @ u + 0.5 * u @ a @ u


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("rho", [0.01, 0.3, 3.0])
def test_worst_rise_of_a_quadratic_is_that_of_the_closed_form(in_float64, rho, relative):
    loss, params, batches, a, b = quadratic()
    w = np.asarray(params["w"])
    slope, scale = b + a @ w, None
    if relative:
        slope, a = np.abs(w) * slope, np.abs(w)[:, None] * a * np.abs(w)
        scale = curvature.relative_scale(params)
    expected = worst_of_quadratic(a, slope, rho)
    found = curvature.worst_rise(loss, params, batches, rho, 60, scale)
    assert found.rise == pytest.approx(expected, rel=1e-3)
    few = curvature.worst_rise(loss, params, batches, rho, 5, scale)
    assert 0.8 * expected < few.rise <= expected * (1 + 1e-9)
    at_centre = b @ w + 0.5 * w @ quadratic()[3] @ w
    assert few.centre == pytest.approx(at_centre)
    # The first step ends at SAM's point.
    first = rho * slope / np.linalg.norm(slope)
    assert few.path[0] == pytest.approx(slope @ first + 0.5 * first @ a @ first)
    assert few.rise == max(few.path)
    assert few.slope == pytest.approx(rho * np.linalg.norm(slope))


def test_random_rise_is_the_mean_curvature(in_float64):
    loss, params, batches, a, _ = quadratic()
    found = curvature.random_rise(loss, params, batches, 0.1, 300, jax.random.key(0))
    assert found == pytest.approx(0.01 / 2 * np.trace(a) / 6, rel=0.1)


def test_relative_measures_do_not_depend_on_the_layers_sizes(in_float64):
    _, params, batches = net()

    def loss(params, batch):  # homogeneous in each layer
        hidden = jax.nn.relu(batch["x"] @ params["first"])
        return jnp.mean((hidden @ params["second"] - batch["y"]) ** 2)

    other = {"first": 10 * params["first"], "second": params["second"] / 10}
    plain, relative = (
        [
            [curvature.largest_eigenvalue(loss, p, batches, 16, jax.random.key(0), s).largest,
             curvature.worst_rise(loss, p, batches, 0.1, 5, s).rise]
            for p in (params, other) for s in [scale(p)]
        ] for scale in (lambda p: None, curvature.relative_scale)
    )  # fmt: skip
    np.testing.assert_allclose(*relative, rtol=1e-8)
    assert np.abs(np.log(np.divide(*plain))).min() > 0.3


def test_it_is_compiled_once_for_all_weights():
    loss, params, batches = net()
    before = curvature._hessian_times._cache_size()
    for factor in (1.0, 2.0):
        scaled = jax.tree.map(lambda x, f=factor: f * x.astype(jnp.float32), params)
        scale = None if factor == 1 else curvature.relative_scale(scaled)
        curvature.largest_eigenvalue(loss, scaled, batches, 3, jax.random.key(0), scale)
    assert curvature._hessian_times._cache_size() == before + 1


# Correlation.


def test_rank_correlation_exchanges_whole_methods():
    rng = np.random.default_rng(0)

    def of_blocks(x, y):
        return np.mean([stats.spearmanr(x[:, b], y[:, b]).statistic for b in range(x.shape[1])])

    for count in (4, 5):
        x, y = rng.normal(size=(2, count, 3))
        y += 2 * x.mean(axis=1, keepdims=True) + [0, 50, -50]
        x += [0, 80, 20]  # blocks lie apart, which is no correlation
        observed, p = rank_correlation.of_methods(x, y)
        assert observed == pytest.approx(of_blocks(x, y))
        orders = itertools.permutations(range(count))
        null = [of_blocks(x, y[list(order)]) for order in orders]
        assert np.mean(null) == pytest.approx(0)
        assert p == pytest.approx(np.mean(np.abs(null) >= abs(observed) - 1e-9))
    many = rng.normal(size=(8, 3))
    assert rank_correlation.of_methods(many, many)[0] == pytest.approx(1)
    assert rank_correlation.of_methods(many, many)[1] < 0.01
    assert rank_correlation.of_methods(many, np.ones((8, 3))) == (0.0, 1.0)


def test_holm():
    assert rank_correlation.holm([0.03, 0.001, 0.02]) == [True, True, True]
    assert rank_correlation.holm([0.06, 0.001, 0.02]) == [False, True, True]
    assert rank_correlation.holm([0.02, 0.02, 0.02]) == [False, False, False]


# The experiment.


class Silent:
    def step(self, *told):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_from_a_record_of_fine_tuning_to_the_report(nano, monkeypatch, capsys, task):  # noqa: F811
    monkeypatch.setitem(plan.EXAMPLES, "cpu", 20)
    monkeypatch.setitem(plan.MEASURED, "finetuning", 8)
    source = next(
        c for c in finetuning.cells("cpu") if c["id"] == f"cpu-20-{task}-adamw-seed0"
    )  # fmt: skip
    command = ["flatness", "--out", nano, "--only", f"finetuning-{source['id']}"]
    assert run.main(command) == 1
    printed = capsys.readouterr().out
    assert f"run finetuning --data-dir FOLDER --out {nano} --only {source['id']}\n" in printed

    chosen = {"learning_rate": 5e-3, "rho": None, "loss": 0.0, "metrics": {"": 1.0}}
    recorded = finetuning.run(source, Silent(), {"": chosen})
    origin = experiments.origin()
    experiments.write(nano / "finetuning", source, recorded, 1.0, origin)
    assert run.main(command) == 0
    [record] = experiments.read(nano / "flatness", flatness.cells("cpu"))[0].values()
    result = record["result"]
    assert result["is_same"]
    assert max(result["differences"].values()) < 1e-4
    assert result["score"] == 100 * next(iter(recorded["metrics"].values()))
    for part in (result["train"], result["test"]):
        assert part["residual"] <= 0.01 * part["largest"] or part["steps"] == 12
        assert part["rise"] == max(part["rise_path"]) > abs(part["random_rise"])
    text = report.build(nano, ["flatness"])
    assert "1 of 1 models came out as recorded" in text
    assert "Nothing to compare with GaLore yet." in text
    assert (nano / "flatness" / "flatness-cpu-finetuning.png").stat().st_size > 1000

    # Another model than the recorded one does not pass unseen.
    recorded["learning_rate"] *= 2
    experiments.write(nano / "finetuning", source, recorded, 1.0, origin)
    assert run.main([*command, "--again"]) == 0
    assert "ANOTHER MODEL than the recorded one" in capsys.readouterr().out
    assert "0 of 1 models came out as recorded" in report.build(nano, ["flatness"])


@pytest.mark.slow
def test_from_a_record_of_pre_training(nano_llama, monkeypatch):  # noqa: F811
    monkeypatch.setitem(plan.MEASURED, "pretraining", 5)
    source = next(c for c in pretraining.cells("cpu") if c["id"] == "cpu-a-stdlib-lorenza-seed0")
    chosen = {"matrices_rate": 1e-2, "others_rate": 1e-2, "validation_loss": 1.0}
    recorded = pretraining.run(source, Silent(), {"": chosen})
    experiments.write(nano_llama / "pretraining", source, recorded, 1.0, experiments.origin())
    name = f"pretraining-{source['id']}"
    assert run.main(["flatness", "--out", nano_llama, "--only", name]) == 0
    [record] = experiments.read(nano_llama / "flatness", flatness.cells("cpu"))[0].values()
    result = record["result"]
    assert result["is_same"], result["differences"]
    assert result["score"] == -recorded["validation_loss"]
    # The measured batches are 3 of 2 sequences; by hand, at the trained model.
    params = training.train(source, chosen, Silent()).params
    data = training.data_of(source)
    for part, batches in (
        ("train", [training.train_batch(source, data, step) for step in (0, 2, 5)]),
        ("test", training.validation_batches(source, data)[[0, 4, 8]]),
    ):
        losses = [float(training.loss_of(source)(params, batch)) for batch in batches]
        assert result[part]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert "minus the validation loss" in report.build(nano_llama, ["flatness"])


def stored(factor):
    """Cells and records of two tasks, five methods, three seeds; LORENZA's sharpness given."""
    rng = np.random.default_rng(0)
    cells, records = [], {}
    methods = ("adamw", "galore", "sam", "lorenza_zo", "lorenza_subspace")
    for task, method, seed in itertools.product(("sst2", "stsb"), methods, range(3)):
        name = f"{task}-{method}-{seed}"
        cells.append({"id": name, "kind": "finetuning", "task": task, "method": method,
                      "seed": seed, "measured": 64, **plan.SETTINGS})  # fmt: skip
        sharpness = 10 * (factor if method == "lorenza_zo" else methods.index(method) + 1)
        sharpness *= np.exp(0.01 * rng.normal())
        part = {"loss": 0.1, "largest": sharpness, "smallest": -1.0, "residual": 0.01,
                "rise": sharpness / 100, "relative_rise": sharpness / 50,
                "slope": 0.1, "relative_slope": 0.2,
                "random_rise": 0.0}  # fmt: skip
        records[name] = {"result": {
            "train": part, "test": part, "is_same": True, "differences": {"train_loss": 1e-3},
            "weight_norm": 280.0, "score": 100 - sharpness, "score_name": "accuracy",
            "hyperparameters": {"learning_rate": 1e-3 * (1 + (method == "lorenza_zo"))},
        }}  # fmt: skip
    return cells, records


@pytest.mark.parametrize(
    ("factor", "words"),
    [(0.5, "is flatter (by 3 of 3 measures)"), (9, "is sharper (by 3 of 3 measures)"),
     (2, "is not shown to be flatter or sharper")],
)  # fmt: skip
def test_findings_follow_the_numbers(tmp_path, monkeypatch, factor, words):
    # It is drawn elsewhere.
    monkeypatch.setitem(flatness.report.__globals__, "_plot", lambda *arguments: None)
    cells, records = stored(factor)
    found = flatness.report("cpu", cells, records, tmp_path)
    headline, zo, subspace, sam, goes, held_out = found.findings
    assert f"LORENZA, zo {words} than GaLore (" in headline
    assert f"LORENZA, zo {words} than GaLore on" in zo
    assert "LORENZA, subspace is sharper" in subspace
    for text in (headline, sam):
        assert "SAM is sharper (by 3 of 3 measures) than AdamW" in text
    # Independently: the mean of logarithms, and Welch's interval from spreads within tasks.
    logs = [
        [np.log(records[f"{t}-lorenza_zo-{s}"]["result"]["train"]["largest"]
                / records[f"{t}-galore-{s}"]["result"]["train"]["largest"]) for s in range(3)]
        for t in ("sst2", "stsb")
    ]  # fmt: skip
    # Of two groups' difference: of their sum, one is turned round.
    welch = stats.ttest_ind(logs[0], -np.array(logs[1]), equal_var=False)
    low, high = (f"{np.exp(edge / 2):.2f}" for edge in welch.confidence_interval())
    expected = f"{np.exp(np.mean(logs)):.2f} ({low} to {high})"
    of_task = (
        f"sst2 {np.exp(np.mean(logs[0])):.2f} at 1.00 times the loss and 2.00 times the learning"
    )
    assert f"largest eigenvalue of the Hessian {expected} times: {of_task} rate" in headline
    assert f"largest eigenvalue train {expected}" in zo
    for text in (headline, goes):
        assert "on training examples goes with the score (by 3 of 3 measures)" in text
    assert "on held-out examples goes with the score (by 3 of 3 measures)" in held_out
    assert re.search(r"largest eigenvalue -1.00 \(p (0.0083|0.017)\)", goes), goes  # of 5! orders
    table = "\n".join(found.body)
    assert re.search(r"\| GaLore \| 3 \| 0.1 ± 0 \|", table), table
    # What is stored lies within the interval of a rerun.
    expectations = flatness.again("cpu", cells, records)
    assert [e.cell for e in expectations] == ["sst2-lorenza_zo-0", "stsb-lorenza_zo-0"]
    for e in expectations:
        assert e.low < e.value(records[e.cell]["result"]) < e.high < 1.6 * e.low


@pytest.mark.parametrize(
    ("signs", "words"),
    [
        ((0, 0, 0), "not shown to be flatter or sharper"),
        ((0, 1, 0), "sharper (by 1 of 3 measures only)"),
        ((-1, 0, -1), "flatter (by 2 of 3 measures)"),
        ((1, -1, 1), "flatter (by 1 of 3 measures only) and sharper (by 2 of 3 measures)"),
    ],
)
def test_verdicts_say_how_many_measures_agree(signs, words):
    logs = {str(i): {"a": [sign - 0.1, sign, sign + 0.1]} for i, sign in enumerate(signs)}
    assert findings._verdict(logs) == words


def test_report_has_room_for_runs_that_diverged(tmp_path):  # and draws two tasks
    cells, records = stored(1)
    result = records["sst2-galore-0"]["result"]
    result["train"] = dict.fromkeys(result["train"])
    result["score"] = None
    found = flatness.report("cpu", cells, records, tmp_path)
    assert "diverged" in "\n".join(found.body)
    assert "LORENZA, zo is" in found.findings[0]


def test_cells_of_both_kinds():
    cells = experiments.checked(flatness.cells("cpu"))
    counts = [sum(cell["kind"] == kind for cell in cells) for kind in models.SUBJECTS]
    assert counts == [2 * 5 * 3, 8 * 3]
