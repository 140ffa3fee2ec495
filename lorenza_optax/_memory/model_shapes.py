"""Parameters of known models as shapes: the GaLore paper's Llamas, and Hugging Face configs."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["MODEL_DTYPES", "PRESETS", "ModelSizes", "abstract_params", "find_model"]

MODEL_DTYPES = ("float32", "bfloat16", "float16")
MODEL_TYPES = ("llama", "qwen2", "bert")


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What the shapes of a model's parameters follow from.

    Attributes:
      name: What reports call it.
      model_type: "llama" (also for qwen2, which differs by biases) or "bert".
      vocab_size: Rows of the embedding.
      hidden_size: Width.
      intermediate_size: Width of the feed-forward part.
      num_layers: Layers, all alike.
      query_size: Heads times the width of a head.
      key_value_size: The same for keys and values.
      biases: Which kinds of linear maps have one, of "qkv", "out" and "mlp".
      tied: Whether the embedding is the head too.
      max_positions: Rows of a BERT's position table.
      num_token_types: Rows of its token-type table.
      dtype: Of all parameters.
    """

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    query_size: int
    key_value_size: int
    biases: frozenset[str] = frozenset()
    tied: bool = False
    max_positions: int = 0
    num_token_types: int = 0
    dtype: str = "float32"


def _galore(name: str, hidden: int, intermediate: int, layers: int) -> ModelSizes:
    full = f"Llama {name} of the GaLore paper"
    return ModelSizes(full, "llama", 32_000, hidden, intermediate, layers, hidden, hidden)


# Table 5 of arXiv 2403.03507.
PRESETS = {
    "60M": _galore("60M", 512, 1376, 8),
    "130M": _galore("130M", 768, 2048, 12),
    "350M": _galore("350M", 1024, 2736, 24),
    "1B": _galore("1B", 2048, 5461, 24),
    "7B": _galore("7B", 4096, 11008, 32),
}


def find_model(model: str | os.PathLike[str], dtype: str | None = None) -> ModelSizes:
    """The sizes that a preset's name or the path of a ``config.json`` (or its folder) stands for.

    Args:
      model: The name or path.
      dtype: Of the parameters; None for the config's own, float32 where it names none.

    Raises:
      ValueError: For an unknown name or a config that cannot be read, naming what is wrong.
    """
    if dtype is not None and dtype not in MODEL_DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(MODEL_DTYPES)}, got {dtype!r}.")
    sizes = PRESETS.get(str(model))
    if sizes is None:
        path = pathlib.Path(model)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"{str(model)!r} is neither a preset ({', '.join(PRESETS)}) nor the path of a"
                " config.json or of a folder with one."
            )
        sizes = _from_config(path)
    return sizes if dtype is None else dataclasses.replace(sizes, dtype=dtype)


def _from_config(path: pathlib.Path) -> ModelSizes:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: this is not a readable JSON file ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a config.json holds an object, not a {type(config).__name__}.")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ValueError(
            f"{path}: model_type is {kind!r}, and known are {', '.join(MODEL_TYPES)}. Pass the"
            " parameters themselves, or their jax.eval_shape, to memory_report."
        )

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{path}: the key {key!r} is missing.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {key!r} must be a positive integer, got {value!r}.")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    if hidden % heads and (kind == "bert" or config.get("head_dim") is None):
        raise ValueError(
            f"{path}: 'hidden_size' {hidden} is no multiple of 'num_attention_heads' {heads}."
        )
    head = hidden // heads if kind == "bert" else number("head_dim", hidden // heads)
    flags = {
        "llama": {"qkv": "attention_bias", "out": "attention_bias", "mlp": "mlp_bias"},
        "qwen2": {},
        "bert": {},
    }[kind]
    biases = {part for part, key in flags.items() if config.get(key, False)}
    biases |= {"llama": set(), "qwen2": {"qkv"}, "bert": {"qkv", "out", "mlp"}}[kind]
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"{path}: dtype {dtype!r} is none of {', '.join(MODEL_DTYPES)}.")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"{path}: 'tie_word_embeddings' must be true or false, got {tied!r}.")
    is_bert = kind == "bert"
    return ModelSizes(
        name=f"{kind} of {path}",
        model_type="bert" if is_bert else "llama",
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        num_layers=number("num_hidden_layers"),
        query_size=heads * head,
        key_value_size=head * (heads if is_bert else number("num_key_value_heads", heads)),
        biases=frozenset(biases),
        tied=tied,
        max_positions=number("max_position_embeddings") if is_bert else 0,
        num_token_types=number("type_vocab_size", 2) if is_bert else 0,
        dtype=dtype,
    )


def abstract_params(sizes: ModelSizes) -> Any:
    """The parameters as a tree of ``jax.ShapeDtypeStruct``; kernels are (inputs, outputs)."""
    return _bert(sizes) if sizes.model_type == "bert" else _llama(sizes)


def _array(sizes: ModelSizes, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(sizes.dtype))


def _linear(sizes: ModelSizes, inputs: int, outputs: int, kind: str) -> dict[str, Any]:
    bias = {"bias": _array(sizes, outputs)} if kind in sizes.biases else {}
    return {"kernel": _array(sizes, inputs, outputs), **bias}


def _table(sizes: ModelSizes, rows: int) -> dict[str, Any]:
    return {"embedding": _array(sizes, rows, sizes.hidden_size)}


def _llama(sizes: ModelSizes) -> Any:
    hidden, wide = sizes.hidden_size, sizes.intermediate_size
    norm = {"scale": _array(sizes, hidden)}
    layer = {
        "attention_norm": norm,
        "attention": {
            "q_proj": _linear(sizes, hidden, sizes.query_size, "qkv"),
            "k_proj": _linear(sizes, hidden, sizes.key_value_size, "qkv"),
            "v_proj": _linear(sizes, hidden, sizes.key_value_size, "qkv"),
            "o_proj": _linear(sizes, sizes.query_size, hidden, "out"),
        },
        "feed_forward_norm": norm,
        "feed_forward": {
            "gate": _linear(sizes, hidden, wide, "mlp"),
            "up": _linear(sizes, hidden, wide, "mlp"),
            "down": _linear(sizes, wide, hidden, "mlp"),
        },
    }
    head = {} if sizes.tied else {"head": _linear(sizes, hidden, sizes.vocab_size, "head")}
    blocks = [layer] * sizes.num_layers
    return {"embed": _table(sizes, sizes.vocab_size), "blocks": blocks, "norm": norm, **head}


def _bert(sizes: ModelSizes) -> Any:
    """The encoder with its pooler, as checkpoints hold it, without a head for a task."""
    hidden, wide = sizes.hidden_size, sizes.intermediate_size
    norm = {"scale": _array(sizes, hidden), "bias": _array(sizes, hidden)}
    square = _linear(sizes, hidden, hidden, "qkv")
    layer = {
        "attention": dict.fromkeys(("query", "key", "value", "output"), square),
        "attention_norm": norm,
        "intermediate": _linear(sizes, hidden, wide, "mlp"),
        "output": _linear(sizes, wide, hidden, "mlp"),
        "output_norm": norm,
    }
    embeddings = {
        "word": _table(sizes, sizes.vocab_size),
        "position": _table(sizes, sizes.max_positions),
        "token_type": _table(sizes, sizes.num_token_types),
        "norm": norm,
    }
    return {"embeddings": embeddings, "layers": [layer] * sizes.num_layers, "pooler": square}
