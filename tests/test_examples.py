"""The examples run, resume with the same bits, and refuse with a message what cannot work."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import corpus  # noqa: E402
import linen_train_state  # noqa: E402
import llama  # noqa: E402
import machine  # noqa: E402
import minimal  # noqa: E402
import optimizers  # noqa: E402
import pretrain  # noqa: E402
import reporting  # noqa: E402
from tests import problems  # noqa: E402

NANO = llama.PRESETS["nano"].model
FEW = ["lorenza", "adazo_sam", "adamw", "optax_galore", "optax_sam"]
PERTURB_THE_FIRST_STEP = {"adazo_sam", "sam", "asam"}
# Their loss is the mean of those at both ends of a central difference.
EVALUATE_ASIDE = {"mezo", "lozo", "lozo_m", "subzero"}
pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A corpus of 60 small files: reading the standard library in each test takes longer."""
    folder = tmp_path_factory.mktemp("texts")
    words = np.array(["the", "loss", "at", "an", "ascent", "point", "is", "flat", "or", "sharp"])
    rng = np.random.default_rng(0)
    for i in range(60):
        (folder / f"part{i}.txt").write_text(" ".join(rng.choice(words, size=400)))
    return folder


def run_arguments(text_folder, out, *more, steps=4):
    return [
        *("--preset", "nano", "--data", str(text_folder), "--out", str(out)),
        *("--steps", str(steps), "--batch-size", "4", "--eval-every", "2", *more),
    ]


def metrics(folder):
    """The metrics without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    clock = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def final_state(folder):
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())


# The corpus.


def test_default_corpus_is_split_by_file_and_always_the_same():
    documents, _ = corpus.read_documents()
    train, validation = corpus.split_documents(documents)
    names = {d.name for d in train}, {d.name for d in validation}
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == {d.name for d in documents}
    assert not any("site-packages" in name for name in names[0] | names[1])
    sizes = [sum(len(d.text) for d in part) for part in (train, validation)]
    assert sizes[0] > 5e6
    assert 0.01 < sizes[1] / sum(sizes) < 0.15
    again, _ = corpus.read_documents()
    assert corpus.fingerprint(documents) == corpus.fingerprint(again)


def test_zips_in_a_folder_are_read_and_damaged_ones_skipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("speeches/1.txt", "one")
        archive.writestr("speeches/0.txt", "zero")
        archive.writestr("picture", b"\xff\xfe\x00")
    (tmp_path / "a.txt").write_text("alpha")
    whole = (tmp_path / "b.zip").read_bytes()
    (tmp_path / "c.zip").write_bytes(whole.replace(b"zero", b"hero"))
    (tmp_path / "d.zip").write_text("not a zip")
    documents, description = corpus.read_documents(tmp_path)
    assert [(d.name, d.text) for d in documents] == [
        ("a.txt", "alpha"),
        ("b.zip/speeches/0.txt", "zero"),
        ("b.zip/speeches/1.txt", "one"),
        ("c.zip/speeches/1.txt", "one"),
        ("d.zip", "not a zip"),
    ]
    assert "5 files, 3 skipped" in description


def test_batches_depend_on_seed_and_step_only():
    tokens = np.arange(1000, dtype=np.uint8)
    first = corpus.train_batch(tokens, seed=1, step=5, batch_size=4, seq_len=8)
    assert first.shape == (4, 9)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first, corpus.train_batch(tokens, 1, 5, 4, 8))
    for seed, step in ((1, 6), (2, 5), (5, 1)):
        assert not np.array_equal(first, corpus.train_batch(tokens, seed, step, 4, 8))


def test_windows_reach_both_ends_of_the_text():
    tokens = np.arange(200, dtype=np.uint8)
    held_out = corpus.validation_batches(tokens, count=3, batch_size=4, seq_len=8)
    assert held_out.shape == (3, 4, 9)
    assert held_out.min() == 0
    assert held_out.max() == 199
    seen = [corpus.train_batch(tokens[:10], 0, step, 4, 8) for step in range(10)]
    assert np.max(seen) == 9


def test_bpe_round_trip(text_folder):
    documents, _ = corpus.read_documents(text_folder)
    tokenizer = corpus.train_bpe(documents, vocab_size=300)
    assert 257 < tokenizer.get_vocab_size() <= 300
    text = "a gradient, naïve 😀\n\tdef f(x): return x"
    tokens = corpus.encode_bpe(tokenizer, [corpus.Document("x", text)])
    assert tokenizer.decode(tokens[:-1].tolist()) == text
    assert tokens[-1] == tokenizer.token_to_id(corpus.END_OF_TEXT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xff\xfe\x00text", "not UTF-8"),
        (b"text\0text", "binary"),
        (b"too short", "one sequence needs 33"),
    ],
)
def test_unusable_data_is_refused_and_nothing_is_written(tmp_path, content, message):
    path, out = tmp_path / "data.txt", tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        pretrain.main(run_arguments(path, out))
    assert not out.exists()


def test_folder_without_text_is_refused(tmp_path):
    (tmp_path / "picture.bin").write_bytes(bytes(range(256)))
    with pytest.raises(SystemExit, match="no text in this folder"):
        corpus.read_documents(tmp_path)


# The model.


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("tiny", 1_869_504),
        ("60M", 58_073_600),
        ("130M", 134_105_856),
        problems.slow("350M", 367_969_280),
        problems.slow("1B", 1_339_082_752),
        ("7B", 6_738_415_616),
    ],
)
def test_preset_sizes(preset, parameters):
    assert llama.parameter_count(llama.PRESETS[preset].model) == parameters


def test_model_is_causal_and_batch_rows_do_not_mix():
    graphdef, _ = llama.abstract(NANO)
    params = llama.init(NANO, seed=0)
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, NANO.vocab_size)
    before = llama.logits(graphdef, params, tokens)
    changed = tokens.at[0, 7].add(1)
    after = llama.logits(graphdef, params, changed)
    np.testing.assert_allclose(before[0, :7], after[0, :7], atol=1e-5)
    np.testing.assert_allclose(before[1], after[1], atol=1e-5)
    assert jnp.all(jnp.max(jnp.abs(before[0, 7:] - after[0, 7:]), axis=-1) > 1e-4)


def test_rotary_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    row = jnp.ones((1, 9, 1, 1))
    frequency = llama.rotary_frequencies(llama.LlamaConfig(hidden_size=16, num_heads=1))
    q_turned, k_turned = (
        llama.rotary(x * row, jnp.arange(9)[None], frequency)[0, :, 0] for x in (q, k)
    )
    scores = q_turned @ k_turned.T
    np.testing.assert_allclose(scores[3, 1], scores[8, 6], rtol=1e-4)
    assert abs(scores[3, 1] - scores[3, 2]) > 1e-3


def test_initial_loss_is_near_that_of_guessing():
    graphdef, _ = llama.abstract(NANO)
    tokens = jax.random.randint(jax.random.key(0), (4, 33), 0, NANO.vocab_size)
    loss = llama.loss(graphdef, llama.init(NANO, seed=0), tokens)
    assert abs(loss - np.log(NANO.vocab_size)) < 1.5


# The main job.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        ("float32", FEW),
        # The nano model has one layer, of which OwLore cannot sample.
        pytest.param(
            "float32", [n for n in optimizers.OPTIMIZERS if n != "owlore"], marks=pytest.mark.slow
        ),
        pytest.param("bfloat16", ["lorenza", "adamw"], marks=pytest.mark.slow),
    ],
)
def test_optimizers_run_from_the_same_start_on_the_same_batches(
    text_folder, tmp_path, dtype, names
):
    arguments = run_arguments(text_folder, tmp_path / "run", "--dtype", dtype, "--optimizer")
    assert pretrain.main([*arguments, *names]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["optimizers"]) == names
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    assert (tmp_path / "run" / "diagnostics.png").stat().st_size > 1000
    for name, result in summary["optimizers"].items():
        lines = metrics(tmp_path / "run" / name)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
        assert result["validation_loss"] == lines[-1]["validation_loss"] < 6.5
        assert result["relative_to_adamw"]["optimizer_state_bytes"] > 0
    # LORENZA has no subspace yet at its first step.
    compared = [name for name in names if name not in PERTURB_THE_FIRST_STEP | EVALUATE_ASIDE]
    starts = [metrics(tmp_path / "run" / name)[0]["loss"] for name in compared]
    assert max(starts) - min(starts) < (1e-4 if dtype == "float32" else 1e-2)
    state = {name: r["optimizer_state_bytes"] for name, r in summary["optimizers"].items()}
    # optax.adamw keeps bfloat16 moments for bfloat16 weights, LORENZA float32 ones.
    assert state["lorenza"] < state["adamw"] * (1 if dtype == "float32" else 2)


@pytest.mark.slow
def test_order_of_optimizers_does_not_matter(text_folder, tmp_path):
    for order in ("adamw,optax_galore", "optax_galore,adamw"):
        arguments = run_arguments(text_folder, tmp_path / order, "--optimizer", order)
        assert pretrain.main(arguments) == 0
    for name in ("adamw", "optax_galore"):
        first, second = (metrics(tmp_path / order / name) for order in os.listdir(tmp_path))
        assert first == second


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "optax_galore")]
    + ["lorenza"],
)
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(text_folder, tmp_path, monkeypatch, name):
    more = ("--optimizer", name, "--checkpoint-every", "2")
    straight = run_arguments(text_folder, tmp_path / "straight", *more, steps=6)
    assert pretrain.main(straight) == 0

    stopped = run_arguments(text_folder, tmp_path / "stopped", *more, steps=6)
    shown = reporting.Display.step

    def interrupt_at_3(display, line):
        shown(display, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(reporting.Display, "step", interrupt_at_3)
        assert pretrain.main(stopped) == 130
    # A line of a step after the checkpoint, as a killed process leaves it, must go.
    with (tmp_path / "stopped" / name / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    assert pretrain.main([*stopped, "--resume"]) == 0

    folders = [tmp_path / run / name for run in ("straight", "stopped")]
    assert metrics(folders[0]) == metrics(folders[1])
    first, second = (final_state(folder) for folder in folders)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_finished_optimizer_is_not_run_again(text_folder, tmp_path, capsys):
    arguments = run_arguments(text_folder, tmp_path / "run", "--optimizer", "adamw")
    assert pretrain.main(arguments) == 0
    before = (tmp_path / "run" / "adamw" / "metrics.jsonl").read_bytes()
    assert pretrain.main([*arguments, "sam", "--resume"]) == 0
    assert "adamw: finished earlier" in capsys.readouterr().out
    assert (tmp_path / "run" / "adamw" / "metrics.jsonl").read_bytes() == before
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["optimizers"]) == ["adamw", "sam"]


def test_resume_refuses_other_arguments_and_other_text(text_folder, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("one two three " * 100)
    arguments = run_arguments(data, tmp_path / "run", "--optimizer", "adamw", steps=1)
    assert pretrain.main(arguments) == 0
    with pytest.raises(SystemExit, match=r"--seed 0 \(now 1\)"):
        pretrain.main([*arguments, "--resume", "--seed", "1"])
    data.write_text("four five six " * 100)
    with pytest.raises(SystemExit, match="the text"):
        pretrain.main([*arguments, "--resume"])
    with pytest.raises(SystemExit, match="no run in"):
        pretrain.main([*run_arguments(text_folder, tmp_path / "nothing"), "--resume"])


def test_earlier_run_is_moved_aside_and_foreign_folders_are_refused(text_folder, tmp_path):
    arguments = run_arguments(text_folder, tmp_path / "run", "--optimizer", "adamw", steps=1)
    assert pretrain.main(arguments) == 0
    first = (tmp_path / "run" / "summary.json").read_bytes()
    assert pretrain.main(arguments) == 0
    assert (tmp_path / "run-1" / "summary.json").read_bytes() == first
    with pytest.raises(SystemExit, match="not a run of this program"):
        pretrain.main(run_arguments(text_folder, text_folder))


def test_too_large_preset_is_refused_before_anything_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 8 * 10**9)
    with pytest.raises(SystemExit, match=r"needs about .* 8\.0 GB are available.*--preset 60M"):
        pretrain.main(["--preset", "7B", "--optimizer", "adamw", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**6)
    with pytest.raises(SystemExit, match="No smaller preset fits"):
        pretrain.main(["--preset", "tiny", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_available_memory_of_this_machine_is_plausible():
    available = machine.available_bytes()
    assert available is None or 10**7 < available < 10**14


def test_interrupted_process_saves_and_resumes(text_folder, tmp_path):
    """The same through a real process, and with SIGTERM."""
    out = tmp_path / "run"
    arguments = run_arguments(text_folder, out, "--optimizer", "adamw", steps=5000)
    command = [sys.executable, str(EXAMPLES / "pretrain.py"), *arguments]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log, limit = out / "adamw" / "metrics.jsonl", time.monotonic() + 60
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        assert time.monotonic() < limit, "training has not begun"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130, printed
    assert "--resume" in printed
    done = metrics(out / "adamw")[-1]["step"]
    assert 0 < done < 5000
    with ocp.CheckpointManager((out / "adamw" / "checkpoints").absolute()) as manager:
        assert manager.latest_step() == done


# The small examples.


@pytest.mark.parametrize("example", [minimal, linen_train_state])
def test_small_example_learns(example):
    losses = example.main(steps=60)
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_minimal_example_is_minimal():
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) < 60
