"""Losses that compute in another dtype than the parameters have: a small move is still felt.

Evaluated factored, W + P N must be no worse than evaluated plainly, where the sum is rounded once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorenza_optax import WeightDimensionNumbers
from lorenza_optax._factored.landscape import Displacement, Subspaces, landscape
from lorenza_optax._plan.matrix_view import matrix_view

BF16 = jnp.bfloat16
rng = np.random.default_rng(0)


def _rise(loss, leaf, numbers, step, keep_factored):
    """How far the loss rises where every entry of a leaf moves by a step; what had to be formed."""
    view = matrix_view(leaf.shape, numbers, "std")
    size = view.compressed_size
    subspaces = Subspaces({"w": view}, {"w": jnp.ones((size, 1), leaf.dtype) / size**0.5})
    near = landscape(loss, {"w": leaf}, subspaces, keep_factored=keep_factored)
    moves = [jnp.full((1, view.free), s * size**0.5, leaf.dtype) for s in (step, 0.0)]
    there, here = (near.value(Displacement({"w": move}, {})) for move in moves)
    return float(there - here), near.seen


def _array(*shape, dtype=jnp.float32):
    return jnp.asarray(rng.uniform(1, 2, shape), dtype)


IMAGES, IDS, X, DIRECTION = (
    _array(4, 6, 6, 8),
    np.arange(500) % 64,
    _array(256, 64),
    _array(256, 48),
)


def _convolution(p):
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(
        IMAGES.astype(BF16), p["w"].astype(BF16), (1, 1), "SAME", dimension_numbers=numbers
    )
    return jnp.mean(out.astype(jnp.float32) ** 2)


def _rows(p):
    return jnp.mean(p["w"].astype(BF16)[IDS].astype(jnp.float32))


@pytest.mark.parametrize("step", [1e-3, 3e-3])  # entries between 1 and 2 have steps of 2⁻⁷
@pytest.mark.parametrize(
    ("loss", "leaf", "numbers"),
    [
        (_convolution, _array(3, 3, 8, 16), WeightDimensionNumbers((0, 1, 2), 3)),
        (_rows, _array(64, 24), WeightDimensionNumbers()),
    ],
)
def test_weights_that_must_be_formed_are_formed_before_they_are_cast(loss, leaf, numbers, step):
    plain, _ = _rise(loss, leaf, numbers, step, keep_factored=False)
    found, seen = _rise(loss, leaf, numbers, step, keep_factored=True)
    assert "w" in seen
    assert found > 0
    assert found == pytest.approx(plain, rel=1e-3)


def test_small_moves_of_narrow_products_are_not_rounded_away():
    def loss(p):
        y = X.astype(BF16) @ p["w"].astype(BF16)
        return jnp.sum(y.astype(jnp.float32) * DIRECTION)

    leaf = _array(64, 48)
    expected = float(jnp.sum(2e-3 * (X @ jnp.ones_like(leaf)) * DIRECTION))
    found, seen = _rise(loss, leaf, WeightDimensionNumbers(), 2e-3, keep_factored=True)
    assert not seen
    assert found == pytest.approx(expected, rel=0.1)


def test_complex_activations_keep_their_imaginary_part():
    leaf = _array(64, 48)
    for loss in (
        lambda p: jnp.mean(jnp.abs(jnp.fft.fft(X) @ p["w"]) ** 2),
        lambda p: jnp.mean(jnp.abs(p["w"].T @ jnp.fft.fft(X).T) ** 2),
    ):
        plain, factored = (
            _rise(loss, leaf, WeightDimensionNumbers(), 1e-2, keep)[0] for keep in (False, True)
        )
        assert factored == pytest.approx(plain, rel=1e-3)
