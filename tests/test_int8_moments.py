"""Moments in 8 bits: the code, its rounding, the state it makes, and that training goes as well."""

import argparse
import functools
import inspect
import json
import os
import pathlib
import subprocess
import sys

import chex
import flax.serialization
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorenza_optax
from lorenza_optax._inner.inner import first_moment, load_moments, store_moments
from lorenza_optax._inner.quantized import (
    BLOCK,
    dequantized,
    is_quantized,
    quantized,
    quantized_zeros,
)
from lorenza_optax.memory import step_memory
from tests import problems

# Moments of rank 4 have 4800 and 4400 entries; "long" runs in full, "bias" is too small.
SHAPES = {"a": (40, 1200), "b": (1100, 48), "long": (5000,), "bias": (20,)}
RANK = 4
INT8 = jnp.dtype("int8")
pytestmark = pytest.mark.filterwarnings("ignore:value_fn uses some projected leaves")
# Shares of a block's largest entry; of those that are not negative the smallest are left out.
CODES = {True: (np.arange(128) / 127) ** 4, False: (np.r_[0, 6:256] / 255) ** 6}


def _lorenza(**kwargs):
    return lorenza_optax.lorenza(
        1e-2, **{"rank": RANK, "update_proj_gap": 2, "moment_dtype": "int8", **kwargs}
    )


def _problem(dtype=jnp.float32):
    return problems.params(dtype=dtype, shapes=SHAPES), problems.params(seed=1, shapes=SHAPES)


def _step(tx, target):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        return optax.apply_updates(params, updates), state

    return step


def _train(step, params, state, steps=4):
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def _neighbours(x, signed):
    """The codes' values on both sides of each entry, from the block's largest: (low, high)."""
    x = np.asarray(x, np.float64)
    low, high = np.empty_like(x), np.empty_like(x)
    for start in range(0, x.shape[-1], BLOCK):
        block = np.abs(x[..., start : start + BLOCK])
        for row in np.ndindex(block.shape[:-1]):
            grid = CODES[signed] * block[row].max()
            above = np.clip(np.searchsorted(grid, block[row]), 1, len(grid) - 1)
            low[row][start : start + BLOCK] = grid[above - 1]
            high[row][start : start + BLOCK] = grid[above]
    return low, high


entries = (
    st.floats(2**-13, 2**13, width=32) | st.floats(-(2**13), -(2**-13), width=32) | st.just(0.0)
)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    arrays.arrays(np.float32, st.sampled_from([(2, 64), (1, 256), (2, 300)]), elements=entries),
    st.booleans(),
    st.none() | st.integers(0, 9),
)
def test_every_entry_comes_back_as_one_of_the_codes_beside_it(x, signed, seed):
    x = x if signed else np.abs(x)
    key = None if seed is None else jax.random.key(seed)
    back = np.asarray(dequantized(quantized(jnp.asarray(x), signed, key)), np.float64)
    low, high = _neighbours(x, signed)
    size, tolerance = np.abs(back), 1e-5 * np.abs(x) + 1e-30
    to_low, to_high = np.abs(size - low), np.abs(size - high)
    assert np.all(np.minimum(to_low, to_high) <= tolerance + 1e-6 * high)
    assert np.all((np.sign(back) == np.sign(x)) | (back == 0))
    if not signed:
        assert np.all((back > 0) == (x > 0)), "a second moment of 0 would make a step of m / ε"
    elif key is None:
        assert np.all(np.abs(back - x) <= (high - low) / 2 + tolerance + 1e-6 * high)


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_rounded_once_is_not_changed_by_rounding_to_nearest(signed):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 700)), jnp.float32)
    once = quantized(x if signed else x * x, signed, jax.random.key(0))
    chex.assert_trees_all_equal(quantized(dequantized(once), signed, None), once)


def test_zeros_and_what_is_not_finite():
    zeros = quantized(jnp.zeros((2, 600)), True, jax.random.key(0))
    assert not np.any(dequantized(zeros))
    chex.assert_trees_all_equal(quantized_zeros(jnp.ones((2, 600)), True), zeros)
    chex.assert_trees_all_equal_dtypes(
        quantized_zeros(jnp.ones((2, 600)), False), quantized(jnp.zeros((2, 600)), False, None)
    )
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((2, 600), np.float32)
        x[0, 300] = bad
        back = np.asarray(dequantized(quantized(jnp.asarray(x), True, None)))
        assert not np.any(np.isfinite(back[0, 256:512])), "it would pass for a number"
        np.testing.assert_array_equal(np.delete(back[0], np.s_[256:512]), 1)
        np.testing.assert_array_equal(back[1], 1)


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_rounding_is_exact_in_expectation(signed):
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    x = jnp.asarray(x if signed else x * x)
    keys = jax.random.split(jax.random.key(0), 4000)
    back = jax.vmap(lambda key: dequantized(quantized(x, signed, key)))(keys)
    low, high = _neighbours(x, signed)
    mean_error = np.abs(np.asarray(back, np.float64).mean(axis=0) - np.asarray(x))
    assert np.all(mean_error <= 5 * (high - low) / np.sqrt(4000) + 1e-6)
    assert np.any(np.std(np.asarray(back), axis=0) > 0)


def test_a_small_second_moment_goes_on_growing_beside_a_large_one():
    """Rounded to nearest it stays where it is: 0.001 g² is less than half a step."""
    large = np.arange(5000) % BLOCK == 0
    start = {"long": jnp.where(large, 9.0, 0.01)}
    gradient = {"long": jnp.where(large, 3.0, 0.2)}  # the large ones are at their mean
    tx = _lorenza(rho=0.0)
    with pytest.warns(UserWarning, match="No leaf is projected"):
        state = tx.init(gradient)
    adam = optax.scale_by_adam().init(start)._replace(nu=start)
    state = (state[0]._replace(others=store_moments(adam, INT8, None)), *state[1:])
    update = jax.jit(tx.update)

    @jax.jit
    def to_nearest(nu):
        return quantized(0.999 * dequantized(nu) + 0.001 * gradient["long"] ** 2, False, None)

    nearest = quantized(start["long"], False, None)
    for _ in range(400):
        _, state = update(gradient, state, gradient)
        nearest = to_nearest(nearest)
    kept, nearest = map(np.asarray, map(dequantized, (state[0].others.nu["long"], nearest)))
    np.testing.assert_allclose(kept[large], 9, rtol=1e-3)
    exact = 0.04 - 0.03 * 0.999**400
    np.testing.assert_allclose(kept[~large].mean(), exact, rtol=0.03)
    assert nearest[~large].mean() < 0.6 * exact


def test_no_step_blows_up_beside_gradients_a_million_times_as_large():
    """With codes at equal distances a small entry's v is 0, its step m / ε."""
    sizes = np.logspace(-6, 0, 5000)
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.permutation(sizes) * rng.standard_normal((50, 5000)), jnp.float32)
    params, longest = {"long": jnp.zeros(5000)}, {}
    for dtype in ("float32", "int8"):
        tx = _lorenza(rho=0.0, moment_dtype=dtype)
        with pytest.warns(UserWarning, match="No leaf is projected"):
            state = tx.init(params)

        def step(state, gradient, tx=tx):
            updates, state = tx.update({"long": gradient}, state, params)
            return state, jnp.max(jnp.abs(updates["long"]))

        _, sizes_of_steps = jax.lax.scan(step, state, gradients)
        longest[dtype] = float(sizes_of_steps.max()) / 1e-2
    assert longest["float32"] < 4
    assert longest["int8"] < 4


def test_a_quarter_of_the_bytes():
    params, _ = _problem()
    full = _lorenza(moment_dtype=None).init(params)[0]
    state = _lorenza().init(params)[0]
    for inner in ("projected", "others"):
        for moment, kind in (("mu", jnp.int8), ("nu", jnp.uint8)):
            for path, kept in getattr(getattr(state, inner), moment).items():
                wide = getattr(getattr(full, inner), moment)[path]
                if path == "bias":
                    chex.assert_trees_all_equal(kept, wide)
                    continue
                chex.assert_shape(kept["codes"], wide.shape)
                chex.assert_type(kept["codes"], kind)
                chex.assert_type(kept["scales"], jnp.float32)
                bytes_kept = kept["codes"].nbytes + kept["scales"].nbytes
                assert 0.25 < bytes_kept / wide.nbytes < 0.26


def test_a_step_needs_no_more_temporaries_for_it():
    """Loaded before the refresh is decided on, moments would be there in float32 all along."""
    params = {name: jax.ShapeDtypeStruct((128, 512), jnp.float32) for name in "abcd"}
    x = jax.ShapeDtypeStruct((4, 128), jnp.float32)

    def loss(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel) @ jnp.ones((512, 128))
        return jnp.mean(x**2)

    used = {}
    for dtype in (None, "int8"):
        tx = _lorenza(rank=32, rho=0.0, moment_dtype=dtype)

        def step(params, state, x, tx=tx):
            updates, state = tx.update(None, state, params, value_fn=loss, x=x)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        used[dtype] = step_memory(jax.jit(step, donate_argnums=(0, 1)), params, state, x)
    assert used["int8"].arguments < 0.8 * used[None].arguments
    assert used["int8"].temporaries < 1.02 * used[None].temporaries


ASCENTS = {
    "zo": {},
    "probe_factors": {"probe_factors": "momentum"},
    "momentum": {"ascent": "momentum"},
    "sketch-without-partners": {"refresh": "sketch", "rho": 0.0},
    "rotate": {"moment_transport": "rotate"},
    "stagger": {"stagger": True},
    "lion": {"base_optimizer": optax.scale_by_lion()},
    "chain": {"base_optimizer": optax.chain(optax.clip(10.0), optax.scale_by_rms())},
}


@pytest.mark.parametrize(
    "case",
    problems.few(ASCENTS, ("zo",)),
)
def test_every_way_to_use_the_moments(case):
    params, target = _problem()
    before = problems.quadratic(params, target)
    losses = {}
    for dtype in (None, "int8"):
        tx = _lorenza(moment_dtype=dtype, **ASCENTS[case])
        state = tx.init(params)
        trained, new = _train(_step(tx, target), params, state, 8)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        losses[dtype] = float(before - problems.quadratic(trained, target))
    assert losses[None] > 0
    assert losses["int8"] == pytest.approx(losses[None], rel=0.05)


@pytest.mark.slow
def test_low_rank_gradients_of_several_micro_batches():
    params, target = _problem()
    shared = {"rank": RANK, "update_proj_gap": 2, "moment_dtype": "int8", "ascent": "momentum"}
    tx = lorenza_optax.lorenza(1e-2, **shared)
    gradient = lorenza_optax.subspace_value_and_grad(problems.quadratic, **shared)

    @jax.jit
    def step(params, state):
        _, grads, state = gradient(params, target, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    trained, new = _train(step, params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert problems.quadratic(trained, target) < problems.quadratic(params, target)
    # Between refreshes the gradient's function hands the codes on as they are.
    assert int(new[0].count) % 2 == 0
    trained, odd = step(trained, new)
    _, _, same = gradient(trained, target, opt_state=odd)
    chex.assert_trees_all_equal(same[0].projected, odd[0].projected)


@pytest.mark.slow
def test_gradients_at_the_ascent_point_and_momentum_sam():
    params, target = _problem()
    tx = lorenza_optax.momentum_sam(_lorenza(), rho=0.1)
    state = tx.init(params)
    update = jax.jit(lambda s, p: tx.update(jax.grad(problems.quadratic)(p, target), s, p))
    held = params
    for _ in range(3):
        updates, state = update(state, held)
        held = optax.apply_updates(held, updates)
    clean = lorenza_optax.momentum_sam_eval_params(state, held)
    assert float(optax.tree.norm(optax.tree.sub(held, clean))) == pytest.approx(0.1, rel=1e-3)

    inner = state.base_optimizer_state
    at = lorenza_optax.perturbed_value_and_grad(
        problems.quadratic, ascent="momentum", rho=0.1, estimator="jvp"
    )
    _, grads = at(params, target, opt_state=inner)
    moved = optax.tree.sub(grads, problems.gradients(params, target))  # of a quadratic: ε
    assert float(optax.tree.norm(moved)) == pytest.approx(0.1, rel=1e-3)
    moments = first_moment(inner[0].others)
    cosine = jnp.vdot(moved["long"], moments["long"]) / (
        jnp.linalg.norm(moved["long"]) * jnp.linalg.norm(moments["long"])
    )
    assert float(cosine) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_stable_types_and_one_trace(dtype):
    tx, (params, target) = _lorenza(), _problem(dtype)
    before = problems.quadratic(params, target)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, new = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, new), (params, state))
        return optax.apply_updates(params, updates), new

    params, state = _train(step, params, tx.init(params), 5)
    assert problems.quadratic(params, target) < before
    assert all(leaf.size for leaf in jax.tree.leaves(state)), "Orbax refuses empty arrays"


@pytest.mark.slow
def test_scan_vmap_and_donation():
    tx, (params, target) = _lorenza(), _problem()
    step = _step(tx, target)
    expected, _ = _train(step, params, tx.init(params))
    scanned, _ = jax.lax.scan(lambda c, _: (step(*c), None), (params, tx.init(params)), length=4)
    chex.assert_trees_all_close(scanned[0], expected, rtol=1e-2, atol=2e-3)
    donating = jax.jit(lambda p, s: step(p, s), donate_argnums=(0, 1))
    donated, _ = _train(donating, jax.tree.map(jnp.copy, params), tx.init(params))
    chex.assert_trees_all_close(donated, expected, rtol=1e-2, atol=2e-3)
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    result, _ = _train(jax.jit(jax.vmap(step)), stacked, jax.vmap(tx.init)(stacked))
    first = jax.tree.map(lambda p: p[0], result)
    chex.assert_trees_all_close(first, expected, rtol=1e-2, atol=2e-3)


def test_resumes_bit_for_bit(tmp_path):
    tx, (params, target) = _lorenza(), _problem()
    step = _step(tx, target)
    params, state = _train(step, params, tx.init(params), 3)  # in the middle of a window
    expected = _train(step, params, state, 3)
    restored = flax.serialization.from_bytes(
        (params, tx.init(params)), flax.serialization.to_bytes((params, state))
    )
    chex.assert_trees_all_equal(_train(step, *restored, 3), expected)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})
        restored = checkpointer.restore(tmp_path / "step", like)
    chex.assert_trees_all_equal(_train(step, restored["params"], restored["state"], 3), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis_type", [problems.slow(AxisType.Auto), AxisType.Explicit], ids=["auto", "explicit"]
)
def test_meshes(axis_type):
    tx, (params, target) = _lorenza(ascent="momentum"), _problem()  # which reads the moments too
    expected, _ = _train(_step(tx, target), params, tx.init(params), 3)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    specs = {1: P("x"), 2: P("x", "y")}
    with jax.set_mesh(mesh):
        place = lambda tree: {  # noqa: E731
            k: jax.device_put(v, NamedSharding(mesh, specs[v.ndim])) for k, v in tree.items()
        }
        params, target = place(params), place(target)
        state, step = tx.init(params), _step(tx, target)
        types = jax.tree.map(jax.typeof, state)
        for _ in range(3):
            params, state = step(params, state)
            if axis_type == AxisType.Explicit:
                assert jax.tree.map(jax.typeof, state) == types
                codes = state[0].others.mu["long"]["codes"]
                assert jax.typeof(codes).sharding.spec == P("x")
    chex.assert_trees_all_close(
        jax.device_get(params), jax.device_get(expected), rtol=1e-2, atol=2e-3
    )


def test_nnx_optimizer_rebuilds_the_state_as_it_was():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(40, 1200, rngs=rngs)
            self.out = nnx.Linear(1200, 8, rngs=rngs)

    model = Net(nnx.Rngs(0))
    tx = optax.chain(_lorenza(), optax.scale(0.1))  # with this loss 1e-2 is too large a step
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    structure = jax.tree.structure(nnx.as_pure(optimizer.opt_state))
    x = jnp.ones((4, 40))

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: jnp.mean((m.out(jnp.tanh(m.hidden(x))) - 0.5) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    values = [step(model, optimizer) for _ in range(5)]
    assert values[-1] < values[0]
    state = nnx.as_pure(optimizer.opt_state)
    assert jax.tree.structure(state) == structure
    assert any(map(is_quantized, jax.tree.leaves(state, is_leaf=is_quantized)))


def test_a_gradient_that_is_not_finite_leaves_the_codes_as_they_were():
    tx, (params, target) = _lorenza(), _problem()
    _, state = _train(_step(tx, target), params, tx.init(params), 2)
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    _, after = jax.jit(tx.update)(bad, state, params)
    chex.assert_trees_all_equal(after[0].projected, state[0].projected)
    chex.assert_trees_all_equal(after[0].others, state[0].others)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (optax.scale_by_rss(), "knows moments named mu, trace, ema, nu"),
        (optax.identity(), "state of base_optimizer has none"),
        (optax.scale_by_stddev(), "rounded apart"),
    ],
)
def test_optimizers_whose_state_it_cannot_keep(base, message):
    with pytest.raises(ValueError, match=message):
        _lorenza(base_optimizer=base)


@pytest.mark.parametrize(("made", "used"), [("int8", None), (None, "int8"), ("bfloat16", "int8")])
def test_a_state_with_moments_of_another_dtype(made, used):
    params, target = _problem()
    state = _lorenza(moment_dtype=made).init(params)
    kept = "float32" if made is None else made
    message = rf"mu\['a'\] in {kept}, and these arguments say moment_dtype={used!r}"
    with pytest.raises(ValueError, match=message):
        _lorenza(moment_dtype=used).update(target, state, params)
    gradient = lorenza_optax.subspace_value_and_grad(
        problems.quadratic, rank=RANK, moment_dtype=used
    )
    with pytest.raises(ValueError, match=message):
        gradient(params, target, opt_state=state)


@pytest.mark.slow
def test_only_moments_are_rounded_and_names_of_leaves_do_not_matter():
    state = optax.scale_by_amsgrad().init({"codes": jnp.ones((64, 64)), "scales": jnp.ones(4096)})
    kept = store_moments(state, INT8, None)
    assert is_quantized(kept.mu["codes"])
    assert is_quantized(kept.nu["scales"])
    assert not is_quantized(kept.mu)
    chex.assert_trees_all_equal(kept.nu_max, state.nu_max)  # a maximum of noise would only rise
    chex.assert_trees_all_equal(load_moments(kept, state), state)


@functools.cache
def _bytes_of_text():
    return np.frombuffer(inspect.getsource(argparse).encode(), np.uint8)


def _training_curve(moment_dtype, steps=80, context=8, width=64):
    """Next-byte prediction on a source text by a small network, with Adam in full and in rank 8."""
    text = _bytes_of_text()
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embedding": 0.3 * jax.random.normal(keys[0], (256, width)),
        "hidden": jax.random.normal(keys[1], (context * width, 512)) / np.sqrt(context * width),
        "out": 0.01 * jax.random.normal(keys[2], (512, 256)),
    }

    def loss(params, windows):
        x = params["embedding"][windows[:, :-1]].reshape(len(windows), -1)
        logits = jax.nn.relu(x @ params["hidden"]) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1]).mean()

    tx = lorenza_optax.lorenza(
        1e-2, rank=16, update_proj_gap=20, ascent="momentum", moment_dtype=moment_dtype
    )

    @jax.jit
    def step(carry, starts):
        params, state = carry
        windows = jnp.asarray(text)[starts[:, None] + jnp.arange(context + 1)]
        updates, state = tx.update(None, state, params, value_fn=loss, windows=windows)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "value")

    rng, carry, values = np.random.default_rng(0), (params, tx.init(params)), []
    for _ in range(steps):
        carry, value = step(carry, rng.integers(0, len(text) - context - 1, 128))
        values.append(float(value))
    return np.asarray(values)


@pytest.mark.slow
def test_the_training_curve_is_that_of_float32():
    full, eight = _training_curve(None), _training_curve("int8")
    assert full[-10:].mean() < 0.75 * full[0]
    windows = [curve.reshape(-1, 10).mean(axis=1) for curve in (full, eight)]
    np.testing.assert_allclose(windows[1], windows[0], rtol=0.03)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    root = pathlib.Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.int8_moments", "--quick", "--out", tmp_path],
        cwd=root, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads((tmp_path / "int8_moments.json").read_text())
    assert [run["moment_dtype"] for run in stored["runs"]] == ["float32", "bfloat16", "int8"]
    assert (tmp_path / "int8_moments.png").stat().st_size > 0
