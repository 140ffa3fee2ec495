"""The README's code runs, its commands are CI's, and its numbers stand in the stored results."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ZEROTH_ORDER = ("LOZO", "SubZero", "MeZO", "ZO-Muon")


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    quickstart, train_state, momentum, plan, family = blocks

    def loss(params, batch):
        return jnp.mean((batch @ params["kernel"] @ params["out"] - 1.0) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "kernel": 0.05 * jax.random.normal(keys[0], (160, 192)),
        "out": 0.05 * jax.random.normal(keys[1], (192, 160)),
    }
    batch = jax.random.normal(keys[2], (32, 160))
    before = loss(params, batch)

    names = {"params": params, "loss": loss}
    exec(quickstart, names)
    trained, opt_state = params, names["opt_state"]
    for _ in range(5):
        trained, opt_state = names["train_step"](trained, opt_state, batch)
    assert loss(trained, batch) < before
    assert bool(opt_state[0].ascent.perturbed)

    names |= {"optax": optax}
    exec(train_state, names)
    state = TrainState.create(apply_fn=None, params=params, tx=names["tx"])
    for _ in range(5):
        state, _ = names["train_step"](state, batch)
    assert loss(state.params, batch) < before

    build, evaluate = momentum.split("...", 1)
    exec(build, names)
    held, opt_state = params, names["tx"].init(params)
    update = jax.jit(lambda p, s: names["tx"].update(jax.grad(loss)(p, batch), s, p))
    for _ in range(5):
        updates, opt_state = update(held, opt_state)
        held = optax.apply_updates(held, updates)
    names |= {"opt_state": opt_state, "params": held}
    exec(evaluate.partition("\n")[2], names)
    assert not jnp.array_equal(names["evaluated"]["kernel"], held["kernel"])
    assert loss(held, batch) < before

    exec(plan, names)
    scanned = {
        "layers": {
            "mlp": {"kernel": jnp.ones((2, 160, 192))},
            "attention": {"kernel": jnp.ones((2, 160, 4, 48))},
        }
    }
    assert len(names["tx"].init(scanned)[0].q) == 2

    header, *examples = family.strip().split("\ntx = ")
    extra = {"value_fn": loss, "batch": batch}
    for example in examples:
        exec(f"{header}\ntx = {example}", names)
        step = jax.jit(lambda state: names["tx"].update(None, state, params, **extra))
        moves, _ = step(names["tx"].init(params))
        assert all(jnp.any(move != 0) for move in jax.tree.leaves(moves))


def test_ci_runs_the_test_command():
    commands = [
        re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```", README) for name in ("main", "test")
    ]
    assert all(commands)
    assert "examples/pretrain.py" in commands[0][1]
    assert "-m pytest" in commands[1][1]
    assert "<!-- test -->" in (ROOT / ".ci" / "run").read_text()


def test_every_figure_stands_in_the_results():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", README, flags=re.DOTALL)
    prose = re.sub(r"(arXiv|Python) [\d.]+", "", prose)
    # Whole figures: a part of another one is not that figure.
    quoted, stored = (set(re.findall(r"\d+\.\d+|\b\d+ %", text)) for text in (prose, results))
    assert len(quoted) > 50
    assert quoted <= stored, quoted - stored
    # Intervals belong to what they are of.
    interval = r"[+-][\d.]+(?: points?| %)? \([+-][\d.]+ to [+-][\d.]+\)"
    quoted, stored = (
        {re.sub(" points?", "", found) for found in re.findall(interval, text)}
        for text in (prose, results)
    )
    assert len(quoted) > 5
    assert quoted <= stored, quoted - stored


def test_results_are_built_from_what_is_stored(tmp_path, monkeypatch):
    from benchmarks import experiments, report

    # Plots take longer to draw than all tables.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *arguments, **options: None)
    copied = shutil.copytree(experiments.RESULTS, tmp_path / "results")
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text() == report.build(copied)


def test_the_main_jobs_table_is_the_stored_one():
    from benchmarks import main_job

    summary = json.loads((ROOT / "benchmarks" / "results" / "main_job.json").read_text())
    assert main_job.markdown(summary) in README


def test_the_table_of_ascents_is_the_stored_one():
    from benchmarks.ascent import readme_table

    assert readme_table.markdown(*map(readme_table.load, ("ascent", "step_cost"))) in README


def test_the_table_of_the_family_is_the_stored_one():
    from benchmarks.family import readme_table

    table = readme_table.markdown(json.loads(readme_table.RESULTS.read_text()))
    assert table in README
    for path in re.findall(r"\]\((lorenza_optax/\S+\.py)\)", table):
        assert (ROOT / path).exists(), path


def test_the_memory_of_zeroth_order_is_the_stored_one():
    stored = json.loads((ROOT / "benchmarks" / "results" / "zeroth_order_memory.json").read_text())
    rows = stored["unrolled"]["optimizers"]
    copies = {name: f"{rows[f'{name}, in place']['extra_copies']:.2f}" for name in ZEROTH_ORDER}
    lozo, *others = (f"{copies[name]} for {name}" for name in ZEROTH_ORDER)
    assert (
        lozo.replace(" for", " copies of the weights more than evaluating the loss for") in README
    )
    assert f"{others[0]}, {others[1]} and {others[2]}" in README


def test_tuning_figures_are_the_stored_ones():
    rows = json.loads((ROOT / "benchmarks" / "results" / "pretrain_tuning.json").read_text())
    losses = {f"{row['result']['validation_loss']:.3f}" for row in rows}
    section = README[README.index("## How to choose") :]
    quoted = set(re.findall(r"\b[12]\.\d{3}\b", section))
    assert quoted
    assert quoted <= losses


def test_losses_with_8_bit_moments_are_the_stored_ones():
    summary = json.loads((ROOT / "benchmarks" / "results" / "int8_moments.json").read_text())
    losses = {r["moment_dtype"]: f"{r['result']['validation_loss']:.3f}" for r in summary["runs"]}
    share = summary["moment_bytes"]["int8"] / summary["moment_bytes"]["float32"]
    quoted = (
        f"{losses['float32']} with float32 moments, {losses['bfloat16']} with bfloat16 and"
        f" {losses['int8']} with int8, in {share:.2f} of the bytes"
    )
    assert quoted in README


def test_what_it_works_with_is_tested():
    section = README[README.index("## Works with") : README.index("## What an ascent")]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        linked = re.findall(r"\]\((tests/test_\w+\.py)\)", row)
        assert linked, row
        for path in linked:
            assert "\ndef test_" in (ROOT / path).read_text(), path
