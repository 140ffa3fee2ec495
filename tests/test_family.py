"""Every method of lorenza_optax.methods in every contract that Optax users rely on.

What one compiled step can show is in the default suite; the rest is slow.
"""

import functools
import inspect

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorenza_optax
from lorenza_optax import methods
from tests import problems

SHAPES = {"a": (12, 20), "b": (24, 10), "bias": (20,), "stack": (4, 10, 12)}
NUMBERS = {
    "a": lorenza_optax.WeightDimensionNumbers(),
    "b": lorenza_optax.WeightDimensionNumbers(),
    "stack": lorenza_optax.WeightDimensionNumbers(1, 2),
}
EVERY_2 = {"rank": 3, "update_proj_gap": 2}
BACKPROP = {
    "apollo": EVERY_2,
    "cosmos": {"rank": 3},
    "fira": EVERY_2,
    "flora": EVERY_2 | {"min_dim_size_to_factor": 4},
    "galore": EVERY_2,
    "gradnormlorp": EVERY_2,
    "gum": EVERY_2,
    "lotus": {"rank": 3, "check_every": 2, "threshold": 0.4},
    "owlore": EVERY_2 | {"num_layers": 2, "sampling_interval": 3},
    "projfactor": EVERY_2,
    "vlorp": {"rank": 2, "update_proj_gap": 2, "granularity": 2},
}
ZEROTH_ORDER = {
    "lozo": EVERY_2,
    "lozo_m": EVERY_2,
    "mezo": {},
    "subzero": EVERY_2,
    "zo_muon": EVERY_2,
}
METHODS = BACKPROP | ZEROTH_ORDER
RATES = {"lozo": 1e-3, "lozo_m": 1e-3, "mezo": 1e-3, "subzero": 1e-3, "gradnormlorp": 1e-2}
each_method = pytest.mark.parametrize("name", METHODS)
pytestmark = pytest.mark.usefixtures("compile_quickly")


def _make(name, **more):
    factory = getattr(methods, name)
    known = inspect.signature(factory).parameters
    kwargs = METHODS[name] | {"learning_rate": RATES.get(name, 1e-2), **more}
    if "weight_dimension_numbers" in known:
        kwargs.setdefault("weight_dimension_numbers", NUMBERS)
    return factory(**kwargs)


def _problem(dtype=jnp.float32):
    return problems.params(dtype=dtype, shapes=SHAPES), problems.params(seed=1, shapes=SHAPES)


def _step(tx, checked=False):
    def step(params, state, target):
        updates, new = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        if checked:
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        return optax.apply_updates(params, updates), new

    return jax.jit(chex.assert_max_traces(n=1)(step) if checked else step)


def _train(step, params, state, target, steps=4):
    for _ in range(steps):
        params, state = step(params, state, target)
    return params, state


def test_all_methods_are_here():
    factories = {n for n in methods.__all__ if n.islower() and not n.startswith("scale_by_")}
    assert factories == {*METHODS, "sam", "asam"}  # those are in test_conformance.py
    assert {f"scale_by_{name}" for name in METHODS} <= set(methods.__all__)


@each_method
def test_one_compiled_step(name):
    """Trains with stable types and one trace, skips what is not finite, resumes its bits."""
    chex.clear_trace_counter()
    tx = _make(name)
    params, target = _problem()
    state = tx.init(params)
    assert all(leaf.size for leaf in jax.tree.leaves(state)), "Orbax refuses empty arrays"
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), state)
    step = _step(tx, checked=True)
    before = problems.quadratic(params, target)
    params, state = _train(step, params, state, target, 7)  # in the middle of a window
    assert problems.quadratic(params, target) < before

    stored = flax.serialization.to_bytes((params, state))
    expected = _train(step, params, state, target, 3)
    restored = flax.serialization.from_bytes((params, tx.init(params)), stored)
    chex.assert_trees_all_equal(_train(step, *restored, target, 3), expected)

    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, target)
    skipped, after = step(params, state, broken)
    chex.assert_trees_all_equal(skipped, params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after))
    scalars = {key.rsplit("/", 1)[-1] for key in lorenza_optax.diagnostics(after)}
    assert scalars >= {"value", "skipped_steps"}
    again, _ = _train(step, skipped, after, target, 6)
    assert problems.quadratic(again, target) < problems.quadratic(params, target)


@pytest.mark.slow
@each_method
def test_bfloat16_parameters(name):
    chex.clear_trace_counter()
    params, target = _problem(jnp.bfloat16)
    tx = _make(name, **({"learning_rate": 3e-2} if name in BACKPROP else {}))
    before = problems.quadratic(params, target)
    params, _ = _train(_step(tx, checked=True), params, tx.init(params), target, 8)
    assert problems.quadratic(params, target) < before


@pytest.mark.slow
@each_method
def test_scan_donation_and_jitted_init(name):
    tx, (params, target) = _make(name), _problem()
    chex.assert_trees_all_close(jax.jit(tx.init)(params), tx.init(params), atol=1e-6)
    step = _step(tx)
    expected, _ = _train(step, params, tx.init(params), target)
    body = lambda carry, _: (step(*carry, target), None)  # noqa: E731
    scanned, _ = jax.lax.scan(body, (params, tx.init(params)), length=4)
    chex.assert_trees_all_close(scanned[0], expected, rtol=1e-3, atol=1e-4)
    donating = jax.jit(lambda p, s, t: step(p, s, t), donate_argnums=(0, 1))
    fresh = jax.tree.map(jnp.copy, params)
    donated, _ = _train(donating, fresh, jax.jit(tx.init)(fresh), target)
    chex.assert_trees_all_close(donated, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@each_method
def test_vmap_over_models(name):
    tx, (params, target) = _make(name), _problem()
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    step = jax.jit(jax.vmap(_step(tx), (0, 0, None)))
    result, _ = _train(step, stacked, jax.vmap(tx.init)(stacked), target, 3)
    for i in range(2):
        single = jax.tree.map(lambda p, i=i: p[i], stacked)
        expected, _ = _train(_step(tx), single, tx.init(single), target, 3)
        got = jax.tree.map(lambda p, i=i: p[i], result)
        chex.assert_trees_all_close(got, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.slow
@each_method
def test_orbax_resumes_bit_for_bit(name, tmp_path):
    tx, (params, target) = _make(name), _problem()
    step = _step(tx)
    params, state = _train(step, params, tx.init(params), target, 3)
    expected = _train(step, params, state, target, 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})
        restored = checkpointer.restore(tmp_path / "step", like)
    again = _train(step, restored["params"], restored["state"], target, 3)
    chex.assert_trees_all_equal(again, expected)


@pytest.mark.slow
@each_method
def test_extra_arguments_and_map_params(name):
    tx, (params, target) = _make(name), _problem()
    state = optax.tree.map_params(tx, lambda leaf: leaf, tx.init(params))
    chex.assert_trees_all_equal(state, tx.init(params))
    more = {"value_fn": problems.quadratic, "target": target} if name in ZEROTH_ORDER else {}
    updates, _ = tx.update(target, state, params, an_argument_that_nobody_expects=1, **more)
    chex.assert_trees_all_equal_shapes(updates, params)


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_inject_hyperparams(name, dtype):
    factory = getattr(methods, name)
    static = lorenza_optax.structural_args(factory)
    schedules = {"learning_rate": optax.linear_schedule(1e-2, 1e-3, 4), "weight_decay": 0.1}
    if "scale" in inspect.signature(factory).parameters:
        schedules["scale"] = 0.5
    kwargs = METHODS[name] | {"weight_dimension_numbers": NUMBERS}
    kwargs = {k: v for k, v in kwargs.items() if k in inspect.signature(factory).parameters}
    plain = factory(**kwargs, **schedules)
    injected = optax.inject_hyperparams(factory, static_args=static)(**kwargs, **schedules)
    params, target = _problem(dtype)
    (one, _), (two, state) = (
        _train(_step(tx), params, tx.init(params), target, 4) for tx in (plain, injected)
    )
    tolerance = 1e-3 if dtype == jnp.float32 else 3e-2  # Optax casts what it injects
    chex.assert_trees_all_close(one, two, rtol=tolerance, atol=tolerance)
    assert set(schedules) <= set(state.hyperparams)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKPROP)
@pytest.mark.parametrize("wrapper", ["masked", "MultiSteps", "apply_if_finite"])
def test_wrappers_of_given_gradients(name, wrapper):
    tx = _make(name)
    mask = {"a": True, "b": False, "bias": True, "stack": True}
    wrapped = {
        "masked": lambda: optax.masked(tx, mask),
        "MultiSteps": lambda: optax.MultiSteps(tx, 2).gradient_transformation(),
        "apply_if_finite": lambda: optax.apply_if_finite(tx, 3),
    }[wrapper]()
    params, target = _problem()
    state = wrapped.init(params)

    @jax.jit
    def step(params, state, target):
        gradient = problems.gradients(params, target)
        updates, state = wrapped.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    part = lambda tree: {"a": tree["a"]}  # noqa: E731
    before = problems.quadratic(part(params), part(target))
    after, _ = _train(step, params, state, target, 8)
    assert problems.quadratic(part(after), part(target)) < before


@pytest.mark.slow
@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_zeroth_order_needs_the_loss(name):
    tx, (params, target) = _make(name), _problem()
    with pytest.raises(ValueError, match="value_fn"):
        tx.update(target, tx.init(params), params)
    wrapped = optax.masked(tx, {"a": True, "b": False, "bias": True, "stack": True})
    with pytest.raises(ValueError, match="masked"):
        wrapped.update(
            params, wrapped.init(params), params, value_fn=problems.quadratic, target=target
        )


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_meshes_give_the_numbers_of_one_device(name, axis_type):
    tx, (params, target) = _make(name), _problem()
    expected, _ = _train(_step(tx), params, tx.init(params), target, 3)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    specs = {2: P("x", "y"), 3: P("x", None, "y")}
    with jax.set_mesh(mesh):
        params, target = (
            {
                k: jax.device_put(v, NamedSharding(mesh, specs.get(v.ndim, P())))
                for k, v in tree.items()
            }
            for tree in (params, target)
        )
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        step = _step(tx)
        for _ in range(3):
            params, state = step(params, state, target)
            if axis_type == AxisType.Explicit:
                assert jax.tree.map(jax.typeof, state) == types
    chex.assert_trees_all_close(jax.device_get(params), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@each_method
def test_state_shardings(name):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    tx, (params, _) = _make(name), _problem()
    specs = {2: P("x", "y"), 3: P("x", None, "y")}
    shardings = {k: NamedSharding(mesh, specs.get(v.ndim, P())) for k, v in params.items()}
    found = lorenza_optax.state_shardings(tx, params, shardings)
    state = jax.jit(tx.init, out_shardings=found)(params)
    chex.assert_trees_all_close(jax.device_get(state), tx.init(params), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKPROP)
def test_linen_train_state(name):
    params, target = _problem()
    state = TrainState.create(apply_fn=None, params=params, tx=_make(name))

    @jax.jit
    def step(state):
        gradient = problems.gradients(state.params, target)
        return state.apply_gradients(grads=gradient)

    before = problems.quadratic(params, target)
    for _ in range(6):
        state = step(state)
    assert problems.quadratic(state.params, target) < before


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(24, 24, rngs=rngs) for _ in range(4)])

    def __call__(self, x):
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        return x


@pytest.mark.slow
@each_method
def test_nnx_optimizer(name):
    model = Net(nnx.Rngs(0))
    tx = _make(name, weight_dimension_numbers=None) if name != "mezo" else _make(name)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (16, 24))
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return jnp.mean((nnx.merge(graphdef, params, rest)(x) - 0.5) ** 2)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.state(model, nnx.Param), value_fn=loss)
        return loss(nnx.state(model, nnx.Param))

    structure = jax.tree.structure(nnx.as_pure(optimizer.opt_state))
    values = [step(model, optimizer) for _ in range(8)]
    assert values[-1] < values[0]
    assert jax.tree.structure(nnx.as_pure(optimizer.opt_state)) == structure


@pytest.mark.slow
@each_method
def test_shard_map_averages_over_the_named_axis(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shapes = {"a": (12, 20), "stack": (4, 20, 20)}
    params = problems.params(shapes=shapes)
    x = jax.random.normal(jax.random.key(0), (64, 12))

    def loss(params, x):
        y = jnp.tanh(x @ params["a"])
        for i in range(4):
            y = y + jnp.tanh(y @ params["stack"][i])
        return jnp.mean(y**2)

    def train(tx, wrap):
        def step(params, state, x):
            updates, state = tx.update(None, state, params, value_fn=loss, x=x)
            return optax.apply_updates(params, updates), state

        step, p, state = jax.jit(wrap(step)), params, tx.init(params)
        for _ in range(3):
            p, state = step(p, state, x)
        return p

    numbers = {k: NUMBERS[k] for k in shapes}
    make = functools.partial(_make, name)
    if name != "mezo":
        make = functools.partial(make, weight_dimension_numbers=numbers)
    specs = {"mesh": mesh, "in_specs": (P(), P(), P("data")), "out_specs": (P(), P())}
    sharded = train(make(axis_name="data"), lambda step: jax.shard_map(step, **specs))
    chex.assert_trees_all_close(sharded, train(make(), lambda step: step), rtol=5e-3, atol=1e-3)


OUT_OF_RANGE = {
    "b1": [1.5, -0.1],
    "b2": [1.0, "x", lambda count: 0.9],
    "eps": [-1e-8],
    "weight_decay": ["x", float("inf")],
}


@pytest.mark.parametrize("name", [*METHODS, "lorenza", "lorenza_plus", "adazo_sam"])
def test_decays_and_epsilon_out_of_range_are_refused(name):
    factory = getattr(methods if name in METHODS else lorenza_optax, name)
    known = inspect.signature(factory).parameters
    given = METHODS.get(name, {"rank": 3} if "rank" in known else {}) | {"learning_rate": 1e-2}
    if name == "mezo":
        given = given | {"variant": "adam"}
    for argument in OUT_OF_RANGE.keys() & known.keys():
        for value in OUT_OF_RANGE[argument]:
            with pytest.raises((TypeError, ValueError), match=f"{argument} must be"):
                factory(**given | {argument: value})
