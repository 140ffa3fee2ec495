"""Every method in every contract that Optax users rely on."""

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
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorenza_optax
from lorenza_optax import STRUCTURAL_ARGS, perturbed_value_and_grad
from tests import problems

SHAPES = {"a": (12, 20), "b": (24, 10), "bias": (20,)}
METHODS = {
    "lorenza": functools.partial(lorenza_optax.lorenza, 1e-2, rank=4, update_proj_gap=2),
    "lorenza-rotate-bf16": functools.partial(
        lorenza_optax.lorenza, 1e-2, rank=4, update_proj_gap=2, moment_transport="rotate",
        factor_dtype="bfloat16", moment_dtype="bfloat16", proj_type="reverse_std",
    ),
    "lorenza_plus": functools.partial(lorenza_optax.lorenza_plus, 1e-2, rank=4, update_proj_gap=2),
    "adazo_sam": functools.partial(lorenza_optax.adazo_sam, 1e-2),
    "zo_sam_perturbation": lambda **kwargs: optax.chain(
        lorenza_optax.zo_sam_perturbation(**kwargs), optax.adam(1e-2)
    ),
    "sam": lambda **kwargs: optax.chain(lorenza_optax.methods.sam(**kwargs), optax.adam(1e-2)),
    "asam": lambda **kwargs: optax.chain(lorenza_optax.methods.asam(**kwargs), optax.adam(1e-2)),
}  # fmt: skip
STAGES = ("zo_sam_perturbation", "sam", "asam")  # which keep nothing of a gradient


# In adazo_sam stands zo_sam_perturbation.
USUAL = ("lorenza", "lorenza-rotate-bf16", "lorenza_plus", "adazo_sam")


def few_methods(*usual):
    return pytest.mark.parametrize("method", problems.few(METHODS, usual))


each_method = few_methods(*USUAL)


def _problem(dtype=jnp.float32):
    return problems.params(dtype=dtype, shapes=SHAPES), problems.params(seed=1, shapes=SHAPES)


def _step(tx, target):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        return optax.apply_updates(params, updates), state

    return step


def _plain_step(tx, target):
    gradient = perturbed_value_and_grad(problems.quadratic)

    @jax.jit
    def step(params, state):
        _, grads = gradient(params, target, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _train(step, params, state, steps=4):
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@each_method
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_trains_with_stable_types_and_one_trace(method, dtype):
    tx = METHODS[method]()
    params, target = _problem(dtype)
    before = problems.quadratic(params, target)
    state = tx.init(params)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, new = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        return optax.apply_updates(params, updates), new

    params, state = _train(step, params, state, 6)
    assert problems.quadratic(params, target) < before
    assert bool(optax.tree.get(state, "perturbed"))
    assert all(leaf.size for leaf in jax.tree.leaves(state)), "Orbax refuses empty arrays"
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))


@each_method
def test_init_is_jittable_and_shape_only(method):
    tx, (params, _) = METHODS[method](), _problem()
    # Random factors are orthonormalized, with another round-off in another program.
    chex.assert_trees_all_close(jax.jit(tx.init)(params), tx.init(params), atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), tx.init(params))


@few_methods("lorenza-rotate-bf16", "adazo_sam")
def test_scan_over_steps_and_donation(method):
    tx, (params, target) = METHODS[method](), _problem()
    step = _step(tx, target)
    expected, _ = _train(step, params, tx.init(params))
    scanned, _ = jax.lax.scan(lambda c, _: (step(*c), None), (params, tx.init(params)), length=4)
    chex.assert_trees_all_close(scanned[0], expected, rtol=1e-4, atol=1e-5)
    donating = jax.jit(lambda p, s: step(p, s), donate_argnums=(0, 1))
    fresh = jax.tree.map(jnp.copy, params)
    donated, _ = _train(donating, fresh, tx.init(fresh))
    chex.assert_trees_all_close(donated, expected, rtol=1e-4, atol=1e-5)


@few_methods("lorenza", "zo_sam_perturbation", "asam")
def test_vmap_over_models(method):
    tx, (params, target) = METHODS[method](), _problem()
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    states = jax.vmap(tx.init)(stacked)
    step = jax.jit(jax.vmap(_step(tx, target)))
    result, _ = _train(step, stacked, states, 3)
    for i in range(2):
        single = jax.tree.map(lambda p, i=i: p[i], stacked)
        expected, _ = _train(_step(tx, target), single, tx.init(single), 3)
        got = jax.tree.map(lambda p, i=i: p[i], result)
        chex.assert_trees_all_close(got, expected, rtol=2e-3, atol=2e-3)


@each_method
def test_extra_arguments_and_map_params(method):
    tx, (params, target) = METHODS[method](), _problem()
    state = optax.tree.map_params(tx, lambda leaf: leaf, tx.init(params))
    chex.assert_trees_all_equal(state, tx.init(params))
    specs = jax.tree.map(lambda p: P("x"), params)
    spec_state = optax.tree.map_params(
        tx, lambda _, spec: spec, tx.init(params), specs, transform_non_params=lambda _: None
    )
    for field in ("q", "projected"):  # no parameter's spec lands on a low-rank array
        found = optax.tree.get_all_with_path(spec_state, field)
        assert all(not jax.tree.leaves(value) for _, value in found)
    updates, _ = tx.update(target, state, params, an_argument_that_nobody_expects=1)
    chex.assert_trees_all_equal_shapes(updates, params)


@each_method
def test_serialization_resumes_bit_for_bit(method, tmp_path):
    tx, (params, target) = METHODS[method](), _problem()
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
    chex.assert_trees_all_equal_structs(restored["state"], state)
    chex.assert_trees_all_equal(_train(step, restored["params"], restored["state"], 3), expected)


# Of LORENZA one is enough: test_wrappers.py has it in all of them.
@few_methods("lorenza-rotate-bf16", "adazo_sam")
@pytest.mark.parametrize("wrapper", ["masked", "MultiSteps", "apply_if_finite"])
def test_wrappers_train_by_the_outer_gradient(method, wrapper):
    tx = METHODS[method]()
    wrapped = {
        "masked": lambda: optax.masked(tx, {"a": True, "b": False, "bias": True}),
        "MultiSteps": lambda: optax.MultiSteps(tx, 2).gradient_transformation(),
        "apply_if_finite": lambda: optax.apply_if_finite(tx, 3),
    }[wrapper]()
    params, target = _problem()
    before = problems.quadratic({"a": params["a"]}, {"a": target["a"]})
    step = _plain_step(wrapped, target)
    after, _ = _train(step, params, wrapped.init(params), 8)
    assert problems.quadratic({"a": after["a"]}, {"a": target["a"]}) < before
    state = wrapped.init(params)
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    _, state = jax.jit(wrapped.update)(bad, state, params)
    if method not in STAGES and wrapper != "MultiSteps":
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


INJECTED = {
    "lorenza": (lorenza_optax.lorenza, {"rank": 4, "update_proj_gap": 2}),
    "lorenza_plus": (lorenza_optax.lorenza_plus, {"rank": 4, "update_proj_gap": 2}),
    "scale_by_lorenza": (lorenza_optax.scale_by_lorenza, {"rank": 4, "update_proj_gap": 2}),
    "adazo_sam": (lorenza_optax.adazo_sam, {}),
    "zo_sam_perturbation": (lorenza_optax.zo_sam_perturbation, {}),
    "asam": (lorenza_optax.methods.asam, {}),
}


@pytest.mark.parametrize("name", INJECTED)
@pytest.mark.parametrize(
    "dtype", [jnp.float32, problems.slow(jnp.bfloat16)], ids=["float32", "bfloat16"]
)
def test_inject_hyperparams(name, dtype):
    factory, kwargs = INJECTED[name]
    names = inspect.signature(factory).parameters
    static = [arg for arg in (*STRUCTURAL_ARGS, "add_back") if arg in names]
    schedules = {"rho": optax.linear_schedule(0.0, 0.1, 3)}
    schedules |= {k: v for k, v in (("mu", 1e-3), ("eta", 0.1)) if k in names}
    if "learning_rate" in names:
        schedules |= {"learning_rate": 1e-2, "weight_decay": optax.constant_schedule(0.1)}
    if "scale" in names:
        schedules["scale"] = 0.5
    plain = factory(
        **kwargs, **{k: (v if k != "weight_decay" else 0.1) for k, v in schedules.items()}
    )
    injected = optax.inject_hyperparams(factory, static_args=static)(**kwargs, **schedules)
    params, target = _problem(dtype)
    (one, _), (two, state_two) = (
        _train(_step(tx, target), params, tx.init(params), 4) for tx in (plain, injected)
    )
    tolerance = 1e-4 if dtype == jnp.float32 else 3e-2  # Optax casts what it injects to bfloat16
    chex.assert_trees_all_close(one, two, rtol=tolerance, atol=tolerance)
    assert bool(optax.tree.get(state_two, "perturbed"))
    assert set(state_two.hyperparams) == set(schedules)


@few_methods("adazo_sam")
@pytest.mark.parametrize(
    "axis_type", [problems.slow(AxisType.Auto), AxisType.Explicit], ids=["auto", "explicit"]
)
# test_meshes.py has LORENZA in every layout.
@pytest.mark.parametrize("spec", [problems.slow(P("x", None)), P("x", "y")], ids=str)
def test_meshes_give_the_numbers_of_one_device(method, axis_type, spec):
    tx, (params, target) = METHODS[method](), _problem()
    expected, expected_state = _train(_step(tx, target), params, tx.init(params), 3)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        place = lambda tree: {  # noqa: E731
            k: jax.device_put(v, NamedSharding(mesh, spec if v.ndim == 2 else P()))
            for k, v in tree.items()
        }
        params, target = place(params), place(target)
        state = tx.init(params)
        step = _step(tx, target)
        types = jax.tree.map(jax.typeof, state)
        for _ in range(3):
            params, state = step(params, state)
            if axis_type == AxisType.Explicit:
                assert jax.tree.map(jax.typeof, state) == types
        assert params["a"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    params, state = jax.device_get((params, state))
    chex.assert_trees_all_close(params, jax.device_get(expected), rtol=1e-3, atol=1e-3)
    perturbed = [optax.tree.get(s, "perturbed") for s in (state, expected_state)]
    assert perturbed == [True, True]


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(20)(jnp.tanh(linen.Dense(24)(x)))


@each_method
def test_linen_train_state(method):
    x = jax.random.normal(jax.random.key(0), (32, 12))
    y = jnp.sin(x @ jnp.ones((12, 20)))
    model = Net()
    variables = model.init(jax.random.key(1), x)
    state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=METHODS[method]()
    )

    def loss(params, x, y):
        return jnp.mean((model.apply({"params": params}, x) - y) ** 2)

    gradient = perturbed_value_and_grad(loss)

    @jax.jit
    def step(state):
        value, grads = gradient(state.params, x, y, opt_state=state.opt_state)
        return state.apply_gradients(grads=grads), value

    values = []
    for _ in range(12):
        state, value = step(state)
        values.append(value)
    assert values[-1] < values[1]


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(30, 12, rngs=rngs)
        self.hidden = nnx.Linear(12, 24, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(24, 24, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = jnp.tanh(self.hidden(self.embed(tokens)))
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        return x


@few_methods("lorenza", "adazo_sam")
def test_nnx_optimizer(method):
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, METHODS[method](), wrt=nnx.Param)
    tokens = jnp.arange(30)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return jnp.mean((nnx.merge(graphdef, params, rest)(tokens) - 0.5) ** 2)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.state(model, nnx.Param)  # ignored by the update
        optimizer.update(model, grads, value_fn=loss)
        return loss(nnx.state(model, nnx.Param))

    @nnx.jit
    def outer_step(model, optimizer):
        params = nnx.state(model, nnx.Param)
        value, grads = perturbed_value_and_grad(loss)(params, opt_state=optimizer.opt_state)
        optimizer.update(model, grads)
        return value

    structure = jax.tree.structure(nnx.as_pure(optimizer.opt_state))
    values = [step(model, optimizer) for _ in range(5)]
    assert bool(optax.tree.get(nnx.as_pure(optimizer.opt_state), "perturbed"))
    values += [outer_step(model, optimizer) for _ in range(5)]
    assert values[-1] < values[0]
    assert jax.tree.structure(nnx.as_pure(optimizer.opt_state)) == structure


@pytest.mark.parametrize("check_vma", [True, problems.slow(False)])
@pytest.mark.parametrize(
    "make",
    problems.few(
        ("lorenza", "lorenza-subspace", "zo_sam_perturbation", "sam", "asam"),
        ("lorenza", "lorenza-subspace", "zo_sam_perturbation"),
    ),
)
def test_shard_map_averages_over_the_named_axis(make, check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = problems.params(shapes={"a": (12, 20), "bias": (20,)})
    x = jax.random.normal(jax.random.key(0), (64, 12))

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["a"] + params["bias"]) ** 2)

    def train(tx, shard):
        def step(params, state, x):
            updates, state = tx.update(None, state, params, value_fn=loss, x=x)
            return optax.apply_updates(params, updates), state

        if shard:
            step = jax.shard_map(
                step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()),
                check_vma=check_vma,
            )  # fmt: skip
        p, state = params, tx.init(params)
        step = jax.jit(step)
        for _ in range(3):
            p, state = step(p, state, x)
        return p, optax.tree.get(state, "value")

    def build(**kwargs):  # plain gradient descent, which a wrong factor would show in
        if make.startswith("lorenza"):
            kwargs |= {"ascent": "subspace"} if make.endswith("subspace") else {}
            kwargs |= {"rank": 4, "base_optimizer": optax.identity()}
            return lorenza_optax.lorenza(1.0, **kwargs)
        factory = getattr(lorenza_optax, make, None) or getattr(lorenza_optax.methods, make)
        return optax.chain(factory(**kwargs), optax.sgd(1.0))

    whole = train(build(), False)
    sharded = train(build(axis_name="data"), True)
    chex.assert_trees_all_close(whole, sharded, rtol=1e-3, atol=1e-4)
