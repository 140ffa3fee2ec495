"""Llama and Qwen2 compute what their formulas say, from files in the hub's format, and decode."""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lorenza_optax import projection_plan
from tests import checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import decoder  # noqa: E402
import hub_files  # noqa: E402
import llama  # noqa: E402

pytestmark = pytest.mark.usefixtures("compile_quickly")
TOKENS = np.random.default_rng(3).integers(0, checkpoints.DECODER["vocab_size"], (2, 90))


def frequencies(config, width):
    """Radians per position, by the cases of Llama 3.1's reference code."""
    plain = [config["rope_theta"] ** (-2 * i / width) for i in range(width // 2)]
    rope = config["rope_scaling"]
    if rope is None:
        return np.array(plain)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = [rope["original_max_position_embeddings"] * f / (2 * np.pi) for f in plain]
    scaled = []
    for f, t in zip(plain, turns, strict=True):
        if t > high:
            scaled.append(f)
        elif t < low:
            scaled.append(f / rope["factor"])
        else:
            smooth = (t - low) / (high - low)
            scaled.append((1 - smooth) * f / rope["factor"] + smooth * f)
    return np.array(scaled)


def expected_logits(tensors, config, tokens):
    """One text, float64, one head and one position at a time."""
    tensors = {key: value.astype(np.float64) for key, value in tensors.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim", config["hidden_size"] // heads)
    turn = np.exp(1j * np.outer(np.arange(len(tokens)), frequencies(config, width)))

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0.0)

    def norm(name, x):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / scale * tensors[f"{name}.weight"]

    def rotated(x):
        pairs = (x[:, : width // 2] + 1j * x[:, width // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    x = tensors["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(f"{layer}.input_layernorm", x)
        q, k, v = (linear(f"{layer}.self_attn.{n}_proj", h) for n in "qkv")
        mixed = []
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            group = head // (heads // kv_heads)
            shared = slice(group * width, (group + 1) * width)
            scores = rotated(q[:, mine]) @ rotated(k[:, shared]).T / np.sqrt(width)
            weights = np.tril(np.exp(scores - scores.max()))
            mixed.append(weights / weights.sum(1, keepdims=True) @ v[:, shared])
        x = x + linear(f"{layer}.self_attn.o_proj", np.concatenate(mixed, axis=1))
        h = norm(f"{layer}.post_attention_layernorm", x)
        gate = linear(f"{layer}.mlp.gate_proj", h)
        x = x + linear(
            f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(f"{layer}.mlp.up_proj", h)
        )
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return linear(head, norm("model.norm", x))


def logits_of(config):
    return jax.jit(lambda params, t: llama.logits(llama.abstract(config)[0], params, t))


@pytest.mark.parametrize("kind", list(checkpoints.DECODERS))
def test_logits_are_those_of_the_formulas(tmp_path, kind):
    content = checkpoints.DECODER | checkpoints.DECODERS[kind]
    tensors = checkpoints.decoder_tensors(content)
    folder = checkpoints.write_decoder(tmp_path, tensors, **checkpoints.DECODERS[kind])
    config, params, _ = decoder.load_checkpoint(folder)
    found = logits_of(config)(params, TOKENS)
    for row, tokens in zip(found, TOKENS, strict=True):
        np.testing.assert_allclose(row, expected_logits(tensors, content, tokens), atol=2e-4)


def test_llama3_scaling_matters_in_each_of_its_ranges():
    """Otherwise the comparison above would show nothing of it."""
    content = checkpoints.DECODER | checkpoints.DECODERS["llama 3.2"]
    plain = frequencies(content | {"rope_scaling": None}, 8)
    ratios = frequencies(content, 8) / plain
    assert ratios[0] == 1
    assert 1 / 8 < ratios[1] < 1
    assert ratios[-1] == 1 / 8


def test_new_names_of_rotary_settings_mean_the_old_ones(tmp_path):
    old = checkpoints.write_decoder(tmp_path, rope_scaling=checkpoints.LLAMA3_ROPE)
    expected = decoder.read_config(old, "float32")[0]
    content = json.loads((old / "config.json").read_text())
    scaling, theta = content.pop("rope_scaling"), content.pop("rope_theta")
    content["rope_parameters"] = {"rope_theta": theta, **scaling}
    (old / "config.json").write_text(json.dumps(content))
    assert decoder.read_config(old, "float32")[0] == expected
    assert expected.rope_theta == 500.0
    assert expected.rope_scaling.factor == 8.0


def test_shards_and_leftovers_are_read_as_one_file(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    tied = checkpoints.DECODER | {"tie_word_embeddings": True}
    tensors = checkpoints.decoder_tensors(tied)
    one = checkpoints.write_decoder(tmp_path / "one", tensors, tie_word_embeddings=True)
    # As some files have them: the tied head once more, and a table of frequencies.
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    three = checkpoints.write_decoder(
        tmp_path / "three", tensors | more, shards=3, tie_word_embeddings=True
    )
    assert len(list(three.glob("*.safetensors"))) == 3
    first, second = (decoder.load_checkpoint(folder)[:2] for folder in (one, three))
    assert first[0] == second[0]
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])
    assert "head" not in first[1]


def test_bfloat16_weights_keep_their_bits(tmp_path):
    tensors = checkpoints.decoder_tensors(checkpoints.DECODER)
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    folder = checkpoints.write_decoder(tmp_path, tensors)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        config, params, _ = decoder.load_checkpoint(folder, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        kernel = params["blocks"][1]["feed_forward"]["down"]["kernel"]
        expected = tensors["model.layers.1.mlp.down_proj.weight"].T.astype(np.float32)
        np.testing.assert_array_equal(np.asarray(kernel, np.float32), expected)
        logits[dtype] = logits_of(config)(params, TOKENS)
    largest = np.abs(logits["float32"]).max()
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.1 * largest)


@pytest.mark.parametrize("kind", ["llama", "llama 3.2", "qwen2"])
def test_linear_maps_are_projected_and_nothing_else(tmp_path, kind):
    folder = checkpoints.write_decoder(tmp_path, **checkpoints.DECODERS[kind])
    config, params, _ = decoder.load_checkpoint(folder)
    plan = projection_plan(params, rank=8)
    maps = [f"attention/{x}_proj" for x in "qkvo"]
    maps += [f"feed_forward/{x}" for x in ("gate", "up", "down")]
    expected = {f"blocks/{i}/{name}/kernel" for i in range(config.num_layers) for name in maps}
    assert set(plan.projected) == expected | (set() if config.tied else {"head/kernel"})
    assert plan.projected["blocks/0/attention/k_proj/kernel"].shape == (32, 16)


# Decoding.


@pytest.mark.parametrize("kind", ["llama 3.2", "qwen2"])
def test_greedy_decoding_is_the_best_token_of_the_whole_text_again_and_again(tmp_path, kind):
    folder = checkpoints.write_decoder(tmp_path, **checkpoints.DECODERS[kind])
    config, params, _ = decoder.load_checkpoint(folder)
    logits, lengths, count = logits_of(config), np.array([5, 11, 1]), 12
    prompts = np.random.default_rng(0).integers(0, 256, (3, 11))
    texts = [list(row[:length]) for row, length in zip(prompts, lengths, strict=True)]
    for text in texts:
        for _ in range(count):
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(text)] = text
            text.append(int(logits(params, padded)[0, len(text) - 1].argmax()))
    expected = [text[length:] for text, length in zip(texts, lengths, strict=True)]
    assert len({token for row in expected for token in row}) > 6

    no_end = (config.vocab_size,)  # never made, so nothing ends
    found = decoder.greedy_of(config, count, no_end)(params, prompts, lengths)
    assert np.asarray(found).tolist() == expected

    # Ended by a token that the second row makes in its middle.
    end = expected[1][4]
    ended = decoder.greedy_of(config, count, (end, config.vocab_size))
    for row, whole in zip(ended(params, prompts, lengths).tolist(), expected, strict=True):
        stop = whole.index(end) if end in whole else count
        assert row == whole[:stop] + [end] * (count - stop)


def test_loss_is_of_the_answers_tokens_only(tmp_path):
    config, params, _ = decoder.load_checkpoint(checkpoints.write_decoder(tmp_path))
    is_answer = np.zeros((2, 20), np.int32)
    is_answer[0, 12:15], is_answer[1, 5:18] = 1, 1
    tokens = TOKENS[:, :20]
    logits = np.float64(logits_of(config)(params, tokens))
    logarithms = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [
        -logarithms[row, i - 1, tokens[row, i]] for row, i in zip(*is_answer.nonzero(), strict=True)
    ]
    assert len(expected) == 16
    loss = jax.jit(decoder.loss_of(config))
    found = loss(params, {"tokens": tokens, "is_answer": is_answer})
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)
    # Nothing depends on the padding behind the answers, neither loss nor gradient.
    padded = tokens.copy()
    padded[0, 15:], padded[1, 18:] = 7, 8
    gradient = jax.jit(jax.grad(decoder.loss_of(config)))
    first, again = (
        gradient(params, {"tokens": t, "is_answer": is_answer}) for t in (tokens, padded)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), first, again)


def test_end_tokens_are_those_of_both_configs(tmp_path):
    folder = checkpoints.write_decoder(tmp_path, eos_token_id=[3, 5])
    files = hub_files.read(folder)
    assert decoder.end_tokens(files) == (3, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert decoder.end_tokens(files) == (3, 5, 7)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"generation_config.json: cannot be read"):
        decoder.end_tokens(files)
    for wrong in (None, [], 100_000, -1, "a", 5.0, True, [3, None]):
        files = hub_files.read(checkpoints.write_decoder(tmp_path, eos_token_id=wrong))
        (folder / "generation_config.json").write_text("{}")
        message = re.escape(f"/config.json: eos_token_id is {wrong!r}; it should be a token's")
        with pytest.raises(SystemExit, match=message):
            decoder.end_tokens(files)
    files = hub_files.read(checkpoints.write_decoder(tmp_path))
    (folder / "generation_config.json").write_text('{"eos_token_id": "a"}')
    with pytest.raises(SystemExit, match=r"generation_config.json: eos_token_id is 'a'"):
        decoder.end_tokens(files)


# Checkpoints that cannot be used.

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; this model is for llama and qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"layer_types": [["full_attention"]]}, r"layer_types has \['full_attention'\]"),
        ({"layer_types": 2}, "layer_types is 2; it should be a list or null"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it should be true or"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "positions of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "positions of type 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "whole heads"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor, low_freq_factor, .* missing"),
        ({"rope_scaling": {**checkpoints.LLAMA3_ROPE, "factor": "8"}}, "factor is '8'; it should"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it should be an object or null"),
        ({"rope_parameters": [8.0]}, r"rope_parameters is \[8.0\]; it should be an object"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; it should be a positive number"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True; it should be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; it should be a positive whole"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; it should be a positive whole number"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'; it should be a positive whole"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 8.0}, "head_dim is 8.0"),
        (
            {"num_key_value_heads": 3},
            "config.json: num_heads=4 must be a multiple of num_kv_heads=3",
        ),
        ({"vocab_size": 100}, "258 tokens .* vocab_size of 100"),
    ],
)
def test_wrong_config_is_refused(tmp_path, config, message):
    tensors = checkpoints.decoder_tensors(checkpoints.DECODER)
    folder = checkpoints.write_decoder(tmp_path, tensors, **config)
    with pytest.raises(SystemExit, match=message):
        decoder.load_checkpoint(folder)


def test_heads_may_be_null(tmp_path):
    nothing = {"num_key_value_heads": None, "head_dim": None, "rope_parameters": None}
    tensors = checkpoints.decoder_tensors(checkpoints.DECODER)
    config, _ = decoder.read_config(
        checkpoints.write_decoder(tmp_path, tensors, **nothing), "float32"
    )
    assert (config.kv_heads, config.head_width) == (4, 8)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def not_finite(tensors):
    tensors[UP][3, 4] = np.nan
    return tensors


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(UP), rf"safetensors(\.index\.json)?: {UP} is missing"),
        (without("lm_head.weight"), r"lm_head\.weight is missing"),
        (lambda t: t | {UP: t[UP].T}, rf"safetensors: {UP} has shape \(32, 48\).*\(48, 32\)"),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]},
            r"safetensors: model\.layers\.0\.self_attn\.q_proj\.bias .*no place",
        ),
        (not_finite, rf"safetensors: {UP} has numbers that are not finite"),
    ],
)
def test_wrong_tensors_are_refused_by_file_and_name(tmp_path, change, message, shards):
    tensors = change(checkpoints.decoder_tensors(checkpoints.DECODER))
    folder = checkpoints.write_decoder(tmp_path, tensors, shards=shards)
    with pytest.raises(SystemExit, match=message):
        decoder.load_checkpoint(folder)


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def cut(folder):
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_the_header(folder):
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:40])


def place(name, shard):
    def change(folder):
        index = json.loads((folder / INDEX).read_text())
        if shard is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = shard
        (folder / INDEX).write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / SHARD).unlink(), rf"{INDEX}: .*weight should be in {SHARD}"),
        (cut, rf"{SHARD}: cannot be read .*ends at byte \d+; (model\.\S+|lm_head.weight) should"),
        (cut_in_the_header, rf"{SHARD}: cannot be read"),
        (place(UP, SHARD), rf"{SHARD}: {UP} is missing, and {INDEX} places it there"),
        (place(UP, None), rf"safetensors: {UP} is not placed there by {INDEX}"),
        (place(UP, "../other.safetensors"), rf"{INDEX}: {UP} should be in \.\./other"),
        (lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX}: cannot be read"),
        (lambda folder: (folder / INDEX).write_text("[1]"), f"{INDEX}: cannot be read"),
        (place(UP, 3), f"{INDEX}: cannot be read.*the file of each tensor"),
    ],
)
def test_wrong_shards_are_refused(tmp_path, change, message):
    folder = checkpoints.write_decoder(tmp_path, shards=3)
    decoder.load_checkpoint(folder)
    change(folder)
    with pytest.raises(SystemExit, match=message):
        decoder.load_checkpoint(folder)


def test_pickles_are_refused_with_a_hint(tmp_path):
    folder = checkpoints.write_decoder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="as Hugging Face's save_pretrained writes it"):
        decoder.load_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"pytorch_model.bin is a pickle.*safe_serialization"):
        decoder.load_checkpoint(folder)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads=3"),
        ({"head_dim": 9}, "head_dim=9 must be even"),
    ],
)
def test_uneven_heads_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        llama.LlamaConfig(**sizes)
