"""A Llama in Flax NNX: RMSNorm, rotary positions, SwiGLU, causal attention, untied head.

Shapes are written into the names: B batch, L length, T = B * L tokens, D hidden width,
F feed-forward width, N heads, H width of a head, V vocabulary. `x_TxD` has shape (T, D).

Outside attention the tokens of a batch stand in one axis T: every weight then meets a matrix,
which XLA's CPU backend multiplies faster than (B, L, D) in the backward pass (tiny preset,
2 cores: 0.19 s against 0.27 s a gradient), and nothing else changes.

Training code sees pure functions only: `init` gives a nested dict of parameters, `loss` maps
(graphdef, params, tokens) to a scalar.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 256
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: str = "float32"  # of the weights and of the arithmetic between them

    def __post_init__(self):
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be an even multiple of "
                f"num_heads={self.num_heads}: each head needs a whole, even width (rotary pairs)"
            )


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model size, with the rank and the refresh interval that go with it."""

    model: LlamaConfig
    rank: int
    update_proj_gap: int
    seq_len: int
    tokenizer: str


def _galore(hidden_size, intermediate_size, num_heads, num_layers, rank):
    """A size of the GaLore paper (arXiv 2403.03507, appendix C.1), with the rank used there."""
    model = LlamaConfig(32_000, hidden_size, intermediate_size, num_layers, num_heads)
    return Preset(model, rank, update_proj_gap=200, seq_len=256, tokenizer="bpe")


PRESETS = {
    # For tests: everything in it runs within seconds.
    "nano": Preset(
        LlamaConfig(256, 32, 64, 1, 2), 8, update_proj_gap=2, seq_len=32, tokenizer="bytes"
    ),
    "tiny": Preset(LlamaConfig(), 48, update_proj_gap=20, seq_len=128, tokenizer="bytes"),
    "60M": _galore(512, 1376, 8, 8, rank=128),
    "130M": _galore(768, 2048, 12, 12, rank=256),
    "350M": _galore(1024, 2736, 16, 24, rank=256),
    "1B": _galore(2048, 5461, 32, 24, rank=512),
    "7B": _galore(4096, 11008, 32, 32, rank=1024),
}


def rotary(x_BxLxNxH, theta):
    """Turns each pair (i, i + H/2) of a head's coordinates by position * theta^(-2i/H)."""
    length, width = x_BxLxNxH.shape[1], x_BxLxNxH.shape[-1]
    frequency_h = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle_Lx1xh = (jnp.arange(length, dtype=jnp.float32)[:, None] * frequency_h)[:, None, :]
    cos, sin = jnp.cos(angle_Lx1xh), jnp.sin(angle_Lx1xh)
    first, second = jnp.split(x_BxLxNxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxLxNxH.dtype)


class Attention(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config

        def linear():
            return _linear(config, config.hidden_size, config.hidden_size, rngs)

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = linear(), linear(), linear(), linear()

    def __call__(self, x_TxD, length):
        hidden, heads = self.config.hidden_size, self.config.num_heads

        def split_heads(y_TxD):
            return y_TxD.reshape(-1, length, heads, hidden // heads)

        q_BxLxNxH = rotary(split_heads(self.q_proj(x_TxD)), self.config.rope_theta)
        k_BxLxNxH = rotary(split_heads(self.k_proj(x_TxD)), self.config.rope_theta)
        v_BxLxNxH = split_heads(self.v_proj(x_TxD))

        # Scores and softmax in float32, also when the weights are bfloat16.
        score_BxNxLxL = jnp.einsum(
            "BQNH,BKNH->BNQK", q_BxLxNxH, k_BxLxNxH, preferred_element_type=jnp.float32
        ) / math.sqrt(hidden // heads)
        causal_LxL = jnp.tril(jnp.ones((length, length), dtype=bool))
        score_BxNxLxL = jnp.where(causal_LxL, score_BxNxLxL, jnp.finfo(jnp.float32).min)
        weight_BxNxLxL = jax.nn.softmax(score_BxNxLxL, axis=-1).astype(v_BxLxNxH.dtype)
        mixed_BxLxNxH = jnp.einsum("BNQK,BKNH->BQNH", weight_BxNxLxL, v_BxLxNxH)
        return self.o_proj(mixed_BxLxNxH.reshape(-1, hidden))


class SwiGLU(nnx.Module):
    def __init__(self, config, *, rngs):
        self.gate = _linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.up = _linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.down = _linear(config, config.intermediate_size, config.hidden_size, rngs)

    def __call__(self, x_TxD):
        h_TxF = jax.nn.silu(self.gate(x_TxD)) * self.up(x_TxD)
        return self.down(h_TxF)


class Block(nnx.Module):
    def __init__(self, config, *, rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = _norm(config, rngs)
        self.feed_forward = SwiGLU(config, rngs=rngs)

    def __call__(self, x_TxD, length):
        x_TxD = x_TxD + self.attention(self.attention_norm(x_TxD), length)
        return x_TxD + self.feed_forward(self.feed_forward_norm(x_TxD))


class Llama(nnx.Module):
    def __init__(self, config, *, rngs):
        dtype = jnp.dtype(config.dtype)
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, rngs)
        self.head = _linear(config, config.hidden_size, config.vocab_size, rngs)

    def __call__(self, tokens_BxL):
        batch, length = tokens_BxL.shape
        x_TxD = self.embed(tokens_BxL.reshape(-1))
        for block in self.blocks:
            x_TxD = block(x_TxD, length)
        return self.head(self.norm(x_TxD)).reshape(batch, length, -1)


def _linear(config, inputs, outputs, rngs):
    dtype = jnp.dtype(config.dtype)
    return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _norm(config, rngs):
    dtype = jnp.dtype(config.dtype)
    return nnx.RMSNorm(
        config.hidden_size, epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs
    )


def abstract(config):
    """(graphdef, params as shapes): the model's structure, without allocating a weight."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def init(config, seed):
    """The parameters as a nested dict of arrays; the same seed gives the same bits."""
    return _initializer(config)(jax.random.key(seed))


@functools.cache  # compiled once, however many optimizers start from it
def _initializer(config):
    return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(key)))))


def parameter_count(config):
    """The exact number of parameters, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)[1]))


def logits(graphdef, params, tokens_BxL):
    """Scores for the next token at every position, float32 of shape (B, L, V)."""
    return nnx.merge(graphdef, params)(tokens_BxL).astype(jnp.float32)


def loss(graphdef, params, tokens_BxL):
    """Mean cross-entropy, in nats, of each token given those before it."""
    logits_BxLxV = logits(graphdef, params, tokens_BxL[:, :-1])
    target_BxL = tokens_BxL[:, 1:]
    log_sum_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    picked_BxL = jnp.take_along_axis(logits_BxLxV, target_BxL[..., None], axis=-1)[..., 0]
    return jnp.mean(log_sum_BxL - picked_BxL)


@functools.cache  # the same function again, so that its compiled forms are found again
def loss_of(config):
    """`loss` as a function of (params, batch) alone, as Optax's `value_fn` is called."""
    graphdef, _ = abstract(config)

    def loss_of_batch(params, batch):
        return loss(graphdef, params, batch)

    return loss_of_batch
