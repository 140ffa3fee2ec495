"""Factors and moments in bfloat16: what is kept, how it is rounded, and that it still trains."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax._inner.inner import store_moments
from tests import problems

SHAPES = {"a": (12, 20), "b": (24, 10), "bias": (20,)}


def _train(steps=40, dtype=jnp.float32, **kwargs):
    params = problems.params(dtype=dtype, shapes=SHAPES)
    target = problems.params(seed=1, shapes=SHAPES)
    tx = lorenza_optax.lorenza(1e-2, rank=4, update_proj_gap=5, **kwargs)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return problems.quadratic(params, target), state[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_default_dtypes(dtype):
    _, state = _train(2, dtype)
    chex.assert_type([*state.q.values(), *state.r.values()], dtype)
    moments = [x for x in jax.tree.leaves((state.projected, state.others)) if x.ndim]
    chex.assert_type(moments, jnp.float32)


def test_bfloat16_state_takes_half_the_bytes_and_trains_as_well():
    (best, full), (loss, half) = _train(), _train(factor_dtype="bfloat16", moment_dtype="bfloat16")
    assert loss < 1.1 * best

    def size(state):
        arrays = jax.tree.leaves((state.q, state.r, state.projected, state.others))
        return sum(x.nbytes for x in arrays if x.ndim)

    assert 2 * size(half) == size(full)
    for q in half.q.values():
        wide = np.asarray(q, np.float32)
        assert np.abs(wide.T @ wide - np.eye(4)).max() < 1e-2


def test_stochastic_rounding_is_unbiased_and_to_a_neighbour():
    x = jnp.asarray(np.random.default_rng(0).standard_normal(64), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    rounded = jax.vmap(lambda key: store_moments(x, jnp.dtype("bfloat16"), key))(keys)
    chex.assert_type(rounded, jnp.bfloat16)
    wide = np.asarray(rounded, np.float64)
    step = np.abs(np.asarray(x)) * 2.0**-7
    assert np.all(np.abs(wide - np.asarray(x)) <= step)
    standard_error = step / np.sqrt(4000)
    assert np.all(np.abs(wide.mean(axis=0) - np.asarray(x)) < 5 * standard_error)
    exact = jnp.asarray([1.0, -2.5, 0.0])
    chex.assert_trees_all_equal(
        store_moments(exact, jnp.dtype("bfloat16"), keys[0]).astype(jnp.float32), exact
    )


def test_a_bfloat16_second_moment_goes_on_growing():
    """Rounded to nearest it freezes at 1/2 of its step: 0.999 v + 0.001 g² moves it too little."""
    tx = lorenza_optax.lorenza(1e-2, rank=2, b2=0.999, rho=0.0, moment_dtype="bfloat16")
    gradient = {"a": jnp.ones((6, 8)), "bias": jnp.ones(64)}
    state, update = tx.init(gradient), jax.jit(tx.update)
    nearest = jnp.zeros((), jnp.bfloat16)
    for _ in range(1500):
        _, state = update(gradient, state, gradient)
        nearest = (0.999 * nearest.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)
    exact = 1 - 0.999**1500
    kept = state[0].others.nu["bias"]
    assert kept.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.mean(np.asarray(kept, np.float32)), exact, rtol=0.05)
    assert nearest < 0.5 * exact


def test_factors_of_the_unused_side_are_not_kept_without_an_ascent():
    _, state = _train(2, rho=0.0)
    assert set(state.q) == {"a"}  # wide: the rows are compressed
    assert set(state.r) == {"b"}  # tall: the columns are
    _, state = _train(2, rho=0.0, proj_type="right")
    assert (set(state.q), set(state.r)) == (set(), {"a", "b"})
    _, state = _train(2)
    assert set(state.q) == set(state.r) == {"a", "b"}
