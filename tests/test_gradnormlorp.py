"""GradNormLoRP: against its reference, what it keeps, and columns without a direction."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax.methods import gradnormlorp, scale_by_gradnormlorp
from tests import problems
from tests.reference import gradnormlorp as reference

PROJECTED = {"wide", "tall", "square", "attention", "stacked/0", "stacked/1", "stacked/2"}
SMALL = {"a": (8, 12), "bias": (12,)}


def _gradients(number, shapes=SMALL, dtype=np.float32):
    return [problems.params(seed=100 + t, shapes=shapes, dtype=dtype) for t in range(number)]


def _run(tx, params, gradients, state=None):
    state, history = tx.init(params) if state is None else state, []
    step = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


@pytest.mark.parametrize("side", ["std", problems.slow("reverse_std")])
def test_agrees_with_the_reference(side):
    steps, rate = 7, 0.03
    with jax.enable_x64(True):
        tx = gradnormlorp(
            rate, rank=3, update_proj_gap=3, scale=0.5, proj_type=side,
            weight_dimension_numbers=problems.DIMENSION_NUMBERS,
        )  # fmt: skip
        params = problems.params(dtype=np.float64)
        state, history = tx.init(params), []
        gradient = jax.jit(jax.grad(problems.loss))

        @jax.jit
        def step(params, state, batch):
            updates, state = tx.update(None, state, params, value_fn=problems.loss, batch=batch)
            return optax.apply_updates(params, updates), state

        for t in range(steps):
            params, state = step(params, state, problems.batch(t, np.float64))
            history.append((params, state[0]))

        def grad(params, t):
            at = problems.leaves(params)
            return problems.matrices(gradient(at, problems.batch(t, np.float64)))

        expected = reference.run(
            problems.matrices(problems.params(dtype=np.float64)), grad, steps=steps, rank=3, gap=3,
            projected=PROJECTED, learning_rate=rate, scale=0.5, proj_type=side,
        )  # fmt: skip
        for (params, state), record in zip(history, expected, strict=True):
            chex.assert_trees_all_close(
                problems.matrices(params), record["params"], rtol=1e-8, atol=1e-8
            )
            for name in PROJECTED:
                path, _, layer = name.partition("/")
                kept = state.lengths[path][int(layer)] if layer else state.lengths[path]
                signed = np.linalg.norm(record["v"][name], axis=0) * np.sign(record["g"][name])
                np.testing.assert_allclose(kept, signed, rtol=1e-8)
        assert state.low_rank.last_refresh == 6


def test_magnitudes_that_pass_zero_keep_their_direction():
    """A gradient mostly along W drives g through 0; then it is g that is negative, not v."""
    with jax.enable_x64(True):
        params = problems.params(shapes=SMALL, dtype=np.float64)
        start, across = params["a"], 0.3 * problems.params(5, np.float64, SMALL)["a"]
        pull = lambda params, t: {"a": start + (-1) ** t * across, "bias": np.ones(12)}  # noqa: E731
        tx = gradnormlorp(0.2, rank=2, update_proj_gap=2, scale=0.1)
        history = _run(tx, params, [pull(None, t) for t in range(9)])
        expected = reference.run(
            params, pull, steps=9, rank=2, gap=2, projected={"a"}, learning_rate=0.2, scale=0.1
        )
        for (params, _), record in zip(history, expected, strict=True):
            chex.assert_trees_all_close(params, record["params"], rtol=1e-8, atol=1e-8)
        assert np.all(history[-1][1][0].lengths["a"] < 0)
        assert np.all(np.sum(params["a"] * start, axis=0) < 0)


def test_keeps_three_numbers_a_column_beside_galore():
    shapes = {"a": (64, 96), "stack": (3, 48, 32), "bias": (96,)}
    numbers = {
        "a": lorenza_optax.WeightDimensionNumbers(),
        "stack": lorenza_optax.WeightDimensionNumbers(1, 2),
    }
    params = problems.params(shapes=shapes)
    sizes = []
    for method in (lorenza_optax.methods.galore, gradnormlorp):
        state = method(1e-2, rank=8, weight_dimension_numbers=numbers).init(params)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(state)))
    assert sizes[1] - sizes[0] == 3 * (96 + 3 * 32) + 1  # and a count


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_zero_kernels_learn_with_stable_types_and_one_trace(dtype):
    params = problems.params(shapes=SMALL, dtype=dtype) | {"a": jnp.zeros((8, 12), dtype)}
    target = problems.params(seed=1, shapes=SMALL)
    target["a"] = target["a"].at[:, 3].set(0)  # a column without a gradient has no direction
    tx = gradnormlorp(3e-2, rank=4, update_proj_gap=2, weight_decay=1e-3)
    state = tx.init(params)
    before = problems.quadratic(params, target)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, new = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        return optax.apply_updates(params, updates), new

    first, state = step(params, state)
    gradient = -np.asarray(target["a"], np.float64)
    cosine = np.sum(np.asarray(first["a"], np.float64) * gradient, axis=0)
    cosine /= 3e-2 * np.where(np.any(gradient, axis=0), np.linalg.norm(gradient, axis=0), 1)
    np.testing.assert_allclose(np.delete(cosine, 3), -1, atol=1e-2)
    params = first
    for _ in range(20):
        params, state = step(params, state)
    assert not np.any(params["a"][:, 3])
    assert problems.quadratic(params, target) < 0.7 * before
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, state)))
    assert all(leaf.size for leaf in jax.tree.leaves(state)), "Orbax refuses empty arrays"
    assert float(lorenza_optax.diagnostics(state)["value"]) < before


def test_a_schedule_may_be_zero_and_gamma_may_be_small():
    schedule = lambda count: jnp.where(count < 2, 0.0, 1e-7)  # noqa: E731
    params = problems.params(shapes=SMALL)
    tx = gradnormlorp(schedule, rank=4)
    history = _run(tx, params, _gradients(2))
    for after, state in history:
        chex.assert_trees_all_equal(after, params)
        chex.assert_trees_all_close(state[0].lengths, tx.init(params)[0].lengths, rtol=1e-6)
    # Not lost in the round-off of W, as a difference of weights would be.
    first, after = (
        scale_by_gradnormlorp(rate, rank=4).update(
            gradient, scale_by_gradnormlorp(rate, rank=4).init(params), params
        )[0]
        for rate, gradient in [(0.0, _gradients(1)[0]), (1e-7, _gradients(1)[0])]
    )
    chex.assert_trees_all_close(first, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_an_unusable_gradient_leaves_all_as_it_is(bad):
    tx = gradnormlorp(1e-2, rank=4, update_proj_gap=2)
    params = problems.params(shapes=SMALL)
    params["a"] = params["a"].at[:, 5].set(0)
    (good, other) = _gradients(2)
    (params, state) = _run(tx, params, [good])[-1]
    for name, place in (("a", (1, 5)), ("bias", (2,))):
        updates, new = jax.jit(tx.update)(
            other | {name: other[name].at[place].set(bad)}, state, params
        )
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
        chex.assert_trees_all_equal(new[0][:3], state[0][:3])
        assert int(lorenza_optax.diagnostics(new)["skipped_steps"]) == 1


def test_gradient_transform_injection_maps_and_checkpoints():
    params, gradients = problems.params(shapes=SMALL), _gradients(5)
    clip = optax.clip_by_global_norm(0.1)
    inside = gradnormlorp(1e-2, rank=4, update_proj_gap=3, gradient_transform=clip)
    outside = optax.chain(clip, gradnormlorp(1e-2, rank=4, update_proj_gap=3))
    expected = _run(inside, params, gradients)
    chex.assert_trees_all_close(expected[-1][0], _run(outside, params, gradients)[-1][0])

    tx = optax.inject_hyperparams(gradnormlorp, lorenza_optax.structural_args(gradnormlorp))(
        learning_rate=lambda count: 1e-2, rank=4, update_proj_gap=3, gradient_transform=clip
    )
    chex.assert_trees_all_close(_run(tx, params, gradients)[-1][0], expected[-1][0], rtol=1e-5)

    mapped = optax.tree.map_params(inside, lambda leaf: leaf, expected[1][1])
    chex.assert_trees_all_equal(mapped, expected[1][1])
    restored = flax.serialization.from_bytes(
        inside.init(params), flax.serialization.to_bytes(expected[1][1])
    )
    resumed = _run(inside, expected[1][0], gradients[2:], restored)
    chex.assert_trees_all_equal(resumed[-1], expected[-1])


def test_needs_params():
    tx, (gradient,) = gradnormlorp(1e-2, rank=4), _gradients(1)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(gradient, tx.init(gradient))
