"""randomized_svd: orthonormal, accurate, and unmoved by hard inputs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorenza_optax import randomized_svd
from lorenza_optax._linalg.decompositions import exact_svd, orthonormal
from tests import problems

KEY = jax.random.key(0)


def _matrix(m, n, spectrum, seed=0):
    rng = np.random.default_rng(seed)
    k = min(m, n)
    u, _ = np.linalg.qr(rng.standard_normal((m, k)))
    v, _ = np.linalg.qr(rng.standard_normal((n, k)))
    return (u * spectrum(np.arange(1, k + 1)) @ v.T).astype(np.float32)


def _assert_orthonormal(u, vt, atol=1e-4):
    rank = u.shape[1]
    np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=atol)
    np.testing.assert_allclose(vt @ vt.T, np.eye(rank), atol=atol)


# From 256 rows on it is Cholesky-QR that is tried first.
@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (90, 90), (300, 280)])
@pytest.mark.parametrize(
    "spectrum",
    [
        pytest.param(lambda i: 1e-6 ** ((i - 1) / (len(i) - 1)), id="decay-1e6"),
        pytest.param(lambda i: np.where(i <= 10, 1e-6 ** ((i - 1) / 9), 0), id="decay-1e6-rank-10"),
        pytest.param(lambda i: i**-0.5, id="i^-1/2"),
        pytest.param(lambda i: np.where(i <= 5, 1.0, 0.0), id="rank-5"),
        pytest.param(lambda i: 1e-25 / i, id="tiny"),
        pytest.param(lambda i: 1e25 / i, id="huge"),
        pytest.param(lambda i: 0.0 * i, id="zero"),
    ],
)
def test_both_factors_are_orthonormal(shape, spectrum):
    u, s, vt = randomized_svd(_matrix(*shape, spectrum), 16, KEY)
    _assert_orthonormal(u, vt)
    assert np.all(np.isfinite(s))
    assert np.all(np.diff(s) <= 0)


def test_dependent_columns_are_left_to_householder():
    """Cholesky gives nan for them, which the maximum of a large array may lose on CPUs."""
    jitted = jax.jit(orthonormal, compiler_options=problems.OWN_EMITTERS)
    matrix = _matrix(600, 72, lambda i: np.where(i <= 20, 1.0, 0.0))
    q = np.asarray(jitted(matrix))
    np.testing.assert_allclose(q.T @ q, np.eye(72), atol=1e-5)
    np.testing.assert_allclose(q @ (q.T @ matrix), matrix, atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (260, 400)])
def test_captures_nearly_what_the_exact_svd_does(shape):
    for power, share in ((1, 0.97), (2, 0.985)):
        matrix = _matrix(*shape, lambda i: i**-0.5)
        u, _, _ = randomized_svd(matrix, 16, KEY, power_iterations=power)
        best, _, _ = exact_svd(jnp.asarray(matrix), 16, KEY)
        energies = [np.sum(np.square(q.T @ matrix)) for q in (u, best)]
        assert share < energies[0] / energies[1] <= 1 + 1e-5


def test_recovers_a_low_rank_matrix_and_its_singular_values():
    matrix = _matrix(50, 80, lambda i: np.where(i <= 6, 2.0 ** (3 - i), 0.0))
    u, s, vt = randomized_svd(matrix, 6, KEY)
    np.testing.assert_allclose(u * s @ vt, matrix, atol=1e-5)
    np.testing.assert_allclose(s, 2.0 ** (3 - np.arange(1, 7)), rtol=1e-4)


def test_sign_convention_makes_the_result_unique():
    matrix = _matrix(30, 40, lambda i: 2.0**-i)
    first = randomized_svd(matrix, 4, KEY, power_iterations=2)
    other = randomized_svd(matrix, 4, jax.random.key(9), power_iterations=2)
    exact = exact_svd(jnp.asarray(matrix), 4, KEY)
    chex.assert_trees_all_close(first, other, atol=1e-4)
    chex.assert_trees_all_close(first, exact, atol=1e-4)
    u = np.asarray(first[0])
    assert np.all(u[np.argmax(np.abs(u), axis=0), np.arange(4)] > 0)


def test_bfloat16_is_computed_in_float32():
    matrix = jnp.asarray(_matrix(40, 70, lambda i: 1.0 / i), jnp.bfloat16)
    u, s, vt = randomized_svd(matrix, 8, KEY)
    chex.assert_type([u, s, vt], jnp.float32)
    _assert_orthonormal(u, vt)


def test_jit_and_vmap_give_the_same_and_trace_once():
    stack = jnp.stack([_matrix(24, 40, lambda i: 1.0 / i, seed) for seed in range(3)])
    keys = jax.random.split(KEY, 3)
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(lambda a, k: randomized_svd(a, 5, k), n=1)
    compiled = jax.jit(jax.vmap(traced))
    batched = compiled(stack, keys)
    compiled(stack + 1, keys)
    for i in range(3):
        single = randomized_svd(stack[i], 5, keys[i])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], batched), single, atol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    data=st.data(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_rank(m, n, data, seed):
    rank = data.draw(st.integers(1, min(m, n)))
    matrix = np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32)
    u, s, vt = randomized_svd(matrix, rank, KEY)
    chex.assert_shape([u, s, vt], [(m, rank), (rank,), (rank, n)])
    _assert_orthonormal(u, vt)
    # The sketch is as wide as the matrix, so this is the exact decomposition.
    np.testing.assert_allclose(s, np.linalg.svd(matrix)[1][:rank], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("matrix", "rank", "message"),
    [
        (np.ones((4, 6)), 5, "between 1 and min"),
        (np.ones((4, 6)), 0, "between 1 and min"),
        (np.ones((2, 4, 6)), 1, "2 dimensions"),
    ],
)
def test_bad_arguments(matrix, rank, message):
    with pytest.raises(ValueError, match=message):
        randomized_svd(matrix, rank, KEY)
