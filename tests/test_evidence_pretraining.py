"""Pre-training and ablations as experiments: that they compare what they say they compare."""

import jax
import numpy as np
import optax
import pytest
from scipy import stats

import lorenza_optax

pytestmark = pytest.mark.usefixtures("compile_quickly")

from benchmarks import (  # noqa: E402
    ablations,
    check,
    experiments,
    pretraining,
    report,
    run,
    tables,
)
from benchmarks.ablations import plan as ablations_plan  # noqa: E402
from benchmarks.ablations import variants as ablations_variants  # noqa: E402
from benchmarks.pretraining import methods, plan, sweeps, training  # noqa: E402
from benchmarks.pretraining.report import _differences  # noqa: E402

llama, optimizers = training.llama, training.optimizers
NANO = training.Model(llama.PRESETS["nano"].model, 6, 4, 2, 1.0)
SMALL = {"batch_size": 2, "seq_len": 16, "update_proj_gap": 3, "rho": 0.05, "arguments": {}}


@pytest.fixture
def nano(tmp_path, monkeypatch):
    """Nano models and two of the methods; the folder of results."""
    models = {"cpu": {"a": NANO}, "full": {"a": NANO}}
    monkeypatch.setattr(plan, "MODELS", models)
    monkeypatch.setattr(training, "MODELS", models)
    monkeypatch.setattr(plan, "SHARED", SMALL)
    monkeypatch.setattr(plan, "FULL", {})
    monkeypatch.setattr(plan, "RANKS", {"a": (2,)})
    monkeypatch.setattr(plan, "RETUNED", {"a": 2})
    monkeypatch.setattr(plan, "GAPS", {"a": ()})
    monkeypatch.setattr(plan, "SWEPT", ("lorenza",))
    kept = {name: methods.METHODS[name] for name in ("adamw", "lorenza")}
    for module in (plan, training, methods):
        monkeypatch.setattr(module, "METHODS", kept)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "all.txt").write_text("to be, or not to be: that is the question. " * 99)
    monkeypatch.setenv(experiments.DATA_DIR, str(tmp_path))
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "out")
    training._tokens.cache_clear()
    return tmp_path / "out"


CHANGES = ("sign", "rotate", "squares_transposed")


@pytest.mark.slow
def test_from_trials_to_the_report_and_the_ablations(nano, monkeypatch):
    assert run.main(["pretraining", "--out", nano]) == 0
    cells = pretraining.cells("cpu")
    records, _ = experiments.read(nano / "pretraining", cells)
    assert len(records) == len(cells) == 2 * 6 + 2 * 2 * 2 + 1 + 2 + (6 + 2)

    def result(name):
        return records[f"cpu-{name}"]["result"]

    trials = [result(f"a-stdlib-lorenza-tune{i}") for i in range(6)]
    chosen = min(trials, key=lambda trial: trial["validation_loss"])
    for name in ("a-stdlib-lorenza-seed1", "a-text-lorenza-seed0", "a-stdlib-lorenza-r2-seed0"):
        for rate in ("matrices_rate", "others_rate"):
            assert result(name)[rate] == chosen[rate]
    assert result("a-stdlib-adamw-seed0")["corpus"] != result("a-text-adamw-seed0")["corpus"]
    names = "", "r2-", "r2-tuned-"
    ranks = [result(f"a-stdlib-lorenza-{n}seed0")["optimizer_state_bytes"] for n in names]
    assert ranks[0] > ranks[1] == ranks[2]
    trials = [result(f"a-stdlib-lorenza-r2-tuned-tune{i}") for i in range(6)]
    chosen = min(trials, key=lambda trial: trial["validation_loss"])
    for rate in ("matrices_rate", "others_rate"):
        assert result("a-stdlib-lorenza-r2-tuned-seed1")[rate] == chosen[rate]
    seconds = records["cpu-a-race"]["result"]["seconds"]
    assert {name: len(times) for name, times in seconds.items()} == {"adamw": 3, "lorenza": 3}

    text = report.build(nano, ["pretraining"])
    pairs = [
        np.mean([
            100 * (result(f"{where}-lorenza-seed{s}")["validation_loss"]
                   / result(f"{where}-adamw-seed{s}")["validation_loss"] - 1)
            for where in ("a-stdlib", "a-text")
        ])
        for s in (0, 1)
    ]  # fmt: skip
    shown = tables.t_interval(pairs, "%")
    assert f"of LORENZA, zo {shown} to AdamW's" in text
    above = [
        100 * (result(f"a-stdlib-lorenza-r2-tuned-seed{s}")["validation_loss"]
               / result(f"a-stdlib-adamw-seed{s}")["validation_loss"] - 1)
        for s in (0, 1)
    ]  # fmt: skip
    where = "2 of 32, tuned there, LORENZA's validation loss differs from AdamW's by"
    assert f"{where} {np.mean(above):+.1f} % (" in text
    assert "| 2, tuned there | " in text

    # Run again, the figures are the same; others would be found out.
    (nano / "pretraining" / "cpu-a-race.json").unlink()  # times of so small a model say nothing
    assert check.main(["pretraining", "--out", str(nano)]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(pretraining, "run", lambda *arguments: {"validation_loss": 99.0})
        assert check.main(["pretraining", "--out", str(nano)]) == 1

    # Ablations change one thing of those runs.
    variants = ablations_variants.VARIANTS
    kept = {name: variants[name]._replace(fine_tuning="") for name in CHANGES}
    kept["same"] = kept["sign"]._replace(rho_factor=1.0)
    for function in (ablations.cells, ablations.report):
        monkeypatch.setitem(function.__globals__, "VARIANTS", kept)
    monkeypatch.setattr(ablations_plan, "PLACES", dict.fromkeys(("cpu", "full"), ("a", "b", 0)))
    assert run.main(["ablations", "--out", nano]) == 0
    changed, _ = experiments.read(nano / "ablations", ablations.cells("cpu"))
    assert len(changed) == 4 * 2
    base = result("a-stdlib-lorenza-seed0")["validation_loss"]
    losses = {
        name: changed[f"cpu-a-stdlib-lorenza-seed0-{name}"]["result"]["validation_loss"]
        for name in kept
    }
    assert losses.pop("same") == base
    assert len({*losses.values(), base}) == 4
    text = report.build(nano, ["ablations"])
    assert "| as printed, -rho | LORENZA, zo |" in text


def test_each_kind_of_leaf_moves_at_its_own_rate():
    params = {"layer": np.ones((8, 16), np.float32), "norm": np.ones(16, np.float32)}
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    settings = optimizers.Settings(2, 10, 0.05, 0)
    for method in ("adamw", "muon", "galore", "lorenza_plus"):

        def moved(matrices, others, method=method):
            tx = methods.transformation(method, settings, matrices, others, lambda count: 1.0, {})
            updates, _ = tx.update(grads, tx.init(params), params)
            # Without weight decay, which goes by the rate of the others.
            decay = -others * optimizers.WEIGHT_DECAY
            return {k: np.asarray(u - decay * params[k]) for k, u in updates.items()}

        first, second = moved(1e-2, 1e-3), moved(3e-2, 1e-3)
        np.testing.assert_allclose(3 * first["layer"], second["layer"], rtol=1e-3, atol=1e-7)
        np.testing.assert_array_equal(first["norm"], second["norm"])
        # Adam's first step, downhill; Muon's Adam has Nesterov's momentum.
        np.testing.assert_allclose(first["norm"], -1e-3, rtol=0.5 if method == "muon" else 1e-3)
        assert np.sum(first["layer"] * grads["layer"]) < 0
    adam = optax.adamw(1e-3, weight_decay=optimizers.WEIGHT_DECAY)
    tx = methods.transformation("adamw", settings, 1e-3, 1e-3, lambda count: 1.0, {})
    expected, _ = adam.update(grads, adam.init(params), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


def test_squares_can_be_compressed_on_the_other_side():
    params = {"square": np.ones((8, 8)), "wide": np.ones((8, 16)), "bias": np.ones(8)}
    numbers = methods.NUMBERS["squares_transposed"]
    plans = (
        lorenza_optax.projection_plan(params, 2, weight_dimension_numbers=chosen).projected
        for chosen in (None, numbers)
    )
    usual, changed = ({path: leaf.matrix for path, leaf in of.items()} for of in plans)
    assert usual["wide"] == changed["wide"]
    assert (usual["square"].compressed, usual["square"].row_axes) == ("left", (0,))
    assert (changed["square"].compressed, changed["square"].row_axes) == ("left", (1,))


def test_every_method_has_the_same_budget():
    for name, method in methods.METHODS.items():
        assert len(set(method.trials(True))) == len(set(method.trials(False))) == 6, name


def test_intervals_of_losses_are_of_the_wider_spread():
    losses = {"adamw": (2.0, 2.0, 2.0), "galore": (2.0, 2.0, 2.01), "lorenza": (1.9, 1.9, 2.0)}
    finals = {
        ("a", "stdlib", method): {s: {"validation_loss": x} for s, x in enumerate(of)}
        for method, of in losses.items()
    }
    above = {m: 100 * (np.array(of) / 2 - 1) for m, of in losses.items() if m != "adamw"}
    own = {method: np.std(of, ddof=1) for method, of in above.items()}
    pooled = np.sqrt(np.mean(np.square(list(own.values()))))
    widths = {"galore": (4, pooled), "lorenza": (2, own["lorenza"])}
    for method, (freedom, deviation) in widths.items():
        mean, half = above[method].mean(), stats.t.ppf(0.975, freedom) * deviation / np.sqrt(3)
        shown = f"| {mean:+.1f} % ({mean - half:+.1f} to {mean + half:+.1f}) |"
        assert any(
            tables.NAMES[method] in row and shown in row for row in _differences("a", finals)
        )


@pytest.mark.parametrize(
    ("edges", "words"),
    [((0.5, 0.2, 0.9), "within 1 %"), ((0.5, -1.0, 2.0), "within 1 % in the mean, though not"),
     ((1.5, 0.5, 2.5), "not within 1 %"), ((0.5, None, None), "within 1 % in the mean, though")],
)  # fmt: skip
def test_a_loss_is_within_a_percent_only_with_its_whole_interval(edges, words):
    found = sweeps._within(tables.Difference(*edges))
    assert found == words if words.endswith("%") else found.startswith(words)


@pytest.mark.parametrize("galore", [2.04, None])  # which may have diverged
def test_the_finding_of_the_best_rank_names_both(galore):
    def runs(loss, state):
        return {s: {"validation_loss": loss and loss + 0.01 * s, "optimizer_state_bytes": state}
                for s in range(3)}  # fmt: skip

    sweep = sweeps.Sweep(
        "rank", {"lorenza": {2: runs(2.2, 20), 4: runs(2.1, 30)}},
        {"lorenza": (4, runs(2.02, 30)), "galore": (4, runs(galore, 25))}, runs(2.0, 100), 8,
    )  # fmt: skip
    [finding] = sweeps.rank_finding(sweep)
    assert (
        "4 of 8, tuned there, LORENZA's validation loss differs from AdamW's by +1.0 %" in finding
    )
    assert "0.30x its state" in finding
    assert ("GaLore's, tuned there, too, by +2.0 % (" in finding) == (galore is not None)


def test_intervals_of_few_differences():
    values = [0.3, -0.1, 0.5]
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    assert tables.t_interval(values, "%", 2) == f"+0.23 % ({low:+.2f} to {high:+.2f})"
    assert tables.t_interval([0.3]) == "+0.3 (one seed)"
    groups = [values, [2.0, 3.0], [1.0]]
    spread = tables.pooled(groups)
    about_means = np.concatenate([np.subtract(group, np.mean(group)) for group in groups])
    assert spread.freedom == len(about_means) - len(groups) == 3
    assert spread.deviation == pytest.approx(np.sqrt(np.sum(about_means**2) / spread.freedom))
    half = stats.t.ppf(0.975, 3) * spread.deviation / np.sqrt(2)
    wide = stats.t.ppf(0.975, 1) * np.std(groups[1], ddof=1) / np.sqrt(2)
    assert half < wide  # of two ways the wider
    assert tables.t_edges(groups[1], spread) == pytest.approx((2.5 - wide, 2.5 + wide))
    assert tables.t_edges([2.4, 2.6], tables.Spread(1.0, 5)) == pytest.approx(
        (2.5 - stats.t.ppf(0.975, 5) / np.sqrt(2), 2.5 + stats.t.ppf(0.975, 5) / np.sqrt(2))
    )
    assert tables.pooled([[1.0]]) is None
    assert tables.mean_and_deviation([1.0, None], 2) == "diverged"
