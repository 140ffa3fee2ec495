"""A BERT encoder in Flax NNX with a classification head, from Hugging Face checkpoint files.

Post-LayerNorm, exact GELU, learned positions; the head is one linear map of the mean of the
tokens' last states. The default sizes are those of MiniLM-L6. No dropout.

Shapes are written into the names: B batch, L length, T = B * L tokens, D hidden width,
N heads, H width of a head, C labels. `x_TxD` has shape (T, D).

Training code sees pure functions only: `load_checkpoint` gives a nested dict of parameters, and
`loss_of(config)` maps (params, batch) to a scalar. A batch is a dict of integer arrays:
input_ids, attention_mask (1 token, 0 padding), token_type_ids, all (B, L), and labels, (B,), which
are floats where there is one label only (regression).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import hub_files

HEAD_STDDEV = 0.02  # BERT's initializer_range


@dataclasses.dataclass(frozen=True)
class BertConfig:
    vocab_size: int = 30_522
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_layers: int = 6
    num_heads: int = 12
    max_positions: int = 512
    num_token_types: int = 2
    norm_eps: float = 1e-12
    num_labels: int = 2
    dtype: str = "float32"  # of the weights and of the arithmetic between them

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}"
            )


class Embeddings(nnx.Module):
    def __init__(self, config, *, rngs):
        def table(rows):
            return nnx.Embed(rows, config.hidden_size, **_dtypes(config), rngs=rngs)

        self.word = table(config.vocab_size)
        self.position = table(config.max_positions)
        self.token_type = table(config.num_token_types)
        self.norm = _norm(config, rngs)

    def __call__(self, batch):
        ids_BxL = batch["input_ids"]
        position_LxD = self.position(jnp.arange(ids_BxL.shape[1]))
        return self.norm(
            self.word(ids_BxL) + self.token_type(batch["token_type_ids"]) + position_LxD
        )


class Attention(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config

        def linear():
            return _linear(config, config.hidden_size, config.hidden_size, rngs)

        self.query, self.key, self.value, self.output = linear(), linear(), linear(), linear()

    def __call__(self, x_TxD, mask_BxL):
        batch, length = mask_BxL.shape
        hidden, heads = self.config.hidden_size, self.config.num_heads

        def split_heads(y_TxD):
            return y_TxD.reshape(batch, length, heads, hidden // heads)

        q_BxLxNxH = split_heads(self.query(x_TxD))
        k_BxLxNxH = split_heads(self.key(x_TxD))
        v_BxLxNxH = split_heads(self.value(x_TxD))

        # Scores and softmax in float32, also when the weights are bfloat16.
        score_BxNxLxL = jnp.einsum(
            "BQNH,BKNH->BNQK", q_BxLxNxH, k_BxLxNxH, preferred_element_type=jnp.float32
        ) / math.sqrt(hidden // heads)
        score_BxNxLxL = jnp.where(
            mask_BxL[:, None, None, :] > 0, score_BxNxLxL, jnp.finfo(jnp.float32).min
        )
        weight_BxNxLxL = jax.nn.softmax(score_BxNxLxL, axis=-1).astype(v_BxLxNxH.dtype)
        mixed_BxLxNxH = jnp.einsum("BNQK,BKNH->BQNH", weight_BxNxLxL, v_BxLxNxH)
        return self.output(mixed_BxLxNxH.reshape(-1, hidden))


class Layer(nnx.Module):
    def __init__(self, config, *, rngs):
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = _norm(config, rngs)
        self.intermediate = _linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.output = _linear(config, config.intermediate_size, config.hidden_size, rngs)
        self.output_norm = _norm(config, rngs)

    def __call__(self, x_TxD, mask_BxL):
        x_TxD = self.attention_norm(x_TxD + self.attention(x_TxD, mask_BxL))
        h_TxF = jax.nn.gelu(self.intermediate(x_TxD), approximate=False)
        return self.output_norm(x_TxD + self.output(h_TxF))


class BertClassifier(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.head = _linear(config, config.hidden_size, config.num_labels, rngs)

    def embed(self, batch):
        """The mean of each text's last token states, as sentence-transformers pools, (B, D)."""
        mask_BxL = batch["attention_mask"]
        if mask_BxL.shape[1] > self.config.max_positions:
            raise ValueError(
                f"The texts are {mask_BxL.shape[1]} tokens long and the model has "
                f"{self.config.max_positions} positions: tokenize with a smaller max_len"
            )
        # As in llama.py, the tokens of a batch stand in one axis: weights meet matrices.
        x_TxD = self.embeddings(batch).reshape(-1, self.config.hidden_size)
        for layer in self.layers:
            x_TxD = layer(x_TxD, mask_BxL)
        x_BxLxD = x_TxD.reshape(*mask_BxL.shape, -1).astype(jnp.float32)
        weight_BxLx1 = mask_BxL[..., None].astype(jnp.float32)
        return jnp.sum(x_BxLxD * weight_BxLx1, axis=1) / jnp.sum(weight_BxLx1, axis=1)

    def __call__(self, batch):
        return self.head(self.embed(batch))


def _dtypes(config):
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.dtype)}


def _linear(config, inputs, outputs, rngs):
    return nnx.Linear(inputs, outputs, **_dtypes(config), rngs=rngs)


def _norm(config, rngs):
    # The two-pass variance: with an epsilon of 1e-12 nothing hides the round-off of the fast one.
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.norm_eps,
        use_fast_variance=False,
        **_dtypes(config),
        rngs=rngs,
    )


def abstract(config):
    """(graphdef, params as shapes): the model's structure, without allocating a weight."""
    model = nnx.eval_shape(lambda: BertClassifier(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


# Each is a function of (params, batch) alone, as Optax's `value_fn` is called, and the same
# function for the same config, so that its compiled forms are found again.


@functools.cache
def embeddings_of(config):
    """Mean-pooled sentence embeddings, float32 of shape (B, D), not normalized."""
    graphdef, _ = abstract(config)
    return lambda params, batch: nnx.merge(graphdef, params).embed(batch)


@functools.cache
def logits_of(config):
    """Scores of the labels, float32 of shape (B, C)."""
    graphdef, _ = abstract(config)
    return lambda params, batch: nnx.merge(graphdef, params)(batch).astype(jnp.float32)


@functools.cache
def loss_of(config):
    """Mean cross-entropy in nats; with one label, which is a number then, mean squared error."""
    logits = logits_of(config)
    if config.num_labels == 1:
        return lambda params, batch: jnp.mean(
            jnp.square(logits(params, batch)[:, 0] - batch["labels"])
        )
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return lambda params, batch: cross_entropy(logits(params, batch), batch["labels"]).mean()


@functools.cache
def accuracy_of(config):
    """The share of the batch whose label has the highest score."""
    logits = logits_of(config)
    return lambda params, batch: jnp.mean(
        jnp.argmax(logits(params, batch), axis=-1) == batch["labels"]
    )


# Checkpoints.

CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
    "num_token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
}
# The path of a module in the tree of parameters, and its name in the files.
FILE_NAMES = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}


def load_checkpoint(folder, num_labels, seed, dtype="float32"):
    """(config, params, tokenizer) of a folder; None is all-MiniLM-L6-v2 from its package.

    The encoder is read from the files (see `hub_files.py`); the head is random from the seed.
    """
    config, files = read_config(folder, num_labels, dtype)
    return config, read_parameters(files, config, seed), files.tokenizer


def read_config(folder, num_labels, dtype):
    """(config, files) of a folder, without its weights."""
    files = hub_files.read(folder)
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    more = {"num_labels": num_labels, "dtype": dtype}
    return hub_files.config(files, BertConfig, expected, CONFIG_KEYS, **more), files


def read_parameters(files, config, seed):
    # The bare encoder's names: some models prefix `bert.`, and old files say gamma and beta.
    older = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    names = {key: key.removeprefix("bert.") for key in files.tensors}
    for old, new in older.items():
        names = {key: name.replace(old, new) for key, name in names.items()}
    files = files._replace(tensors={names[key]: value for key, value in files.tensors.items()})

    encoder = dict(abstract(config)[1])
    head = encoder.pop("head")
    noise = HEAD_STDDEV * jax.random.normal(jax.random.key(seed), head["kernel"].shape)
    # The pooler and the heads of pre-training are not used; a layer left over is a mistake.
    params = hub_files.parameters(
        files, encoder, _file_name, is_unread=lambda name: not name.startswith("encoder.")
    )
    return params | {
        "head": {
            "kernel": noise.astype(head["kernel"].dtype),
            "bias": jnp.zeros(head["bias"].shape, head["bias"].dtype),
        }
    }


def _file_name(module):
    """["layers", "0", "output"] is "encoder.layer.0.output.dense"."""
    prefix = ""
    if module[0] == "layers":
        prefix, module = f"encoder.layer.{module[1]}.", module[2:]
    return prefix + FILE_NAMES["/".join(module)]
