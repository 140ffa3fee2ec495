"""The Llama of examples/llama.py with its layers scanned and rematerialized, as shapes.

A stack of weights for each of a layer's, a scan over it and `jax.checkpoint` of a layer are how
large models are trained in JAX; a program's size, and so the time to compile it, does not grow with
the number of layers. Only one layer's activations and the layers' inputs are kept.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

import llama
import lorenza_optax

LORA_SCALE = 2.0  # the usual alpha / rank, 16 / 8


class Adapted(nnx.Module):
    """LoRA: x W + 2 (x A) B; the product A B is never formed."""

    def __init__(self, base, inputs, outputs, rank, *, rngs):
        self.base = base
        initializer = nnx.initializers.normal(inputs**-0.5)
        self.A = nnx.Param(initializer(rngs.params(), (inputs, rank), base.kernel.dtype))
        self.B = nnx.Param(jnp.zeros((rank, outputs), base.kernel.dtype))

    def __call__(self, x_TxD):
        return self.base(x_TxD) + LORA_SCALE * (x_TxD @ self.A[...]) @ self.B[...]


def _block(config, lora_rank):
    block = llama.Block(config, rngs=nnx.Rngs(0))
    if lora_rank:
        for part, names in (
            (block.attention, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (block.feed_forward, ("gate", "up", "down")),
        ):
            for name in names:
                setattr(part, name, _adapted(getattr(part, name), lora_rank))
    return block


def _adapted(linear, rank):
    return Adapted(linear, linear.in_features, linear.out_features, rank, rngs=nnx.Rngs(0))


def _outside(config, lora_rank):
    """Embedding, norm and head: the model without a layer."""
    model = llama.Llama(dataclasses.replace(config, num_layers=0), rngs=nnx.Rngs(0))
    if lora_rank:
        model.head = _adapted(model.head, lora_rank)
    return model


def _split(make):
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, nnx.to_pure_dict(state)


def abstract(config, lora_rank=None, scanned=True):
    """(loss, params as shapes); with a rank LoRA's adapters stand in the layers and the head.

    The loss is of (params, tokens) as in llama.py; layers are stacked where they are scanned, else
    a list, and rematerialized either way.
    """
    layer_def, layer = _split(lambda: _block(config, lora_rank))
    outer_def, outer = _split(lambda: _outside(config, lora_rank))
    layers = config.num_layers

    def stack(leaf):
        return jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype)

    blocks = jax.tree.map(stack, layer) if scanned else [layer] * layers
    params = {**outer, "blocks": blocks}

    def loss(params, tokens_BxL):
        inputs_BxL, target_T = tokens_BxL[:, :-1], tokens_BxL[:, 1:].reshape(-1)
        position_1xL = jnp.arange(inputs_BxL.shape[1])[None]
        model = nnx.merge(outer_def, {k: v for k, v in params.items() if k != "blocks"})

        @functools.partial(jax.checkpoint, prevent_cse=not scanned)
        def apply(x_TxD, layer):
            return nnx.merge(layer_def, layer)(x_TxD, position_1xL, None)[0], None

        x_TxD = model.embed(inputs_BxL.reshape(-1))
        if scanned:
            x_TxD, _ = jax.lax.scan(apply, x_TxD, params["blocks"])
        else:
            for layer in params["blocks"]:
                x_TxD, _ = apply(x_TxD, layer)
        logits_TxV = model.scores(model.norm(x_TxD)).astype(jnp.float32)
        picked_T = jnp.take_along_axis(logits_TxV, target_T[:, None], axis=-1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits_TxV, axis=-1) - picked_T)

    return loss, params


def matrices(params, embedding=False):
    """Dimension numbers of the layers' and the head's matrices; on demand the embedding's too."""

    def numbers(path, leaf):
        name = path[-1].key
        if name == "kernel" or (embedding and name == "embedding"):
            return lorenza_optax.WeightDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
        return None

    return jax.tree_util.tree_map_with_path(numbers, params)


def lora_split(params):
    """(adapters, the frozen rest), each a list; `lora_join` puts them together."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    trained = [path[-1].key in ("A", "B") for path, _ in leaves]
    chosen, rest = (
        [leaf for (_, leaf), flag in zip(leaves, trained, strict=True) if flag == wanted]
        for wanted in (True, False)
    )

    def join(chosen, rest):
        both = iter(chosen), iter(rest)
        return jax.tree.unflatten(structure, [next(both[0 if flag else 1]) for flag in trained])

    return chosen, rest, join
