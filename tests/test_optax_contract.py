"""Optax's own contract for contributed optimizers, item by item (optax/contrib/_common_test.py)."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax

pytestmark = pytest.mark.filterwarnings("ignore:No leaf is projected", "ignore:Leaves of 3 or more")

OPTIMIZERS = {
    "lorenza": lambda lr=1e-2: lorenza_optax.lorenza(lr, rank=1),
    "adazo_sam": lambda lr=1e-2: lorenza_optax.adazo_sam(lr),
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


def parabola(dtype):
    final = jnp.array([1.0, -1.0, 1.0], dtype)
    return jnp.array([-1.0, 10.0, 1.0], dtype), final, lambda p: jnp.sum((p - final) ** 2)


def rosenbrock(dtype):
    final = jnp.array([1.0, 1.0], dtype)
    objective = lambda p: (1.0 - p[0]) ** 2 + 100.0 * (p[1] - p[0] ** 2) ** 2  # noqa: E731
    return jnp.zeros(2, dtype), final, objective


def matrix_parabola(dtype):
    final = jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return jnp.zeros((2, 2), dtype), final, lambda p: jnp.sum((p - final) ** 2)


def mixed(dtype):
    final = (jnp.array([1.0, -1.0, 2.0], dtype), jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype))
    objective = lambda p: sum(jnp.sum((a - b) ** 2) for a, b in zip(p, final, strict=True))  # noqa: E731
    return jax.tree.map(jnp.zeros_like, final), final, objective


@each
def test_accepts_extra_args_and_does_not_recompile(name):
    opt = OPTIMIZERS[name]()
    initial, _, objective = rosenbrock(jnp.float32)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        value, updates = jax.value_and_grad(objective)(params)
        updates, state = opt.update(updates, state, params, value=value, an_extra_argument=1)
        return optax.apply_updates(params, updates), state

    params, state = initial, opt.init(initial)
    for _ in range(3):
        params, state = step(params, state)


@each
@pytest.mark.parametrize("target", [parabola, rosenbrock, matrix_parabola, mixed])
def test_converges(name, target):
    opt = OPTIMIZERS[name]()
    initial, final, objective = target(jnp.float32)

    def step(carry, _):
        params, state = carry
        updates = jax.grad(objective)(params)
        updates, state = opt.update(updates, state, params)
        return (optax.apply_updates(params, updates), state), None

    state = optax.tree.map_params(opt, lambda v: v, opt.init(initial))
    (params, _), _ = jax.lax.scan(step, (initial, state), length=30_000)
    # A subspace of rank 1 of a (2, 2) matrix follows the gradient at each refresh.
    chex.assert_trees_all_close(params, final, rtol=3e-2, atol=3e-2)


@each
def test_inject_hyperparams_equals_the_plain_optimizer(name):
    factory = getattr(lorenza_optax, name)
    kwargs = {"learning_rate": 1e-2} | ({"rank": 1} if name == "lorenza" else {})
    names = inspect.signature(factory).parameters
    static = tuple(arg for arg in lorenza_optax.STRUCTURAL_ARGS if arg in names)
    opt, injected = factory(**kwargs), optax.inject_hyperparams(factory, static)(**kwargs)
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]
    updates, state = jax.jit(opt.update)(grads, jax.jit(opt.init)(params), params)
    others, other_state = jax.jit(injected.update)(grads, jax.jit(injected.init)(params), params)
    chex.assert_trees_all_close(updates, others, rtol=1e-5)
    chex.assert_trees_all_close(state, other_state.inner_state, rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_preserves_the_dtype_alone_and_under_multi_steps(name, dtype):
    opt = OPTIMIZERS[name]()
    params = jnp.array([1.0, 2.0], dtype)
    grads = jax.grad(lambda x: jnp.sum(x**2))(params)
    updates, _ = jax.jit(opt.update)(grads, jax.jit(opt.init)(params), params)
    assert updates.dtype == params.dtype
    multi = optax.MultiSteps(opt, every_k_schedule=4)
    updates, _ = jax.jit(multi.update)(grads, jax.jit(multi.init)(params), params)
    chex.assert_trees_all_equal(updates, jnp.zeros_like(grads))


@each
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_state_types_are_stable_in_a_cond(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        opt = OPTIMIZERS[name]()
        params, _, objective = parabola(dtype)

        @jax.jit
        def step(params, state, flip):
            updates = jax.grad(objective)(params)
            updates, state = jax.lax.cond(
                flip, lambda: opt.update(updates, state, params), lambda: (params, state)
            )
            return optax.apply_updates(params, updates), state

        state = opt.init(params)
        for flip in (True, False, True):
            params, new = step(params, state, flip)
            assert params.dtype == dtype
            state = jax.lax.cond(flip, lambda: state, lambda: new)  # noqa: B023
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


@each
def test_learning_rate_schedule(name):
    hint = inspect.signature(getattr(lorenza_optax, name)).parameters["learning_rate"].annotation
    assert "ScalarOrSchedule" in str(hint)
    initial, _, objective = parabola(jnp.float32)
    results = []
    for rate in (1e-3, optax.constant_schedule(1e-3)):
        opt = OPTIMIZERS[name](rate)
        params, state = initial, opt.init(initial)
        for _ in range(5):
            updates, state = jax.jit(opt.update)(jax.grad(objective)(params), state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    np.testing.assert_array_equal(*results)
