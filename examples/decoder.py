"""Llama's and Qwen2's checkpoints in `llama.py`'s model: reading, fine-tuning loss, decoding.

As there, training code sees pure functions only. A batch is a dict of integer arrays (B, L):
tokens, and is_answer, which is 1 where a token is to be learned and 0 in prompts and padding.
Padding stands behind the text, where causal attention does not see it.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import hub_files
import llama

CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
}
OPTIONAL_KEYS = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
EXPECTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
}
HAS_QKV_BIAS = {"llama": False, "qwen2": True}  # by model_type
SCALING_KEYS = {
    "factor": "factor",
    "low_turns": "low_freq_factor",
    "high_turns": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
# The path of a module in the tree of parameters, and its name in the files.
FILE_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention/q_proj": "self_attn.q_proj",
    "attention/k_proj": "self_attn.k_proj",
    "attention/v_proj": "self_attn.v_proj",
    "attention/o_proj": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward/gate": "mlp.gate_proj",
    "feed_forward/up": "mlp.up_proj",
    "feed_forward/down": "mlp.down_proj",
}


def load_checkpoint(folder, dtype="float32"):
    """(config, params, tokenizer) of a folder, see `hub_files.py`."""
    config, files = read_config(folder, dtype)
    return config, read_parameters(files, config), files.tokenizer


def read_config(folder, dtype):
    """(config, files) of a folder, without its weights."""
    files = hub_files.read(folder)
    path, content = files.folder / "config.json", files.config
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in HAS_QKV_BIAS:
        raise SystemExit(
            f"{path}: model_type is {kind!r}; this model is for {' and '.join(HAS_QKV_BIAS)}."
        )
    layer_types = content.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise SystemExit(f"{path}: layer_types is {layer_types!r}; it should be a list or null.")
    if others := [kind for kind in layer_types if kind != "full_attention"]:
        raise SystemExit(f"{path}: layer_types has {others[0]!r}; this model has full_attention.")
    tied = content.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise SystemExit(f"{path}: tie_word_embeddings is {tied!r}; it should be true or false.")
    given = {f: content[key] for f, key in OPTIONAL_KEYS.items() if content.get(key) is not None}
    for field, value in given.items():
        hub_files.check_positive(path, OPTIONAL_KEYS[field], value)
    theta, scaling = _rope(path, content)
    config = hub_files.config(
        files,
        llama.LlamaConfig,
        EXPECTED,
        CONFIG_KEYS,
        dtype=dtype,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=HAS_QKV_BIAS[kind],
        tied=tied,
        **given,
    )
    return config, files


def _rope(path, content):
    """(theta, scaling). transformers 5 writes rope_parameters; before, they were two keys."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(content.get(key), dict | None):
            raise SystemExit(f"{path}: {key} is {content[key]!r}; it should be an object or null.")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    theta = rope.get("rope_theta", content.get("rope_theta", 10_000.0))
    hub_files.check_positive(path, "rope_theta", theta, float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise SystemExit(
            f"{path}: rotary positions of type {kind!r} ({rope}); this model has 'default' and "
            "'llama3', for whole heads."
        )
    if kind == "default":
        return theta, None
    if missing := [key for key in SCALING_KEYS.values() if key not in rope]:
        raise SystemExit(f"{path}: {', '.join(missing)} missing for rotary positions of llama3.")
    for key in SCALING_KEYS.values():
        hub_files.check_positive(path, key, rope[key], float)
    return theta, llama.RopeScaling(**{field: rope[key] for field, key in SCALING_KEYS.items()})


def read_parameters(files, config):
    def may_be_left(name):
        # A tied head is the embedding once more; old files keep a table of frequencies.
        return (config.tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")

    return hub_files.parameters(files, llama.abstract(config)[1], _file_name, may_be_left)


def _file_name(module):
    """["blocks", "0", "feed_forward", "up"] is "model.layers.0.mlp.up_proj"."""
    prefix = ""
    if module[0] == "blocks":
        prefix, module = f"model.layers.{module[1]}.", module[2:]
    return prefix + FILE_NAMES["/".join(module)]


def end_tokens(files):
    """The tokens that end an answer, the first of them for training."""
    path, rows = files.folder / "config.json", files.config["vocab_size"]
    ids = _end_tokens(path, files.config, rows)
    if (generation := files.folder / "generation_config.json").is_file():
        ids = ids + _end_tokens(generation, hub_files.read_object(generation), rows)
    if not ids:
        given = files.config.get("eos_token_id")
        raise SystemExit(f"{path}: eos_token_id is {given}; it should be a token's number.")
    return tuple(dict.fromkeys(ids))


def _end_tokens(path, content, vocab_size):
    given = content.get("eos_token_id")
    if given is None:
        return []
    ids = given if isinstance(given, list) else [given]
    if not all(type(number) is int and 0 <= number < vocab_size for number in ids):
        raise SystemExit(
            f"{path}: eos_token_id is {given!r}; it should be a token's number, 0 to "
            f"{vocab_size - 1}, or a list of such."
        )
    return ids


@functools.cache  # the same function again, so that its compiled forms are found again
def loss_of(config):
    """Mean cross-entropy, in nats, of the answers' tokens."""
    graphdef, _ = llama.abstract(config)

    def loss_of_batch(params, batch):
        losses_BxL = llama.token_losses(graphdef, params, batch["tokens"])
        learned_BxL = batch["is_answer"][:, 1:]
        return jnp.sum(losses_BxL * learned_BxL) / jnp.maximum(jnp.sum(learned_BxL), 1)

    return loss_of_batch


@functools.cache
def greedy_of(config, max_new_tokens, ends):
    """Greedy decoding, compiled: (params, prompt_BxP, length_B) -> the new tokens, (B, M).

    Prompts are padded behind; `length_B` says where each ends. New tokens overwrite the padding
    in the cache, so that each stands at its own position. After one of the tokens `ends`, a row
    is filled with the first of them.
    """
    graphdef, _ = llama.abstract(config)

    @jax.jit
    def decode(params, prompt_BxP, length_B):
        model = nnx.merge(graphdef, params)
        batch, longest = prompt_BxP.shape
        cache = jnp.zeros(
            (batch, longest + max_new_tokens, config.kv_heads, config.head_width),
            jnp.dtype(config.dtype),
        )
        position_BxP = jnp.broadcast_to(jnp.arange(longest), prompt_BxP.shape)
        caches = [(cache, cache)] * config.num_layers
        x_TxD, caches = model.states(prompt_BxP, position_BxP, caches)
        last_BxD = x_TxD.reshape(batch, longest, -1)[jnp.arange(batch), length_B - 1]

        def best(x_BxD):
            return jnp.argmax(model.scores(x_BxD).astype(jnp.float32), axis=-1)

        def goes_on(carry):
            count, _, ended_B, *_ = carry
            return (count < max_new_tokens) & ~jnp.all(ended_B)

        def step(carry):
            count, token_B, ended_B, new_BxM, caches = carry
            token_B = jnp.where(ended_B, ends[0], token_B)
            new_BxM = new_BxM.at[:, count].set(token_B)
            ended_B |= jnp.isin(token_B, jnp.array(ends))
            x_BxD, caches = model.states(token_B[:, None], (length_B + count)[:, None], caches)
            return count + 1, best(x_BxD), ended_B, new_BxM, caches

        new_BxM = jnp.full((batch, max_new_tokens), ends[0])
        nobody_B = jnp.zeros(batch, dtype=bool)
        carry = (0, best(last_BxD), nobody_B, new_BxM, caches)
        return jax.lax.while_loop(goes_on, step, carry)[3]

    return decode
