"""SAM and ASAM: against a reference and Optax's own SAM, and by the laws that they obey."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import lorenza_optax
from lorenza_optax import methods, perturbed_value_and_grad
from tests import problems
from tests.reference import sam as reference

SHAPES = {"a": (12, 20), "b": (24, 10), "bias": (20,)}
METHODS = {"sam": methods.sam, "asam": methods.asam}
each_method = pytest.mark.parametrize("method", METHODS)


def _problem(dtype=jnp.float32):
    return problems.params(dtype=dtype, shapes=SHAPES), problems.params(seed=1, shapes=SHAPES)


def _epsilon(method, params, loss, **kwargs):
    """Where the gradient is taken, less where the parameters are, by the state and by update."""
    tx = METHODS[method](**kwargs)
    state = tx.init(params)
    names = {k: v for k, v in kwargs.items() if k != "axis_name"}
    gradient = perturbed_value_and_grad(lambda p: (loss(p), p), has_aux=True, **names)
    (value, point), outside = jax.jit(lambda p: gradient(p, opt_state=state))(params)
    inside, state = jax.jit(lambda p: tx.update(None, state, p, value_fn=loss))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(inside, params)
    chex.assert_trees_all_close(inside, outside, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.ascent.value, value, rtol=1e-5)
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)  # noqa: E731
    return jax.tree.map(np.subtract, wide(point), wide(params)), state


@pytest.mark.parametrize(("method", "inner"), [("sam", "sgd"), ("asam", "adam")])
def test_agrees_with_the_reference(method, inner):
    rate, kwargs = (0.5, {"rho": 0.2}) if method == "sam" else (1e-2, {"rho": 0.7, "eta": 0.03})
    with jax.enable_x64(True):
        behind = optax.sgd(rate) if inner == "sgd" else optax.adam(rate)
        tx = optax.chain(METHODS[method](**kwargs), behind)
        params = problems.params(dtype=np.float64)
        state = tx.init(params)
        chex.clear_trace_counter()

        @jax.jit
        @chex.assert_max_traces(n=1)
        def step(params, state, batch):
            updates, state = tx.update(None, state, params, value_fn=problems.loss, batch=batch)
            return optax.apply_updates(params, updates), state

        gradient = jax.jit(jax.grad(problems.loss))

        def grad(params, t):
            batch = problems.batch(t, np.float64)
            return problems.matrices(gradient(problems.leaves(params), batch))

        expected = reference.run(
            problems.matrices(params), grad, steps=6, learning_rate=rate, inner=inner,
            adaptive=method == "asam", **kwargs,
        )  # fmt: skip
        for t, record in enumerate(expected):
            params, state = step(params, state, problems.batch(t, np.float64))
            chex.assert_trees_all_close(
                problems.matrices(params), record["params"], rtol=1e-9, atol=1e-9
            )
            assert bool(state[0].ascent.perturbed)


def test_sam_is_the_one_of_optax():
    params, target = _problem()
    ours = optax.chain(methods.sam(rho=0.1), optax.sgd(0.1))
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = optax.contrib.sam(optax.sgd(0.1), adversary, sync_period=2, opaque_mode=True)

    def loss(params):
        return jnp.log1p(problems.quadratic(params, target))

    @jax.jit
    def both(params, states):
        one, first = ours.update(None, states[0], params, value_fn=loss)
        grad_fn = lambda p, _: jax.grad(loss)(p)  # noqa: E731
        two, second = theirs.update(jax.grad(loss)(params), states[1], params, grad_fn=grad_fn)
        return one, two, (first, second)

    states = (ours.init(params), theirs.init(params))
    for _ in range(4):
        one, two, states = both(params, states)
        chex.assert_trees_all_close(one, two, rtol=1e-5, atol=1e-7)
        params = optax.apply_updates(params, one)


@pytest.mark.parametrize("behind", ["galore", "apollo"])
def test_a_method_of_the_family_behind_sees_its_gradient(behind):
    params = {"w": 0.1 * jnp.arange(48.0).reshape(6, 8)}
    loss = lambda params: jnp.sum(jnp.sin(params["w"]) ** 2)  # noqa: E731
    method = getattr(methods, f"scale_by_{behind}")(rank=2)
    chained = optax.chain(methods.sam(0.5), method)
    state = chained.init(params)
    updates, _ = jax.jit(lambda s: chained.update(None, s, params, value_fn=loss))(state)
    at, gradient = perturbed_value_and_grad(loss, rho=0.5)(params, opt_state=state)
    expected, _ = jax.jit(method.update)(gradient, method.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    assert at > loss(params)
    plain, _ = jax.jit(method.update)(jax.grad(loss)(params), method.init(params), params)
    assert optax.tree.norm(optax.tree.sub(updates, plain)) > 1e-3


def test_asam_sees_the_function_and_not_its_parameters():
    """c W₁ and W₂ / c are the same ReLU network, with the same perturbed loss where η = 0."""
    rng = np.random.default_rng(0)
    shapes = {"one": (8, 16), "bias": (16,), "two": (16, 3)}
    params = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    x, y = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((32, 8), (32, 3)))

    def loss(params):
        hidden = jax.nn.relu(x @ params["one"] + params["bias"])
        return jnp.mean((hidden @ params["two"] - y) ** 2)

    def perturbed(method, c, **kwargs):
        scaled = {"one": c * params["one"], "bias": c * params["bias"], "two": params["two"] / c}
        np.testing.assert_allclose(loss(scaled), loss(params), rtol=1e-5)
        tx = METHODS[method](**kwargs)
        _, state = tx.update(None, tx.init(scaled), scaled, value_fn=loss)
        return float(state.ascent.value) / float(loss(params)) - 1

    rises = [perturbed("asam", c, rho=0.5, eta=0.0) for c in (1.0, 3.0, 0.1)]
    assert rises[0] > 0.1
    np.testing.assert_allclose(rises, rises[0], rtol=1e-4)
    assert abs(perturbed("sam", 3.0) / perturbed("sam", 1.0) - 1) > 0.1
    assert abs(perturbed("asam", 0.1, eta=0.1) / perturbed("asam", 1.0, eta=0.1) - 1) > 0.1


@each_method
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_size_and_sign_of_the_perturbation(method, dtype):
    params, target = _problem(dtype)
    # At weights of 3, a bfloat16 step is 0.0156 and most of ε would be rounded away.
    params = jax.tree.map(lambda p: 10 * p, params)
    loss = functools.partial(problems.quadratic, target=target)
    rho = 0.02
    epsilon, state = _epsilon(method, params, loss, rho=rho)
    wide = {k: np.asarray(p, np.float64) for k, p in params.items()}
    slope = {k: wide[k] - target[k] for k in wide}
    expected = reference.ascent(wide, slope, rho, adaptive=method == "asam")
    chex.assert_trees_all_close(epsilon, expected, atol=2e-6)
    scale = {k: (np.abs(wide[k]) + 0.01) if method == "asam" else 1.0 for k in wide}
    norm = np.sqrt(sum(np.sum((scale[k] * slope[k]) ** 2) for k in wide))
    np.testing.assert_allclose(state.ascent.ascent_norm, norm, rtol=1e-5)
    negative, _ = _epsilon(method, params, loss, rho=-rho)
    chex.assert_trees_all_close(negative, jax.tree.map(np.negative, epsilon), atol=4e-6)


@each_method
def test_steps_that_are_not_perturbed_take_one_gradient(method):
    params, target = _problem()
    calls = []

    def loss(params):
        jax.debug.callback(lambda: calls.append(1))
        return problems.quadratic(params, target)

    def counts(steps=5, **kwargs):
        tx = METHODS[method](**kwargs)
        state, found = tx.init(params), []
        step = jax.jit(lambda state: tx.update(None, state, params, value_fn=loss))
        for _ in range(steps):
            calls.clear()
            _, state = step(state)
            jax.effects_barrier()
            found.append(len(calls))
            assert bool(state.ascent.perturbed) == (len(calls) == 2)
        return found

    assert counts(perturb_every=2) == [2, 1, 2, 1, 2]
    assert counts(rho=lambda count: jnp.where(count < 2, 0.0, 0.1)) == [1, 1, 2, 2, 2]
    assert counts(1, rho=0.0) == [1]


@each_method
@pytest.mark.parametrize("factor", [0.0, np.nan, np.inf])
def test_no_direction_gives_no_perturbation(method, factor):
    params, target = _problem()
    tx = METHODS[method]()
    flat = lambda p: 1.0 + factor * problems.quadratic(p, target)  # noqa: E731
    _, state = jax.jit(lambda s: tx.update(None, s, params, value_fn=flat))(tx.init(params))
    assert not bool(state.ascent.perturbed)
    loss = flat(params)  # which the state tells as it is: nothing is skipped here
    np.testing.assert_allclose(state.ascent.value, loss, rtol=1e-6)
    rest = state._replace(ascent=state.ascent._replace(value=jnp.zeros(())))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(rest))


def test_asam_with_an_infinite_weight_that_matters_not():
    params = {"a": jnp.ones(3), "mask": jnp.array([0.0, -jnp.inf])}
    with np.errstate(invalid="ignore"):  # inf - inf
        epsilon, state = _epsilon("asam", params, lambda p: jnp.sum(p["a"] ** 2), rho=0.5)
    assert bool(state.ascent.perturbed)
    assert np.all(epsilon["a"] > 0)


def test_eta_and_rho_may_be_scheduled():
    params, target = _problem()
    loss = functools.partial(problems.quadratic, target=target)
    plain, _ = _epsilon("asam", params, loss, rho=0.3, eta=0.2)
    scheduled, _ = _epsilon(
        "asam", params, loss,
        rho=optax.linear_schedule(0.3, 0.0, 5), eta=optax.linear_schedule(0.2, 0.0, 5),
    )  # fmt: skip
    chex.assert_trees_all_close(plain, scheduled, rtol=1e-5)


@each_method
def test_both_ways_are_the_same(method):
    tx = optax.chain(METHODS[method](rho=0.3), optax.sgd(1e-2))
    value_and_grad = perturbed_value_and_grad(problems.loss, rho=0.3)
    shapes = {name: problems.SHAPES[name] for name in ("wide", "bias")}
    params = problems.params(shapes=shapes)
    batch = problems.batch(shapes=shapes)

    @functools.partial(jax.jit, compiler_options=problems.OWN_EMITTERS)
    def both(params, opt_state):
        first = tx.update(None, opt_state, params, value_fn=problems.loss, batch=batch)
        value, grads = value_and_grad(params, batch, opt_state=opt_state)
        return first, tx.update(grads, opt_state, params), value

    (updates, state), (others, other_state), value = both(params, tx.init(params))
    chex.assert_trees_all_equal(updates, others)
    assert float(value) == float(state[0].ascent.value)
    assert not bool(other_state[0].ascent.perturbed)


@each_method
def test_passes_on_what_comes_in_without_value_fn(method):
    params, target = _problem()
    tx = METHODS[method]()
    updates, state = tx.update(target, tx.init(params), params)
    assert updates is target
    assert list(lorenza_optax.diagnostics(state)) == ["value", "ascent_norm", "perturbed"]
    assert (int(state.count), bool(state.ascent.perturbed)) == (1, False)


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_value_fn_inside_a_wrapper_names_the_other_way(wrapper):
    params, target = _problem()
    stage = optax.chain(methods.sam(), optax.sgd(1e-2))
    tx = {
        "masked": lambda: optax.masked(stage, {"a": True, "b": True, "bias": False}),
        "partition": lambda: optax.partition(
            {"x": stage, "y": optax.sgd(1e-2)}, {"a": "x", "b": "x", "bias": "y"}
        ),
    }[wrapper]()
    state = tx.init(params)
    with pytest.raises(ValueError, match=f"optax.{wrapper}.*perturbed_value_and_grad"):
        tx.update(params, state, params, value_fn=problems.quadratic, target=target)
    value, _ = perturbed_value_and_grad(problems.quadratic)(params, target, opt_state=state)
    assert value > problems.quadratic(params, target)


def test_errors():
    for kwargs, message in (
        ({"eta": -0.1}, "eta must be at least 0"),
        ({"rho": np.inf}, "rho must be finite"),
        ({"perturb_every": 0}, "perturb_every must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.asam(**kwargs)
    params, target = _problem()
    with pytest.raises(ValueError, match="needs params"):
        methods.sam().update(None, methods.sam().init(params), value_fn=problems.quadratic)
    both = optax.chain(methods.sam(), methods.asam())
    with pytest.raises(ValueError, match="and one with another ascent"):
        perturbed_value_and_grad(problems.quadratic)(params, target, opt_state=both.init(params))
