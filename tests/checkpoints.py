"""Small random checkpoints in the Hugging Face hub's file format."""

import json

import numpy as np
import safetensors.numpy
import tokenizers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "the", "cat", "dog", "sat", "ran", "on", "over"]
WORDS += ["mat", "##s", "."]
HIDDEN, INTERMEDIATE, LAYERS, HEADS, POSITIONS, LABELS = 24, 40, 2, 3, 16, 3
BERT = {
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


def bert_tensors(seed=0):
    """A bare BertModel as PyTorch names and lays it out: a Linear's weight is (out, in)."""
    rng = np.random.default_rng(seed)
    tensors = {"embeddings.position_ids": np.arange(POSITIONS)[None]}

    def linear(name, outputs, inputs):
        tensors[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) / inputs**0.5
        tensors[f"{name}.bias"] = 0.3 * rng.normal(size=outputs)

    def norm(name):
        tensors[f"{name}.weight"] = 1 + 0.3 * rng.normal(size=HIDDEN)
        tensors[f"{name}.bias"] = 0.3 * rng.normal(size=HIDDEN)

    rows = {"word": BERT["vocab_size"], "position": POSITIONS, "token_type": 2}
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


def bert_tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def write_bert(folder, tensors=None, **config):
    (folder / "config.json").write_text(json.dumps(BERT | config))
    write_tensors(folder / "model.safetensors", bert_tensors() if tensors is None else tensors)
    bert_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_tensors(path, tensors):
    # safetensors writes an array's memory as it lies, so a transposed view must be copied.
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})


# Decoders. Bytes are tokens, as in a BPE tokenizer that has learned no merges.

BEGIN, END = "<|begin|>", "<|end|>"
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
BEGIN_ID, END_ID = len(ALPHABET), len(ALPHABET) + 1
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DECODER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": len(ALPHABET) + 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": BEGIN_ID,
    "eos_token_id": END_ID,
}
# The kinds that the loader knows, as changes of DECODER.
DECODERS = {
    "llama": {},
    "llama without groups": {"num_key_value_heads": 4},
    "llama, one head of keys": {"num_key_value_heads": 1},
    "llama 3.2": {"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE},
    "llama with wide heads": {"head_dim": 12},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen2 tied": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
    },
}


def decoder_tensors(config, seed=0):
    """As PyTorch names and lays them out: a Linear's weight is (out, in)."""
    rng = np.random.default_rng(seed)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim", hidden // heads)
    tensors = {}

    def linear(name, outputs, inputs, has_bias=False):
        tensors[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) / inputs**0.5
        if has_bias:
            tensors[f"{name}.bias"] = 0.3 * rng.normal(size=outputs)

    def norm(name):
        tensors[f"{name}.weight"] = 1 + 0.3 * rng.normal(size=hidden)

    # Small, so that the layers decide what comes next: else each token repeats itself.
    tensors["model.embed_tokens.weight"] = 0.1 * rng.normal(size=(config["vocab_size"], hidden))
    for i in range(config["num_hidden_layers"]):
        layer, has_bias = f"model.layers.{i}", config["model_type"] == "qwen2"
        norm(f"{layer}.input_layernorm")
        linear(f"{layer}.self_attn.q_proj", heads * width, hidden, has_bias)
        linear(f"{layer}.self_attn.k_proj", kv_heads * width, hidden, has_bias)
        linear(f"{layer}.self_attn.v_proj", kv_heads * width, hidden, has_bias)
        linear(f"{layer}.self_attn.o_proj", hidden, heads * width)
        norm(f"{layer}.post_attention_layernorm")
        linear(f"{layer}.mlp.gate_proj", wide, hidden)
        linear(f"{layer}.mlp.up_proj", wide, hidden)
        linear(f"{layer}.mlp.down_proj", hidden, wide)
    norm("model.norm")
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden)
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def decoder_tokenizer():
    vocabulary = {token: i for i, token in enumerate(ALPHABET)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = template(f"{BEGIN} $A")
    return tokenizer


def template(single):
    return tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(BEGIN, BEGIN_ID), (END, END_ID)]
    )


def write_decoder(folder, tensors=None, shards=1, **changes):
    """One file, or `shards` of them with their index."""
    config = DECODER | changes
    tensors = decoder_tensors(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config))
    decoder_tokenizer().save(str(folder / "tokenizer.json"))
    if shards == 1:
        write_tensors(folder / "model.safetensors", tensors)
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    # Neighbours apart, so that a layer's tensors lie in different files.
    placed = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        write_tensors(folder / shard, {n: t for n, t in tensors.items() if placed[n] == shard})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
