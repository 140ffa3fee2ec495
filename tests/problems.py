"""Small problems that tests share: leaves of every kind, a loss that couples them."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorenza_optax import WeightDimensionNumbers

SHAPES = {
    "wide": (8, 14),
    "tall": (15, 6),
    "square": (9, 9),
    "stacked": (3, 8, 12),  # a scanned stack of three (8, 12) matrices
    "attention": (8, 3, 4),  # (embed, heads, head_dim)
    "bias": (14,),
}
DIMENSION_NUMBERS = {
    "wide": WeightDimensionNumbers(),
    "tall": WeightDimensionNumbers(),
    "square": WeightDimensionNumbers(),
    "stacked": WeightDimensionNumbers(1, 2),
    "attention": WeightDimensionNumbers(0, (1, 2)),
    "bias": None,
}
# With the emitters of programs outside the tests; conftest.py chooses the older ones.
OWN_EMITTERS = (
    {"xla_cpu_use_fusion_emitters": True}
    if "fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")
    else None
)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # a case that adds little


def few(names, usual):
    """All cases, of which by default only the usual ones run."""
    assert set(usual) <= set(names), f"no cases: {set(usual) - set(names)}"
    return [name if name in usual else slow(name) for name in names]


SAMPLES = 40  # more than any dimension: gradients have full rank


def params(seed=0, dtype=np.float32, shapes=None):
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    return {k: jnp.asarray(0.3 * rng.standard_normal(s), dtype) for k, s in shapes.items()}


def batch(step=0, dtype=np.float32, shapes=None):
    """Inputs and targets of each leaf's linear map, other ones at each step."""
    rng = np.random.default_rng(1000 + step)
    shapes = SHAPES if shapes is None else shapes
    data = {}
    for name, shape in shapes.items():
        rows, outputs = _matrix_shape(name, shape)
        # Columns of different size, so that singular values are well apart.
        x = rng.standard_normal((SAMPLES, rows)) * np.linspace(0.5, 2.0, rows)
        y = rng.standard_normal((SAMPLES, outputs)) * np.linspace(2.0, 0.5, outputs)
        data[name] = (jnp.asarray(x, dtype), jnp.asarray(y, dtype))
    return data


def _matrix_shape(name, shape):
    if name == "stacked":
        return shape[1], shape[2]
    if name == "attention":
        return shape[0], shape[1] * shape[2]
    return (1, shape[0]) if len(shape) == 1 else shape


def loss(params, batch):
    """log(1 + the sum of squared errors of tanh(x W)): smooth, and every leaf feels the rest."""
    total = 0.0
    for name, (x, y) in batch.items():
        w = params[name].reshape(-1, x.shape[1], y.shape[1])
        for matrix in w:
            total = total + jnp.mean((jnp.tanh(x @ matrix) - y) ** 2)
    return jnp.log1p(total)


def quadratic(params, target):
    """½ ‖θ - target‖²: its gradient minus that at θ is the perturbation."""
    squares = jax.tree.map(lambda p, t: jnp.sum((p.astype(jnp.float32) - t) ** 2), params, target)
    return 0.5 * sum(jax.tree.leaves(squares))


def gradients(params, target):
    """The gradient of :func:`quadratic`."""
    return jax.grad(quadratic)(params, target)


def matrices(tree):
    """A tree with the shapes of SHAPES as named 2-D float64 arrays, as references see it."""
    out = {}
    for name, leaf in tree.items():
        array = np.asarray(leaf, np.float64)
        if name == "stacked":
            out |= {f"stacked/{i}": one for i, one in enumerate(array)}
        elif name == "attention":
            out[name] = array.reshape(array.shape[0], -1)
        else:
            out[name] = array
    return out


def leaves(tree):
    """The inverse of :func:`matrices`; leaves may be missing."""
    out = {}
    for name in SHAPES:
        if name == "stacked" and "stacked/0" in tree:
            out[name] = np.stack([tree[f"stacked/{i}"] for i in range(SHAPES[name][0])])
        elif name in tree:
            out[name] = np.asarray(tree[name]).reshape(SHAPES[name])
    return {name: jnp.asarray(array) for name, array in out.items()}
