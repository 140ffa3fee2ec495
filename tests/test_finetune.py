"""Fine-tuning learns, scores with the task's metric, resumes, and refuses what cannot work."""

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import bert  # noqa: E402
import decoder  # noqa: E402
import finetune  # noqa: E402
import glue  # noqa: E402
import machine  # noqa: E402
import optimizers  # noqa: E402
import reporting  # noqa: E402

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Two tasks that a word decides: whether there is a cat, and in how many of two texts."""
    folder, rng = tmp_path_factory.mktemp("glue"), np.random.default_rng(0)
    for name in ("SST-2", "STS-B"):
        (folder / name).mkdir()
    words = ["a", "the", "sat", "ran", "on", "over", "mats"]
    animals = ["cat", "dog"]

    def text(animal):
        return " ".join([animals[animal], *rng.choice(words, size=2), animals[animal]])

    for part, count in (("train", 64), ("dev", 40)):
        first, second = rng.integers(0, 2, (2, count))
        lines = [f"{x}\t{text(1 - x)}" for x in first]
        (folder / "SST-2" / f"{part}.tsv").write_text("\n".join(["label\tsentence", *lines]))
        lines = [
            f"news\tx\t2016\t{i}\t{1.0 + 1.5 * (2 - x - y)}\t{text(x)}\t{text(y)}"
            for i, (x, y) in enumerate(zip(first, second, strict=True))
        ]
        (folder / "STS-B" / f"sts-{part}.csv").write_text("\n".join(lines))
    return folder


def run(task, data_dir, checkpoint, out, *more):
    arguments = ["--task", task, "--data-dir", data_dir, "--checkpoint", checkpoint, "--out", out]
    arguments += ["--batch-size", 8, "--max-len", 16, "--rank", 4, "--update-proj-gap", 5, *more]
    return finetune.main([str(argument) for argument in arguments])


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def metrics(folder):
    """The metrics without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    clock = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def final_state(folder):
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())


@pytest.mark.parametrize(
    ("task", "num_labels", "optimizer", "names", "least"),
    [
        ("sst2", 2, "lorenza", ("accuracy",), 0.9),
        pytest.param("stsb", 1, "adamw", ("pearson", "spearman"), 0.8, marks=pytest.mark.slow),
    ],
)
def test_encoder_learns_and_is_scored_by_the_tasks_metrics(
    data_dir, checkpoint, tmp_path, capsys, task, num_labels, optimizer, names, least
):
    out = tmp_path / "run"
    more = ("--optimizer", optimizer, "--lr", "1e-2", "--steps", 60, "--eval-every", 20)
    assert run(task, data_dir, checkpoint, out, *more) == 0
    summary, lines = summary_of(out), metrics(out / optimizer)
    assert summary["data"]["train_examples"] == 64
    assert (out / "loss.png").stat().st_size > 1000
    assert np.mean([line["loss"] for line in lines[-10:]]) < 0.5 * lines[0]["loss"]
    result = summary["optimizers"][optimizer]
    assert all(result[metric] >= least for metric in names), result
    evaluated = [line for line in lines if names[0] in line]
    assert [line["step"] for line in evaluated] == [20, 40, 60]
    assert {key: evaluated[-1][key] for key in names} == {key: result[key] for key in names}
    printed = capsys.readouterr().out
    assert all(f"{result[metric]:.4f}" in printed for metric in names)

    # The numbers are those of the stored weights on all of the development set.
    config, params, tokenizer = bert.load_checkpoint(checkpoint, num_labels, seed=0)
    stored = final_state(out / optimizer)["params"]
    params = jax.tree.unflatten(jax.tree.structure(params), [stored[k] for k in sorted(stored)])
    dev = glue.tokenize(tokenizer, glue.load(task, data_dir).dev, max_len=16)
    scores = np.asarray(jax.jit(bert.logits_of(config))(params, dev))
    predictions = scores[:, 0] if num_labels == 1 else scores.argmax(1)
    for metric in names:
        found = glue.METRICS[metric](dev["labels"], predictions)
        assert result[metric] == pytest.approx(found, abs=1e-5)
    loss = jax.jit(bert.loss_of(config))(params, dev)
    assert result["validation_loss"] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize(
    "names",
    [
        ["adamw"],
        pytest.param(list(optimizers.OPTIMIZERS), marks=pytest.mark.slow),  # all compile
    ],
)
def test_optimizers_start_from_the_checkpoint_and_seed(data_dir, checkpoint, tmp_path, names):
    more = ("--optimizer", *names, "--steps", 1, "--seed", 1)
    assert run("sst2", data_dir, checkpoint, tmp_path / "run", *more) == 0
    starts = {name: metrics(tmp_path / "run" / name)[0]["loss"] for name in names}
    first = [loss for name, loss in starts.items() if name not in ("adazo_sam", "sam", "asam")]
    assert max(first) - min(first) < 1e-4
    config, params, tokenizer = bert.load_checkpoint(checkpoint, num_labels=2, seed=1)
    train = glue.tokenize(tokenizer, glue.load("sst2", data_dir).train, max_len=16)
    batch = finetune.batches.train_batch(train, seed=1, step=0, batch_size=8)
    loss = jax.jit(bert.loss_of(config))(params, batch)
    assert starts["adamw"] == pytest.approx(float(loss), rel=1e-4)


def test_epochs_and_training_examples_give_the_steps(data_dir, checkpoint, tmp_path):
    more = ("--optimizer", "adamw", "--epochs", 2, "--train-examples", 10)
    assert run("sst2", data_dir, checkpoint, tmp_path / "run", *more) == 0
    assert [line["step"] for line in metrics(tmp_path / "run" / "adamw")] == [1, 2, 3]
    assert summary_of(tmp_path / "run")["data"]["train_examples"] == 10


@pytest.mark.slow  # the loop is pretrain.py's, whose test is not
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(
    data_dir, checkpoint, tmp_path, monkeypatch
):
    more = ("--optimizer", "adamw", "--steps", 6, "--checkpoint-every", 2, "--eval-every", 2)
    assert run("sst2", data_dir, checkpoint, tmp_path / "straight", *more) == 0
    shown = reporting.Display.step

    def interrupt_at_3(display, line):
        shown(display, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(reporting.Display, "step", interrupt_at_3)
        assert run("sst2", data_dir, checkpoint, tmp_path / "stopped", *more) == 130
    assert run("sst2", data_dir, checkpoint, tmp_path / "stopped", *more, "--resume") == 0
    folders = [tmp_path / name / "adamw" for name in ("straight", "stopped")]
    assert metrics(folders[0]) == metrics(folders[1])
    jax.tree.map(np.testing.assert_array_equal, *(final_state(folder) for folder in folders))
    with pytest.raises(SystemExit, match=r"--train-examples None \(now 10\)"):
        run("sst2", data_dir, checkpoint, tmp_path / "stopped", *more, "--resume",
            "--train-examples", 10)  # fmt: skip
    changed = checkpoints.write_bert(tmp_path)  # the data are looked at too
    (tmp_path / "SST-2").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "SST-2" / f"{name}.tsv").write_text("label\tsentence\n1\ta cat\n")
    arguments = ("sst2", tmp_path, changed, tmp_path / "run", "--optimizer", "adamw", "--steps", 1)
    assert run(*arguments) == 0
    (tmp_path / "SST-2" / "train.tsv").write_text("label\tsentence\n1\ta dog\n")
    with pytest.raises(SystemExit, match="the data .* is not what the run"):
        run(*arguments, "--resume")


# Instruction tuning.


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Questions whose answer stands in them."""
    folder = tmp_path_factory.mktemp("sums")
    (folder / "gsm8k").mkdir()
    for name, count in (("train", 60), ("test", 6)):
        rows = [{"question": f"{i % 4}?", "answer": f"#### {i % 4}"} for i in range(count)]
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / "gsm8k" / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "optimizer", "more", "share"),
    [
        ("qwen2", "adamw", ("--steps", 1), 0.0),
        ("qwen2", "adamw", ("--steps", 120), 1.0),
        ("llama 3.2", "lorenza", ("--steps", 120), 1.0),
    ],
)
def test_decoder_learns_to_answer(sums, tmp_path, kind, optimizer, more, share):
    folder, out = tmp_path / "checkpoint", tmp_path / "run"
    folder.mkdir()
    checkpoints.write_decoder(folder, shards=2, **checkpoints.DECODERS[kind])
    more += ("--max-len", 48, "--max-new-tokens", 10, "--lr", "1e-2", "--eval-every", 30)
    assert run("gsm8k", sums, folder, out, *more, "--optimizer", optimizer) == 0
    summary = summary_of(out)
    result = summary["optimizers"][optimizer]
    assert result["exact_match"] == share, result
    assert (result["validation_loss"] < 0.1) == bool(share), result
    assert summary["data"]["train_examples"] == 57


def test_too_large_decoder_is_refused_before_its_weights_are_read(sums, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**5)
    monkeypatch.setattr(decoder, "read_parameters", None)
    folder = checkpoints.write_decoder(tmp_path)
    with pytest.raises(SystemExit, match=r"needs about .*100\.0 kB are available"):
        run("gsm8k", sums, folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("sst2", ("--max-len", 17), "--max-len 17: the model has 16 positions"),
        ("sst2", ("--train-examples", 65), "--train-examples 65: there are only 64"),
        ("rte", (), r"there is no file .*RTE/train\.tsv"),
        ("gsm8k", (), "model_type is 'bert'; this model is for llama and qwen2"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(
    data_dir, checkpoint, tmp_path, task, more, message
):
    with pytest.raises(SystemExit, match=message):
        run(task, data_dir, checkpoint, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_wrong_arguments_are_refused(capsys):
    for arguments, message in (
        (["--task", "gsm8k", "--data-dir", "x"], "gsm8k needs the folder of a Llama or a Qwen2"),
        (["--task", "mnli", "--data-dir", "x"], "invalid choice: 'mnli'"),
        (["--task", "rte"], "required: --data-dir"),
        (["--task", "rte", "--data-dir", "x", "--optimizer", "sgd"], "sgd is not known"),
        (["--task", "rte", "--data-dir", "x", "--steps", "1", "--epochs", "1"], "not allowed"),
    ):
        with pytest.raises(SystemExit):
            finetune.main(arguments)
        assert message in capsys.readouterr().err


def test_galore_projects_the_same_matrices_as_lorenza(checkpoint):
    _, params, _ = bert.load_checkpoint(checkpoint, num_labels=2, seed=0)
    settings = optimizers.Settings(rank=4, update_proj_gap=5, rho=0.0, seed=0)
    projector = optimizers.optax_galore(1e-3, settings).init(params)[0].projector
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(projector)
        if leaf.size
    }
    assert found == set(finetune.optimizers.lorenza_optax.projection_plan(params, 4).projected)
