"""A Llama in Flax NNX: RMSNorm, rotary positions, SwiGLU, causal attention.

The presets are for pre-training; `decoder.py` reads checkpoints of Llama's and Qwen2's kind into
the same model, which have grouped queries, biases, a tied head.

Shapes are written into the names: B batch, L length, T = B * L tokens, D hidden width,
F feed-forward width, N heads, K heads of keys and values, G = N / K, H width of a head,
S positions that are attended to, V vocabulary. `x_TxD` has shape (T, D).

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
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches its positions: low frequencies are divided by `factor`.

    A frequency is kept if `original_length` holds more than `high_turns` of its turns, divided if
    less than `low_turns`, and in between both in proportion.
    """

    factor: float
    low_turns: float
    high_turns: float
    original_length: int


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
    num_kv_heads: int | None = None  # each serves a group of queries; None: one for every head
    head_dim: int | None = None  # None: hidden_size / num_heads
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tied: bool = False  # whether the embedding is the head too

    def __post_init__(self):
        if self.head_dim is None and self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be an even multiple of "
                f"num_heads={self.num_heads}: each head needs a whole, even width (rotary pairs)"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary pairs)")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.kv_heads}"
            )

    @property
    def kv_heads(self):
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self):
        return self.head_dim or self.hidden_size // self.num_heads


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


def rotary_frequencies(config):
    """Radians per position of each pair of a head's coordinates, (H / 2,)."""
    width, scaling = config.head_width, config.rope_scaling
    frequency_h = config.rope_theta ** (-np.arange(0, width, 2) / width)
    if scaling is not None:
        turns_h = scaling.original_length * frequency_h / (2 * math.pi)
        span = scaling.high_turns - scaling.low_turns
        kept_h = np.clip((turns_h - scaling.low_turns) / span, 0, 1)
        frequency_h *= kept_h + (1 - kept_h) / scaling.factor
    return frequency_h.astype(np.float32)


def rotary(x_BxLxNxH, position_BxL, frequency_h):
    """Turns each pair (i, i + H/2) of a head's coordinates by position * frequency."""
    angle_BxLx1xh = position_BxL[..., None, None].astype(jnp.float32) * frequency_h
    cos, sin = jnp.cos(angle_BxLx1xh), jnp.sin(angle_BxLx1xh)
    first, second = jnp.split(x_BxLxNxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxLxNxH.dtype)


class Attention(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        hidden, width = config.hidden_size, config.head_width

        def linear(heads):
            return _linear(config, hidden, heads * width, rngs, use_bias=config.qkv_bias)

        self.q_proj = linear(config.num_heads)
        self.k_proj, self.v_proj = linear(config.kv_heads), linear(config.kv_heads)
        self.o_proj = _linear(config, config.num_heads * width, hidden, rngs)

    def __call__(self, x_TxD, position_BxL, cache=None):
        """Attends to the positions up to each token's own: among the given tokens, or in a cache.

        A cache is a pair of keys and values, each (B, S, K, H), that hold at index s what stands
        at position s. The given tokens are written into it first.
        """
        config, length = self.config, position_BxL.shape[1]
        width, kv_heads = config.head_width, config.kv_heads
        frequency_h = rotary_frequencies(config)

        def split_heads(y_TxD):
            return y_TxD.reshape(-1, length, y_TxD.shape[-1] // width, width)

        q_BxLxNxH = rotary(split_heads(self.q_proj(x_TxD)), position_BxL, frequency_h)
        k_BxSxKxH = rotary(split_heads(self.k_proj(x_TxD)), position_BxL, frequency_h)
        v_BxSxKxH = split_heads(self.v_proj(x_TxD))
        if cache is not None:
            row_Bx1 = jnp.arange(len(position_BxL))[:, None]
            k_BxSxKxH, v_BxSxKxH = cache = (
                cache[0].at[row_Bx1, position_BxL].set(k_BxSxKxH),
                cache[1].at[row_Bx1, position_BxL].set(v_BxSxKxH),
            )

        # Scores and softmax in float32, also when the weights are bfloat16.
        q_BxLxKxGxH = q_BxLxNxH.reshape(*q_BxLxNxH.shape[:2], kv_heads, -1, width)
        score_BxKxGxLxS = jnp.einsum(
            "BLKGH,BSKH->BKGLS", q_BxLxKxGxH, k_BxSxKxH, preferred_element_type=jnp.float32
        ) / math.sqrt(width)
        causal_BxLxS = jnp.arange(k_BxSxKxH.shape[1]) <= position_BxL[..., None]
        score_BxKxGxLxS = jnp.where(
            causal_BxLxS[:, None, None], score_BxKxGxLxS, jnp.finfo(jnp.float32).min
        )
        weight_BxKxGxLxS = jax.nn.softmax(score_BxKxGxLxS, axis=-1).astype(v_BxSxKxH.dtype)
        mixed_BxLxKxGxH = jnp.einsum("BKGLS,BSKH->BLKGH", weight_BxKxGxLxS, v_BxSxKxH)
        return self.o_proj(mixed_BxLxKxGxH.reshape(-1, config.num_heads * width)), cache


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

    def __call__(self, x_TxD, position_BxL, cache):
        attended_TxD, cache = self.attention(self.attention_norm(x_TxD), position_BxL, cache)
        x_TxD = x_TxD + attended_TxD
        return x_TxD + self.feed_forward(self.feed_forward_norm(x_TxD)), cache


class Llama(nnx.Module):
    def __init__(self, config, *, rngs):
        dtype = jnp.dtype(config.dtype)
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, rngs)
        if not config.tied:
            self.head = _linear(config, config.hidden_size, config.vocab_size, rngs)

    def scores(self, x_TxD):
        return self.head(x_TxD) if hasattr(self, "head") else self.embed.attend(x_TxD)

    def __call__(self, tokens_BxL):
        position_1xL = jnp.arange(tokens_BxL.shape[1])[None]
        x_TxD, _ = self.states(tokens_BxL, position_1xL, [None] * len(self.blocks))
        return self.scores(x_TxD).reshape(*tokens_BxL.shape, -1)

    def states(self, tokens_BxL, position_BxL, caches):
        """(last states (T, D), caches): the tokens' own, given what the caches hold."""
        x_TxD, after = self.embed(tokens_BxL.reshape(-1)), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x_TxD, cache = block(x_TxD, position_BxL, cache)
            after.append(cache)
        return self.norm(x_TxD), after


def _linear(config, inputs, outputs, rngs, use_bias=False):
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


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


def token_losses(graphdef, params, tokens_BxL):
    """Cross-entropy, in nats, of each token but the first given those before it, (B, L - 1)."""
    logits_BxLxV = logits(graphdef, params, tokens_BxL[:, :-1])
    target_BxL = tokens_BxL[:, 1:]
    log_sum_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    picked_BxL = jnp.take_along_axis(logits_BxLxV, target_BxL[..., None], axis=-1)[..., 0]
    return log_sum_BxL - picked_BxL


def loss(graphdef, params, tokens_BxL):
    """The mean of `token_losses`."""
    return jnp.mean(token_losses(graphdef, params, tokens_BxL))


@functools.cache  # the same function again, so that its compiled forms are found again
def loss_of(config):
    """`loss` as a function of (params, batch) alone, as Optax's `value_fn` is called."""
    graphdef, _ = abstract(config)

    def loss_of_batch(params, batch):
        return loss(graphdef, params, batch)

    return loss_of_batch
