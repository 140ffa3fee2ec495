"""Moments in 8 bits: blocks of an array share a scale, and the codes lie denser near zero."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._base.mesh import in_auto_mode

__all__ = [
    "BLOCK",
    "dequantized",
    "is_quantized",
    "quantized",
    "quantized_zeros",
    "worth_quantizing",
]

# Entries along the last axis that share one scale. The axis is not flattened with the others, so
# that codes have the array's shape, and on a mesh its sharding.
BLOCK = 256
# Smaller arrays stay as they are, as in bitsandbytes: norms and biases are a small part of the
# memory and the most sensitive to rounding. So do arrays of short rows, whose scales would weigh.
SMALLEST = 4096
SHORTEST = 64
# A layer of a stack with so many entries is encoded by itself: on the way there are many arrays.
# On one device only: along an axis that is sharded all layers would be gathered first.
LARGE_LAYER = 2**16

# (codes above 0, power) of arrays with a sign and of such that are not negative.
SIGNED, UNSIGNED = (127, 4), (255, 6)
SMALLEST_CODE = 6  # of what is not negative and not 0


def worth_quantizing(shape: tuple[int, ...]) -> bool:
    """Whether an array of a shape is kept in 8 bits; the others stay in float32."""
    size = 1
    for length in shape:
        size *= length
    return bool(shape) and size >= SMALLEST and shape[-1] >= SHORTEST


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is what :func:`quantized` gives."""
    if not isinstance(node, dict) or set(node) != {"codes", "scales"}:
        return False
    # Leaves may have these names too, but no moment is an array of integers.
    return getattr(node["codes"], "dtype", None) in (jnp.int8, jnp.uint8)


def quantized(x: jax.Array, signed: bool, key: jax.Array | None) -> dict[str, jax.Array]:
    r"""An array as 8-bit codes and a float32 scale for each block of its last axis.

    With the block's largest magnitude s and codes k,

    .. math::
      x \approx s \, \mathrm{sign}(k) \, (k / 127)^4 \text{ (signed)}, \qquad
      x \approx s \, (k / 255)^6 \text{ (not negative)} .

    With codes at equal distances an entry below 1/255 of the largest would be 0, and 1/sqrt(v)
    would make its step as long as Adam's ε allows. For the same reason a second moment that is
    not 0 never becomes less than code 6, 1.3e-5 in its root: it is rounded up. (Where gradients in
    a block differ by 1e6 the longest step of Adam is then 2.1 times that with float32; with code 1
    as the smallest it was 13 times.) The powers were chosen by the relative error of Adam's steps
    after 300 updates, where gradients in a block have log-normal sizes of σ = 0.3, 1 and 2: it is
    0.06, 0.10 and 0.24, against 0.05, 0.12 and 1.26 with powers of 2 and 4.

    Args:
      x: An array whose last axis is cut into blocks of ``BLOCK`` entries; the last may be shorter.
      signed: Whether entries may be negative; otherwise negative ones become 0.
      key: For stochastic rounding, exact in expectation (but for second moments rounded up, as
        above); None rounds to the nearest code, which leaves what was quantized before as it is.

    Returns:
      {"codes": int8 or uint8 in the shape of ``x``, "scales": float32 (..., blocks)}. A block
      with an entry that is not finite comes back as nan or inf, never as finite numbers.
    """

    def encode(x: jax.Array, *keys: jax.Array) -> dict[str, jax.Array]:
        return _encode(x.astype(jnp.float32), signed, *keys)

    def encode_layers(x: jax.Array, *keys: jax.Array) -> dict[str, jax.Array]:
        keys = tuple(jax.random.split(key, len(x)) for key in keys)
        return jax.lax.map(lambda layer: encode(*layer), (x, *keys))

    keys = () if key is None else (key,)
    if x.ndim > 2 and math.prod(x.shape[1:]) >= LARGE_LAYER and jax.device_count() == 1:
        return in_auto_mode(encode_layers, x, *keys, like=lambda: _like(x))
    return in_auto_mode(encode, x, *keys, like=lambda: _like(x))


def quantized_zeros(x: jax.Array, signed: bool) -> dict[str, jax.Array]:
    """:func:`quantized` of zeros in the shape of ``x``.

    Not computed: XLA would fold the constants, which takes a GPU's compiler minutes for 7B.
    """

    def zeros(x: jax.Array) -> dict[str, jax.Array]:
        codes = jnp.zeros(x.shape, jnp.int8 if signed else jnp.uint8)
        return {"codes": codes, "scales": jnp.zeros(_scales_shape(x), jnp.float32)}

    return in_auto_mode(zeros, x, like=lambda: _like(x))


def _scales_shape(x: jax.Array) -> tuple[int, ...]:
    return (*x.shape[:-1], -(-x.shape[-1] // BLOCK))


def _like(x: jax.Array) -> dict[str, Any]:
    """Arrays with the shardings of codes and scales: the array's, but for the last axis."""
    sharding = jax.typeof(x).sharding
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    rows = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec[:-1], None))
    scales = jax.ShapeDtypeStruct(_scales_shape(x), jnp.float32, sharding=rows)
    return {"codes": x, "scales": scales}


def dequantized(node: dict[str, jax.Array]) -> jax.Array:
    """The float32 array that codes and scales stand for."""
    return in_auto_mode(_decode, node["codes"], node["scales"], like=node["codes"])


def _encode(x: jax.Array, signed: bool, *keys: jax.Array) -> dict[str, jax.Array]:
    levels, power = SIGNED if signed else UNSIGNED
    size = jnp.abs(x) if signed else jnp.maximum(x, 0)
    blocks = _blocks(size)
    scales = jnp.max(blocks, axis=-1)
    unit = jnp.where(scales > 0, scales, 1)[..., None]
    share = (blocks / unit).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    root = jnp.sqrt(jnp.sqrt(share)) if signed else jnp.cbrt(jnp.sqrt(share))
    below = jnp.clip(jnp.floor(root * levels), 0, levels - 1)
    low, high = (below / levels) ** power, ((below + 1) / levels) ** power
    # The largest entry of a block is at the last code exactly, and 0 at 0.
    up = (share - low) / (high - low)
    noise = (jax.random.bits(keys[0], x.shape, jnp.uint16) + 0.5) / 65536 if keys else 0.5
    code = below + (noise < up)
    if signed:
        codes = jnp.where(x < 0, -code, code).astype(jnp.int8)
    else:
        codes = jnp.where(share > 0, jnp.maximum(code, SMALLEST_CODE), 0).astype(jnp.uint8)
    return {"codes": codes, "scales": scales}


def _decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
    levels, power = SIGNED if codes.dtype == jnp.int8 else UNSIGNED
    k = codes.astype(jnp.float32)
    blocks = _blocks(jnp.sign(k) * (jnp.abs(k) / levels) ** power) * scales[..., None]
    return blocks.reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]]


def _blocks(x: jax.Array) -> jax.Array:
    """(..., n) to (..., blocks, block), the last one filled up with zeros."""
    length = x.shape[-1]
    count = -(-length // BLOCK)
    block = BLOCK if count > 1 else length
    padded = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, count * block - length)])
    return padded.reshape(*x.shape[:-1], count, block)
