"""The optimizer inside: what it must be, and in which precision its moments are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._inner.quantized import (
    dequantized,
    is_quantized,
    quantized,
    quantized_zeros,
    worth_quantizing,
)

__all__ = [
    "FIRST_MOMENTS",
    "MOMENT_DTYPES",
    "SECOND_MOMENT",
    "check_inner",
    "check_quantizable",
    "check_sign",
    "check_stored",
    "first_moment",
    "inner_update",
    "load_moments",
    "store_moments",
]

# What Python says of a call without an extra argument that has no default.
_LACKS_ARGUMENT = "required keyword-only argument"

MOMENT_DTYPES = ("float32", "bfloat16", "int8")

# What Optax calls a running mean of gradients, and one of their squares.
FIRST_MOMENTS = ("mu", "trace", "ema")
SECOND_MOMENT = "nu"


def check_inner(inner: optax.GradientTransformationExtraArgs, example: dict[str, Any]) -> None:
    """Raises if a transformation cannot run on low-rank gradients, which have no parameters.

    Args:
      inner: The transformation.
      example: The tree of (abstract) arrays that it will be given.
    """
    # Without shardings: products of the rule would have to say what becomes of them.
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), example)
    state = jax.eval_shape(inner.init, example)
    dry_run = lambda params: jax.eval_shape(inner.update, example, state, params)  # noqa: E731
    try:
        updates, _ = dry_run(None)
    except Exception as error:
        if _LACKS_ARGUMENT in str(error):
            return  # it needs an extra argument of update, which is handed on to it
        try:
            dry_run(example)
        except Exception:
            raise ValueError(
                "base_optimizer cannot update the low-rank gradients, which come as a dict by path"
                f" and without params ({_first_line(error)}). Use another one, such as"
                " optax.scale_by_adam(); for Muon, lorenza_optax.methods.gum."
            ) from error
        raise ValueError(
            "base_optimizer needs params, which low-rank gradients do not have. Use one that reads"
            " neither params nor the loss, such as optax.scale_by_adam() or optax.scale_by_rms(),"
            " and pass weight decay as weight_decay=."
        ) from error
    if jax.tree.map(jnp.shape, updates) != jax.tree.map(jnp.shape, example):
        raise ValueError("base_optimizer changes the shapes of the gradients that it is given.")


def inner_update(
    inner: optax.GradientTransformationExtraArgs,
    gradients: dict[str, Any],
    state: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """``inner.update`` without params; raises if it needs an argument that was not handed on."""
    update: Callable[..., Any] = inner.update
    try:
        return update(gradients, state, None, **extra_args)
    except TypeError as error:
        if _LACKS_ARGUMENT not in str(error):
            raise
        raise TypeError(
            f"base_optimizer reads the loss, or what else it lacks here: {_first_line(error)}. Pass"
            " that to update, as in update(gradients, state, params, value=value), or use one that"
            " reads neither params nor the loss, such as optax.scale_by_adam()."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".:")


def check_sign(inner: optax.GradientTransformation) -> None:
    """Raises for a transformation that points down the gradient of ones, as optax.adam does.

    It is tried for three updates: a learning rate that warms up is 0 at the first.
    """
    ones = {"x": jnp.ones((2, 2))}
    try:
        with jax.ensure_compile_time_eval():
            state, flipped = inner.init(ones), False
            for _ in range(3):
                updates, state = inner.update(ones, state, None)
                flipped |= bool(jnp.all(cast(Any, updates)["x"] < 0))
    except Exception:
        return  # not decidable here: traced hyperparameters, needs params or extra arguments
    if flipped:
        raise ValueError(
            "base_optimizer turns a gradient into a step against it: it contains a learning"
            " rate and its sign flip, so the parameters would ascend. Use a transformation of"
            " the scale_by_* kind (optax.scale_by_adam(), not optax.adam(1e-3))."
        )


def check_quantizable(inner: optax.GradientTransformation) -> None:
    """Raises for an optimizer whose state 8 bits would not shrink, or would make nonsense of."""
    example = {"leaf": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    try:
        state = jax.eval_shape(inner.init, example)
    except Exception:
        return  # check_inner says at init what is wrong
    found = jax.tree_util.tree_leaves_with_path(state)
    if not any(_is_moment(leaf) and _field(path) in _SIGNS for path, leaf in found):
        raise ValueError(
            "moment_dtype='int8' knows moments named"
            f" {', '.join((*FIRST_MOMENTS, SECOND_MOMENT))}, and the state of base_optimizer has"
            " none: use moment_dtype=None."
        )
    is_centred = lambda node: isinstance(node, optax.ScaleByRStdDevState)  # noqa: E731
    if any(map(is_centred, jax.tree.leaves(state, is_leaf=is_centred))):
        raise ValueError(
            "moment_dtype='int8' cannot keep the state of optax.scale_by_stddev: the difference of"
            " its two moments, rounded apart, may be negative. Use moment_dtype=None."
        )


def first_moment(state: Any) -> Any:
    """The tree of first moments in an inner state, under one of Optax's names; None if none.

    Moments that are kept in 8 bits come as float32.
    """
    if not isinstance(state, tuple):
        return None
    if hasattr(state, "_fields"):
        fields = state._asdict()  # pyright: ignore[reportAttributeAccessIssue]
        for name in FIRST_MOMENTS:
            if jax.tree.leaves(fields.get(name)):
                return _dequantized_tree(fields[name])
    return next((found for child in state if (found := first_moment(child)) is not None), None)


def _is_moment(leaf: Any) -> bool:
    return leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


# Whether a moment of a name has negative entries.
_SIGNS = {**dict.fromkeys(FIRST_MOMENTS, True), SECOND_MOMENT: False}


def _field(path: Any) -> str | None:
    """The innermost field of a NamedTuple that a leaf lies in."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else None


def _sign_if_quantized(path: Any, leaf: Any) -> bool | None:
    """Whether a moment that is kept in 8 bits has a sign; None for arrays that stay as they are."""
    known = _is_moment(leaf) and worth_quantizing(leaf.shape)
    return _SIGNS.get(_field(path) or "") if known else None


def check_stored(state: Any, dtype: jnp.dtype | None) -> None:
    """Raises for moments that were stored in 8 bits where ``dtype`` is another, or the reverse."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_quantized):
        if dtype == jnp.int8:
            fits = is_quantized(leaf) or _sign_if_quantized(path, leaf) is None
        else:
            fits = not is_quantized(leaf)
        if not fits:
            kept = "int8" if is_quantized(leaf) else str(leaf.dtype)
            raise ValueError(
                f"The state keeps the moment at {jax.tree_util.keystr(path)} in {kept}, and these"
                f" arguments say moment_dtype={None if dtype is None else dtype.name!r}: pass the"
                " moment_dtype that the state was made with, or make a new state with init."
            )


def store_moments(
    state: Any,
    dtype: jnp.dtype | None,
    key: jax.Array | None,
    kept: Any = None,
    are_zero: bool = False,
) -> Any:
    """The state as it is kept: floating arrays in ``dtype``, None for as they are.

    In int8 each moment that is large enough, or that is so in ``kept``, of which this may be a
    part, is a dict of codes and scales; see ``quantized.py``. Of moments that are known to be zero
    (``are_zero``), as an Adam's are at first, nothing is computed.

    Rounding to bfloat16 and int8 is stochastic where there is a key. With b2 = 0.999 a second
    moment grows by at most a thousandth of itself an update, less than half a step of either, so
    that rounding to nearest would freeze it; stochastic rounding keeps its expectation exact.
    """
    if dtype is None:
        return state
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_quantized)
    before = leaves if kept is None else treedef.flatten_up_to(kept)
    stored = []
    for index, ((path, leaf), old) in enumerate(zip(leaves, before, strict=True)):
        own_key = None if key is None else jax.random.fold_in(key, index)
        if is_quantized(leaf) or not _is_moment(leaf):
            stored.append(leaf)
        elif dtype == jnp.int8:
            signed = _sign_if_quantized(path, leaf)
            if kept is not None:
                signed = _SIGNS[_field(path) or ""] if is_quantized(old) else None
            encode = quantized_zeros if are_zero else functools.partial(quantized, key=own_key)
            stored.append(leaf if signed is None else encode(leaf, signed))
        elif dtype == jnp.bfloat16 and own_key is not None:
            stored.append(_round_stochastically(leaf, own_key))
        else:
            stored.append(leaf.astype(dtype))
    return treedef.unflatten(stored)


def load_moments(state: Any, like: Any) -> Any:
    """The state as it computes: each array in the dtype of ``like``."""

    def load(other: Any, kept: Any) -> Any:
        array = dequantized(kept) if is_quantized(kept) else kept
        return array.astype(other.dtype) if _is_moment(array) else array

    return jax.tree.map(load, like, state)


def _dequantized_tree(tree: Any) -> Any:
    load = lambda node: dequantized(node) if is_quantized(node) else node  # noqa: E731
    return jax.tree.map(load, tree, is_leaf=is_quantized)


def _round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """To bfloat16, up with the probability that makes the expectation exact.

    bfloat16 is the upper half of float32, so adding 16 random bits below and cutting carries
    into the upper half just as often as it should.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(jnp.bfloat16)
