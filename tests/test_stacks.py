"""Large matrices of a stack are taken one by one: the same numbers, and what fails fails alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorenza_optax
from lorenza_optax import methods
from lorenza_optax._inner import quantized
from lorenza_optax._linalg.stacks import overwritten
from lorenza_optax._low_rank import renewal, step
from lorenza_optax._plan import plan
from lorenza_optax._subspace import subspace
from tests import problems

SHAPES = {
    "a_single": (8, 12),  # of one group with the stacks
    "wide": (8, 14),
    "stacked": (3, 8, 12),
    "stacked_too": (3, 8, 12),
    "bias": (14,),
}
NUMBERS = {
    name: lorenza_optax.WeightDimensionNumbers(len(shape) - 2, len(shape) - 1)
    if len(shape) > 1
    else None
    for name, shape in SHAPES.items()
}
ARGUMENTS = {"rank": 3, "update_proj_gap": 2, "weight_dimension_numbers": NUMBERS}
FACTORIES = {
    "gradient": lambda: lorenza_optax.scale_by_lorenza(**ARGUMENTS),
    "galore": lambda: methods.scale_by_galore(**ARGUMENTS),
    "sketch": lambda: lorenza_optax.scale_by_lorenza(**ARGUMENTS, refresh="sketch"),
    "rotate": lambda: lorenza_optax.scale_by_lorenza(**ARGUMENTS, moment_transport="rotate"),
    "reset": lambda: lorenza_optax.scale_by_lorenza(**ARGUMENTS, moment_transport="reset"),
    "right": lambda: lorenza_optax.scale_by_lorenza(
        **ARGUMENTS, proj_type="right", refresh="sketch", moment_transport="rotate"
    ),
    "svd": lambda: methods.scale_by_galore(**ARGUMENTS, subspace="svd"),
    "power_iteration": lambda: methods.scale_by_cosmos(rank=3, weight_dimension_numbers=NUMBERS),
}


def take_turns(monkeypatch, large=1):
    monkeypatch.setattr(plan, "LARGE", large)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def loss(params):
    """Of full rank, and other at each point."""
    return sum(jnp.sum(jnp.sin(3 * leaf + jnp.arange(leaf.size).reshape(leaf.shape)) ** 2)
               for leaf in params.values())  # fmt: skip


def trained(factory, steps=5):
    tx = factory()
    params = problems.params(shapes=SHAPES, dtype=np.float64)
    state = tx.init(params)

    @jax.jit
    def one_step(params, state):
        updates, state = tx.update(None, state, params, value_fn=loss)
        return jax.tree.map(lambda p, u: p - 0.05 * u, params, updates), state

    for _ in range(steps):
        params, state = one_step(params, state)
    return params, state


@pytest.mark.filterwarnings("ignore:value_fn uses some projected leaves")
@pytest.mark.parametrize(
    "name",
    problems.few(FACTORIES, ("sketch",)),
)
def test_one_by_one_is_all_at_once(name, monkeypatch):
    # In float64, for a training that divides by roots of second moments amplifies round-off.
    with jax.enable_x64(True):
        together = trained(FACTORIES[name])
        take_turns(monkeypatch)
        in_turn = trained(FACTORIES[name])
    assert int(in_turn[1].last_refresh) == int(together[1].last_refresh) == 4
    for one, other in zip(jax.tree.leaves(in_turn), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["galore", problems.slow("svd"), problems.slow("power_iteration")])
def test_bfloat16_gradients_are_widened_one_by_one(name, monkeypatch):
    """With the numbers of a float32 copy of all."""
    rng = np.random.default_rng(2)
    params = problems.params(shapes=SHAPES, dtype=jnp.bfloat16)
    gradients = [
        jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
        for _ in range(4)
    ]

    def states():
        tx = FACTORIES[name]()
        state = tx.init(params)
        for gradient in gradients:
            _, state = jax.jit(tx.update)(gradient, state, params)
        return state

    together = states()
    take_turns(monkeypatch)
    taken, original = [], step.project_in_turn
    spy = lambda leaf, *arrays: taken.append(leaf) or original(leaf, *arrays)  # noqa: E731
    monkeypatch.setattr(step, "project_in_turn", spy)
    in_turn = states()
    assert len(taken) >= 2  # both stacks
    for one, other in zip(jax.tree.leaves(in_turn), jax.tree.leaves(together), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("large", [1, problems.slow(2**20)])
def test_a_matrix_that_cannot_be_decomposed_keeps_its_subspace(large, monkeypatch):
    """The others get new ones, moments follow where they do, and the refresh stays due."""
    take_turns(monkeypatch, large)
    original = subspace.SUBSPACES["randomized_svd"]

    def failing(matrices, rank, key):
        q, s, r = original(matrices, rank, key)
        norms = jnp.concatenate([jnp.linalg.norm(g, axis=(-2, -1)).reshape(-1) for g in matrices])
        return jnp.where((norms > 1e3)[:, None, None], jnp.nan, q), s, r

    monkeypatch.setitem(renewal.SUBSPACES, "randomized_svd", failing)
    tx = FACTORIES["rotate"]()
    params = problems.params(shapes=SHAPES)
    rng = np.random.default_rng(1)
    gradients = {
        name: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        for name, leaf in params.items()
    }
    _, first = tx.update(gradients, tx.init(params), params)
    _, second = tx.update(gradients, first, params)
    too_large = gradients | {"stacked": gradients["stacked"].at[1].multiply(1e4)}
    _, third = tx.update(too_large, second, params)
    assert [int(s.last_refresh) for s in (first, second, third)] == [0, 0, 0]
    old, new = second.q["stacked"], third.q["stacked"]  # P, as they are wide
    turned = np.einsum("bkr,bks->brs", new, old)
    turned[1] = np.eye(3)
    low = np.einsum("bkr,bkl->brl", new, too_large["stacked"])
    expected = 0.9 * turned @ second.projected.mu["stacked"] + 0.1 * low
    np.testing.assert_allclose(third.projected.mu["stacked"], expected, rtol=1e-4, atol=1e-4)
    for name in ("stacked", "stacked_too", "wide", "a_single"):
        changed = np.any(np.asarray(third.q[name]) != np.asarray(second.q[name]), axis=(-2, -1))
        expected = [True, False, True] if name == "stacked" else np.ones_like(changed)
        np.testing.assert_array_equal(changed, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(third))
    _, fourth = tx.update(gradients, third, params)
    assert int(fourth.last_refresh) == 3


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("active", [True, False])
def test_leaves_are_overwritten_or_left_alone(in_turn, active):
    leaf = jnp.arange(24.0).reshape(2, 3, 4)
    batches = [(2,)] if in_turn else [(2,), ()]
    leaves = [leaf] if in_turn else [leaf, leaf[0]]

    def function(old, given):
        return {"x": old["x"] + jnp.max(given[0])}

    run = jax.jit(
        lambda leaves, active: overwritten(
            function, {"x": leaves}, [jnp.ones((2, 1))], batches, active, in_turn
        )
    )
    new = run(leaves, jnp.asarray(active))["x"]
    for before, after in zip(leaves, new, strict=True):
        np.testing.assert_array_equal(after, before + active)


@pytest.mark.parametrize("signed", [True, False])
def test_layers_are_encoded_one_by_one(signed, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64, 80)), jnp.float32)
    together = quantized.quantized(x, signed, None)
    monkeypatch.setattr(quantized, "LARGE_LAYER", 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    in_turn = quantized.quantized(x, signed, None)
    for name, array in together.items():
        np.testing.assert_array_equal(in_turn[name], array)

    @jax.jit
    def rounded(key):
        return quantized.dequantized(quantized.quantized(x, signed, key))

    mean = np.mean([rounded(jax.random.key(i)) for i in range(200)], axis=0)
    wanted = np.asarray(x) if signed else np.maximum(x, 0)
    large = wanted > 0.5  # the smallest codes are rounded up
    np.testing.assert_allclose(mean[large], wanted[large], rtol=0.05)
