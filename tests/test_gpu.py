"""On an accelerator every method does what it does on the CPU beside it.

Not in the default suite: `JAX_PLATFORMS=cuda,cpu pytest -m gpu`, both platforms in one process.
"""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax import methods
from tests import problems

# Of so many rows a basis is made by Cholesky-QR.
SHAPES = {"wide": (12, 20), "tall": (300, 24), "bias": (20,), "stacked": (4, 10, 12)}
NUMBERS = {name: problems.DIMENSION_NUMBERS[name] for name in SHAPES}
EVERY_2 = {"rank": 3, "update_proj_gap": 2}
LORENZA = {
    "lorenza": {},
    "subspace": {"ascent": "subspace"},
    "sketch": {"refresh": "sketch"},
    "materialized": {"factored": False, "num_probes": 2},
    "rotate": {"moment_transport": "rotate"},
    "int8": {"moment_dtype": "int8", "factor_dtype": "bfloat16"},
}
OTHERS = {
    "apollo": EVERY_2,
    "cosmos": {"rank": 3},
    "fira": EVERY_2,
    "flora": EVERY_2,
    "galore": EVERY_2,
    "gradnormlorp": EVERY_2,
    "gum": EVERY_2,
    "lotus": {"rank": 3, "check_every": 2},
    "owlore": EVERY_2 | {"num_layers": 2},
    "projfactor": EVERY_2,
    "vlorp": {"rank": 2, "update_proj_gap": 2, "granularity": 2},
    "lozo": EVERY_2,
    "mezo": {},
    "subzero": EVERY_2,
    "zo_muon": EVERY_2,
}
CASES = {
    **{
        name: functools.partial(lorenza_optax.lorenza, 1e-2, **EVERY_2, **more)
        for name, more in LORENZA.items()
    },
    "lorenza_plus": functools.partial(lorenza_optax.lorenza_plus, 1e-2, **EVERY_2),
    "adazo_sam": functools.partial(lorenza_optax.adazo_sam, 1e-2),
    "sam": lambda: optax.chain(methods.sam(), optax.adam(1e-2)),
    **{
        name: functools.partial(getattr(methods, name), learning_rate=1e-2, **more)
        for name, more in OTHERS.items()
    },
}
# Quantization rounds apart what differs in the last digit, and Newton-Schulz enlarges it.
LOOSE = {"int8": 0.1, "zo_muon": 0.02}
STEPS = 5


def _accelerator():
    device = jax.devices()[0]
    if device.platform == "cpu":
        pytest.skip("no accelerator: JAX_PLATFORMS=cuda,cpu pytest -m gpu")
    return device


def _make(case):
    factory = CASES[case]
    known = inspect.signature(factory).parameters
    return factory(**({"weight_dimension_numbers": NUMBERS} if "weight_dimension_numbers" in known
                      else {}))  # fmt: skip


def _trained(case, device, precision="highest"):
    """(what the steps have added to the parameters, the last state), as NumPy's arrays."""
    tx = _make(case)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        updates, state = tx.update(None, state, params, value_fn=problems.loss, batch=batch)
        return optax.apply_updates(params, updates), state

    with jax.default_device(device), jax.default_matmul_precision(precision):
        params = problems.params(shapes=SHAPES)
        before, state = jax.device_get(params), jax.jit(tx.init)(params)
        for count in range(STEPS):
            params, state = step(params, state, problems.batch(count, shapes=SHAPES))
        after, state = jax.device_get((params, state))
    return {name: after[name] - before[name] for name in before}, state


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_updates_as_on_a_cpu(case):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Some donated buffers were not usable")
        found, _ = _trained(case, _accelerator())
    expected, _ = _trained(case, jax.devices("cpu")[0])
    for name, want in expected.items():
        error = np.linalg.norm(found[name] - want) / np.linalg.norm(want)
        assert error < LOOSE.get(case, 1e-2), f"{name}: {error:.2g} of the CPU's change"


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["lorenza", "sketch", "galore"])
def test_bases_are_orthonormal_where_products_are_rounded(case):
    """By default a GPU multiplies in TF32, 10 bits; the bases are made in full float32."""
    _, state = _trained(case, _accelerator(), precision="default")
    is_ours = lambda node: isinstance(node, lorenza_optax.LowRankState)  # noqa: E731
    [low] = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    bases = [q for q in jax.tree.leaves(low.q) if q.ndim > 1 and q.size]
    assert bases
    for q in bases:
        q = np.asarray(q, np.float64)
        gram = q.mT @ q if q.shape[-2] >= q.shape[-1] else q @ q.mT
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3), gram.shape), atol=5e-6)


@pytest.mark.gpu
def test_randomized_svd_of_a_large_matrix():
    device, rng = _accelerator(), np.random.default_rng(0)
    exact = np.linalg.qr(rng.standard_normal((3000, 20)))[0]
    right = np.linalg.qr(rng.standard_normal((700, 20)))[0]
    singular = 0.7 ** np.arange(20)
    with jax.default_device(device):
        matrix = jnp.asarray(exact * singular @ right.T, jnp.float32)
        u, s, vt = jax.device_get(lorenza_optax.randomized_svd(matrix, 8, jax.random.key(0)))
    np.testing.assert_allclose(s, singular[:8], rtol=1e-5)
    assert np.linalg.norm(u * s @ vt - exact[:, :8] * singular[:8] @ right[:, :8].T) < 1e-4
