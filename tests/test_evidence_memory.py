"""Memory by shapes: the examples' own model, and counts that are what steps really allocate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("compile_quickly")

from benchmarks import (  # noqa: E402
    experiments,
    memory,
)
from benchmarks.memory import deviceless, findings, methods, model, plan, steps  # noqa: E402
from lorenza_optax.memory import memory_report  # noqa: E402

llama = steps.llama
CONFIG = llama.LlamaConfig(256, 32, 64, 2, 2)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 17))


def _cell(name, preset="nano", rank=8, **changes):
    cell = plan._cell("cpu", preset, name, rank, dtype="float32", batch=(2, 16))
    return {**cell, "scanned": methods.METHODS[name].scanned, **changes}


def _arranged(params, scanned):
    blocks = [params["blocks"][i] for i in range(CONFIG.num_layers)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {**params, "blocks": stacked if scanned else blocks}


@pytest.mark.parametrize(
    "scanned", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["scanned", "unrolled"]
)
def test_the_loss_and_its_gradient_are_those_of_the_example(scanned):
    params = llama.init(CONFIG, 0)
    expected, gradient = jax.jit(jax.value_and_grad(llama.loss_of(CONFIG)))(params, TOKENS)
    loss, shapes = model.abstract(CONFIG, scanned=scanned)
    arranged = _arranged(params, scanned)
    assert jax.tree.map(jnp.shape, arranged) == jax.tree.map(jnp.shape, shapes)
    found, of_stacks = jax.jit(jax.value_and_grad(loss))(arranged, TOKENS)
    assert found == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        of_stacks, _arranged(gradient, scanned),
    )  # fmt: skip


def test_adapters_are_the_low_rank_change_of_lora():
    rank, rng = 3, np.random.default_rng(1)
    loss, shapes = model.abstract(CONFIG, rank)
    trained, frozen, join = model.lora_split(shapes)
    trained, frozen = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), (trained, frozen)
    )
    joined = join(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(shapes)

    def formed(node):
        if isinstance(node, dict) and "A" in node:
            return {"kernel": node["base"]["kernel"] + 2.0 * node["A"] @ node["B"]}
        return {k: formed(v) for k, v in node.items()} if isinstance(node, dict) else node

    plain, _ = model.abstract(CONFIG)
    expected = jax.jit(plain)(formed(joined), TOKENS)
    assert jax.jit(loss)(joined, TOKENS) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lora", "lorenza", "lorenza_sketch"])
def test_counts_are_those_of_the_memory_report(name):
    """Which takes layers one by one, by its own shapes of the preset."""
    cell = _cell(name, "350M", 256)
    found = steps.counted(cell, steps.program_of(cell))
    more = {"refresh": "sketch"} if name == "lorenza_sketch" else {}
    [row] = memory_report("350M", 256, methods=[name.partition("_")[0]], **more).rows
    assert found["weights"] == row.weights
    assert found["state"] == row.state
    assert (found["gradients"], found["refresh_gradients"]) == (
        row.gradients, row.refresh_gradients,
    )  # fmt: skip


def test_state_follows_from_the_sizes_of_matrices():
    cell = _cell("lorenza", "7B", 128)
    state = steps.counted(cell, steps.program_of(cell))["state"]
    width, wide, layers, vocabulary, rank = 4096, 11008, 32, 32_000, 128
    matrices = layers * (4 * [(width, width)] + 3 * [(width, wide)]) + [(width, vocabulary)]
    low = sum(rank * (m + n) + 2 * rank * max(m, n) for m, n in matrices)
    full = 2 * (vocabulary * width + (2 * layers + 1) * width)
    assert state == pytest.approx(4 * (low + full), rel=1e-5)  # beside counts and seeds
    nothing = _cell("sgd", "7B")
    assert steps.counted(nothing, steps.program_of(nothing))["state"] == 0


def test_the_same_steps_are_counted_alike():
    """GaLore with sketches is LORENZA without its perturbation."""
    cells = [_cell(name) for name in ("lorenza_sketch", "galore_sketch")]
    ours, theirs = (steps.counted(cell, steps.program_of(cell)) for cell in cells)
    assert theirs["gradients"] == ours["gradients"] < ours["weights"]
    assert theirs["refresh_gradients"] == ours["refresh_gradients"] < ours["weights"]


@pytest.mark.parametrize(
    "name",
    ["adamw", "lora"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in methods.METHODS
        if name not in ("adamw", "lora")
    ],
)
def test_a_step_allocates_what_is_counted(name):
    found = steps.measured(_cell(name, steps=2))
    assert found["run"]["state"] == found["state"]
    assert found["run"]["weights"] == found["weights"]
    assert np.isfinite(found["run"]["loss"])
    tokens = 4 * 2 * 17
    # Of stateless seeds and counts nothing may be left out: a program drops what it does not use.
    kept = found["weights"] + found["state"] + tokens
    assert found["arguments"] == pytest.approx(kept, rel=1e-3)
    donated = found["gradients"] if name == "lora" else found["weights"]
    assert found["aliased"] == pytest.approx(donated + found["state"], rel=2e-3)
    rest = found["outputs"] - found["aliased"]
    assert found["peak"] == found["arguments"] + rest + found["temporaries"]


def _run(method, weights, gradients, state, peak, rank=None, **more):
    return {
        "id": f"{method}-{rank}", "kind": "step", "preset": "7B", "method": method, "rank": rank,
        "batch": [1, 256], "dtype": "float32", "scanned": True, "parameters": weights,
        "weights": weights, "gradients": gradients, "refresh_gradients": gradients,
        "state": state, "temporaries": gradients, "peak": peak, **more,
    }  # fmt: skip


def _records(runs):
    return {run["id"]: {"machine": {"device_kind": "Abacus"}, "result": run} for run in runs}


@pytest.fixture
def runs():
    return [
        _run("adamw", 100, 100, 200, 500),
        _run("lora", 104, 4, 8, 120, 8),
        _run("lorenza", 100, 100, 20, 250, 8),
        _run("lorenza_sketch", 100, 2, 20, 150, 8),
        _run("lorenza", 100, 100, 150, 600, 99),
    ]


def test_report_compares_at_each_rank(runs, tmp_path):
    records = _records(runs)
    found = memory.report("cpu", runs, records, tmp_path)
    text = "\n".join(found.body)
    assert "### 7B, rank 8 (cpu size)" in text
    assert "### 7B, rank 99 (cpu size)" in text
    # State, counted and peak: 1 - 20/200, 1 - 220/400, 1 - 250/500 of AdamW's.
    assert "| 7B | 8 | LORENZA | 90 / 45 / 50 | - / - / - | - / - / - | -150 / -90 / -108 |" in text
    assert "| 7B | 99 | LORENZA | 25 / 12 / -20 |" in text
    assert (tmp_path / "memory-cpu.png").stat().st_size > 1000
    short, headline, default, sketched = found.findings
    assert (
        "below AdamW's, at rank 8 / 99, with LORENZA 50 / -20 %, LORENZA (sketched) 70 / - %, "
        "LoRA 76 / - %." in short
    )
    assert (
        "optimizer state it is reached by LORENZA in 1 of 2, LORENZA (sketched) in 1 of 1"
        in headline
    )
    assert (
        "compiled step it is reached by LORENZA in 0 of 2, LORENZA (sketched) in 1 of 1" in headline
    )
    assert "70.0 %, 3.0 points above: LORENZA (sketched), 7B, rank 8" in headline
    assert "of the defaults 50.0 %, 17.0 points short: LORENZA, 7B, rank 8" in headline
    assert "at rank 8, 50 % less than AdamW's, 108 % more than LoRA's" in default
    assert "at rank 99, 20 % more than AdamW's" in default
    assert "at rank 8, 70 % less than AdamW's, 25 % more than LoRA's" in sketched


def test_report_of_some_cells_and_of_none(runs, tmp_path):
    records = _records([run for run in runs if run["method"] != "adamw"])
    found = memory.report("cpu", runs, records, tmp_path)
    assert [text.partition(" than ")[2] for text in found.findings] == [
        "LoRA's.",
        "LoRA's.",
    ]
    assert memory.report("cpu", runs, {}, tmp_path).findings == []


def test_smaller_shapes_and_steps_that_ran_are_in_short(runs, tmp_path):
    small = [_run(m, 10, 10, 20, p, r) | {"preset": "60M", "id": f"60M-{m}"}
             for m, p, r in (("adamw", 50, None), ("lorenza", 55, 8))]  # fmt: skip
    cells = small + runs
    short = memory.report("cpu", cells, _records(cells), tmp_path).findings[0]
    assert "Of LORENZA at smaller shapes: 60M -10 % (rank 8). Published" in short
    runs[2]["run"] = {"peak": 3e9, "peak_before": 1e9}
    runs[3]["run"] = {"peak": 2e9, "peak_before": 2e9}  # which was of something before it
    short = memory.report("full", runs, _records(runs), tmp_path).findings[0]
    assert short.startswith("**Memory on a GPU.**")
    assert short.endswith("by its allocator: LORENZA 3.0 GB (rank 8, Abacus).")


def test_report_of_steps_compiled_for_a_gpu(runs, tmp_path):
    """They stand apart from those that a CPU compiled for itself."""
    gpu = {"target": deviceless.H100, "dtype": "bfloat16"}
    planned = [
        _run("adamw", 50, 50, 100, 200, **gpu) | {"id": "gpu-adamw"},
        _run("lorenza", 50, 50, 10, 130, 8, **gpu) | {"id": "gpu-lorenza"},
    ]
    both = runs + planned
    found = memory.report("cpu", both, _records(both), tmp_path)
    assert "In bfloat16, compiled for an H100: at rank 8, with LORENZA 35 %." in found.findings[0]
    assert "rank 8 / 99, with LORENZA 50 / -20 %" in found.findings[0]
    text = "\n".join(found.body)
    table = text.partition("### 7B, rank 8, bfloat16, for an NVIDIA H100")[2].partition("###")[0]
    assert table.count("\n| ") == 4
    assert "0.65 |" in table


def test_compiling_for_a_gpu_says_what_it_takes(monkeypatch):
    cells = [cell for cell in memory.cells("cpu") if "target" in cell]
    assert {cell["rank"] for cell in cells} == {None, 1024, 128, 8}
    assert all(cell["target"] == deviceless.H100 and not cell["steps"] for cell in cells)
    assert not any("target" in cell for cell in memory.cells("full"))
    monkeypatch.setattr(deviceless, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match=r"pip install -e '\.\[bench,deviceless\]'"):
        steps.run(cells[0], None, {})


def test_cells_and_the_count_of_roberta(tmp_path):
    for size in experiments.SIZES:
        experiments.checked(memory.cells(size))
    rows = steps.counted_roberta(4)
    weights = rows["adamw"]["weights"]
    encoder = 12 * (4 * 768 * 769 + 768 * 3072 * 2 + 3072 + 768 + 4 * 768)
    tables = (50_265 + 514 + 1 + 2) * 768
    assert weights == 2 * (encoder + tables + 768 * 769)
    assert rows["adamw"]["state"] == 2 * weights + 4
    assert rows["lorenza_sketch"]["state"] < 0.02 * weights
    [limit] = findings.findings("cpu", {}, [{"rank": 4, **rows}])
    saved = 1 - (weights + rows["lorenza_embedding"]["state"]) / (3 * weights)
    assert f"projected, too, {100 * saved:.1f} %; a method without any state" in limit
    assert "66.7 % less" in limit
