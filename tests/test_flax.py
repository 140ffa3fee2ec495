"""Flax helpers: the plan of real modules, linen's TrainState, NNX's training step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lorenza_optax
from lorenza_optax import projection_plan, select_leaves
from lorenza_optax.flax import TrainState, nnx_train_step, weight_dimension_numbers
from tests import problems

WIDTH = 16


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        x = x + linen.MultiHeadDotProductAttention(num_heads=4)(linen.LayerNorm()(x))
        return x + linen.Dense(WIDTH)(x), None


class LinenNet(linen.Module):
    second: bool = True

    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(50, WIDTH)
        x = linen.Conv(WIDTH, kernel_size=(3,))(embed(tokens))
        block = linen.remat(LinenBlock)
        x, _ = linen.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                          length=3)(name="stack")(x, None)  # fmt: skip
        if self.second:
            x, _ = linen.scan(
                LinenBlock, variable_axes={"params": 1}, split_rngs={"params": True}, length=5
            )(name="second")(x, None)
        x = linen.Einsum((2, WIDTH, 10), "bte,hef->bthf")(x).reshape(*tokens.shape, 20)
        x = linen.DenseGeneral(WIDTH, axis=-1)(x)
        x = x @ self.param("own", linen.initializers.lecun_normal(), (WIDTH, WIDTH))
        return embed.attend(x)  # a tied head


@pytest.mark.parametrize(
    ("transposed", "shape", "numbers"),
    [(False, (3, 6, 4), ((0, 1), (2,))), (True, (3, 4, 6), ((0, 2), (1,)))],
)
def test_a_transposed_kernel_holds_its_output_before_its_input(transposed, shape, numbers):
    of_linen = linen.ConvTranspose(4, (3,), transpose_kernel=transposed)
    of_nnx = nnx.ConvTranspose(6, 4, (3,), transpose_kernel=transposed, rngs=nnx.Rngs(0))
    assert of_nnx.kernel.shape == shape
    expected = {"kernel": lorenza_optax.WeightDimensionNumbers(*numbers), "bias": None}
    assert weight_dimension_numbers(of_linen, jax.ShapeDtypeStruct((2, 5, 6), float)) == expected
    found = weight_dimension_numbers(of_nnx)
    assert (found["kernel"], found["bias"]) == (expected["kernel"], None)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.dense(x + self.attention(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return NnxBlock(rngs)

        self.embed = nnx.Embed(50, WIDTH, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, kernel_size=(3,), rngs=rngs)
        self.stack = stacked(rngs)
        self.einsum = nnx.Einsum("bte,hef->bthf", (2, WIDTH, 10), None, rngs=rngs)
        self.norm = nnx.LayerNorm(20, rngs=rngs)
        self.head = nnx.Linear(20, 50, rngs=rngs)


def _views(plan):
    return {path: (leaf.matrix.batch, leaf.matrix.m, leaf.matrix.n)
            for path, leaf in plan.projected.items()}  # fmt: skip


def test_a_linen_models_axes():
    tokens = jnp.zeros((2, 6), int)
    params = jax.eval_shape(LinenNet().init, jax.random.key(0), tokens)["params"]
    numbers = weight_dimension_numbers(LinenNet(), jax.ShapeDtypeStruct((2, 6), int))
    views = _views(projection_plan(params, 4, weight_dimension_numbers=numbers))
    expected = {
        "Conv_0/kernel": ((), 48, 16),
        "Einsum_0/kernel": ((), 16, 20),
        "DenseGeneral_0/kernel": ((), 20, 16),
        "own": ((), 16, 16),
    }
    for stack, length in (("stack", 3), ("second", 5)):
        expected[f"{stack}/Dense_0/kernel"] = ((length,), 16, 16)
        for name in ("query", "key", "value", "out"):
            path = f"{stack}/MultiHeadDotProductAttention_0/{name}/kernel"
            expected[path] = ((length,), 16, 16)
    assert views == expected
    # The stack of `second` lies on axis 1: (embed, layer, heads, head_dim).
    query = numbers["second/MultiHeadDotProductAttention_0/query/kernel"]
    assert query == lorenza_optax.WeightDimensionNumbers((0,), (2, 3))
    out = numbers["second/MultiHeadDotProductAttention_0/out/kernel"]
    assert out == lorenza_optax.WeightDimensionNumbers((0, 2), (3,))
    assert numbers["stack/LayerNorm_0/scale"] is None  # (3, 16), a matrix by its shape alone
    fewer = select_leaves(exclude="stack|second", weight_dimension_numbers=numbers)
    assert len(projection_plan(params, 4, weight_dimension_numbers=fewer).projected) == 4


class LinenSwitch(linen.Module):
    @linen.compact
    def __call__(self, inputs, train):
        assert train is inputs["train"] is False
        return linen.Dropout(0.5, deterministic=not train)(linen.Dense(WIDTH)(inputs["x"]))


def test_what_a_linen_model_asks_in_python_is_not_traced():
    inputs = {"x": jax.ShapeDtypeStruct((2, 6), float), "train": False}
    numbers = weight_dimension_numbers(LinenSwitch(), inputs, False)
    assert numbers["Dense_0/kernel"] == lorenza_optax.WeightDimensionNumbers((0,), (1,))
    assert weight_dimension_numbers(LinenSwitch(), inputs=inputs, train=False) == numbers


def test_an_nnx_models_axes():
    model = NnxNet(nnx.Rngs(0))
    numbers = weight_dimension_numbers(model)
    params = nnx.state(model, nnx.Param)
    views = _views(projection_plan(params, 4, weight_dimension_numbers=numbers))
    expected = {
        "conv/kernel": ((), 48, 16),
        "einsum/kernel": ((), 16, 20),
        "head/kernel": ((), 20, 50),
        "stack/dense/kernel": ((3,), 16, 16),
    }
    for name in ("query", "key", "value", "out"):
        expected[f"stack/attention/{name}/kernel"] = ((3,), 16, 16)
    assert views == expected
    with pytest.raises(TypeError, match="linen or NNX module, got dict"):
        weight_dimension_numbers({})


def test_a_scanned_linen_model_trains_in_its_subspaces():
    tokens = jax.random.randint(jax.random.key(0), (4, 6), 0, 50)
    model = LinenNet(second=False)
    params = model.init(jax.random.key(1), tokens)["params"]
    arguments = {"rank": 4, "weight_dimension_numbers": weight_dimension_numbers(model, tokens)}
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=lorenza_optax.lorenza(1e-2, **arguments)
    )

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, tokens):
        return state.apply_gradients(value_fn=loss, tokens=tokens)

    before = loss(params, tokens)
    for _ in range(6):
        state = step(state, tokens)
    assert loss(state.params, tokens) < before - 0.1
    assert int(state.step) == 6
    assert bool(lorenza_optax.diagnostics(state.opt_state)["perturbed"])


class Statistics(TrainState):
    batch_stats: dict


def test_train_state_replaces_its_fields_and_hands_on_the_rest():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return jax.tree.map(jnp.ones_like, params), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = {"kernel": jnp.zeros((2, 3))}
    state = Statistics.create(apply_fn=None, params=params, tx=tx, batch_stats={"mean": 0.0})
    new = state.apply_gradients(value_fn=len, weight=3.0, batch_stats={"mean": 1.0})
    assert seen == {"value_fn": len, "weight": 3.0}
    assert new.batch_stats == {"mean": 1.0}
    chex.assert_trees_all_equal(new.params, {"kernel": jnp.ones((2, 3))})
    seen.clear()
    assert int(new.apply_gradients(grads=params).step) == 2
    assert seen == {}


def test_train_state_takes_low_rank_gradients():
    params = {"kernel": jnp.ones((16, 8))}
    loss = lambda params: jnp.sum(params["kernel"] ** 2)  # noqa: E731
    tx = lorenza_optax.lorenza(1e-2, rank=4)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    value_and_grad = lorenza_optax.subspace_value_and_grad(loss, rank=4)
    _, grads, opt_state = value_and_grad(params, opt_state=state.opt_state)
    state = state.replace(opt_state=opt_state).apply_gradients(grads=grads)
    assert loss(state.params) < loss(params)


class Noisy(nnx.Module):
    """BatchNorm and dropout: what the model keeps beside its parameters."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(WIDTH, 24, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(24, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.outer = nnx.Linear(24, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.dropout(jnp.tanh(self.norm(self.inner(x)))))


ASCENT = {"rho": 0.05, "estimator": "central", "mu": 1e-2, "num_probes": 2}
SHAPES = {"rank": 4, "update_proj_gap": 3}
GRADIENTS = {"update": {}, "perturbed": ASCENT, "subspace": ASCENT | SHAPES}


def _noisy(gradient, has_aux=False):
    model = Noisy(nnx.Rngs(0))
    tx = lorenza_optax.lorenza(1e-2, **SHAPES, **ASCENT)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model, x):
        predicted = model(x)
        value = jnp.mean((predicted - x) ** 2)
        return (value, predicted) if has_aux else value

    step = nnx_train_step(loss, gradient=gradient, has_aux=has_aux, **GRADIENTS[gradient])
    return model, optimizer, nnx.jit(step)


@pytest.mark.parametrize("gradient", problems.few(GRADIENTS, ("perturbed",)))
def test_nnx_state_beside_parameters_changes_once_a_step(gradient):
    model, optimizer, step = _noisy(gradient)
    before = model.inner.kernel[...]
    x = jax.random.normal(jax.random.key(1), (32, WIDTH))
    step(model, optimizer, x)
    # One update of the running mean, from 0, of the first batch at (or within rho of) θ.
    mean = 0.5 * jnp.mean(x @ before, axis=0)
    np.testing.assert_allclose(model.norm.mean[...], mean, atol=0.02)
    assert np.linalg.norm(model.norm.mean[...]) > 0.1
    assert int(model.dropout.rngs.count[...]) == 1
    for _ in range(4):
        step(model, optimizer, x)
    assert int(model.dropout.rngs.count[...]) == 5
    assert int(optimizer.step[...]) == 5
    scalars = lorenza_optax.diagnostics(optimizer.opt_state)
    assert int(scalars["steps_since_refresh"]) == 1
    assert bool(scalars["perturbed"]) == (gradient == "update")


def test_nnx_ways_to_the_gradient_agree():
    x = jax.random.normal(jax.random.key(1), (32, WIDTH))
    results = {}
    for gradient in GRADIENTS:
        model, optimizer, step = _noisy(gradient)
        values = [float(step(model, optimizer, x)) for _ in range(3)]  # one refresh, at the first
        results[gradient] = values, nnx.as_pure(nnx.state(model, nnx.Param))
    # Dropout masks are equal at all points of a step: with other masks on the two sides of a
    # difference the ascent would be noise, and another one for each way.
    values = np.asarray([found[0] for found in results.values()])
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)
    chex.assert_trees_all_close(results["update"][1], results["perturbed"][1], atol=1e-4)
    np.testing.assert_allclose(values[0], values[2], rtol=0.1)  # refreshes at another point


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_nnx_aux(gradient):
    model, optimizer, step = _noisy(gradient, has_aux=True)
    value, predicted = step(model, optimizer, jnp.ones((8, WIDTH)))
    assert value.shape == ()
    assert predicted.shape == (8, WIDTH)


def test_nnx_arguments():
    with pytest.raises(TypeError, match=r"'update' takes no arguments of the ascent.*rho"):
        nnx_train_step(lambda model: 0.0, rho=0.1)
    with pytest.raises(ValueError, match="gradient must be one of"):
        nnx_train_step(lambda model: 0.0, gradient="outside")
    for gradient in GRADIENTS:
        model, optimizer, _ = _noisy(gradient)
        step = nnx_train_step(lambda model: (0.0, 1), gradient=gradient, **GRADIENTS[gradient])
        with pytest.raises(TypeError, match="got a tuple: pass has_aux=True"):
            step(model, optimizer)


def _annotated(opt_state):
    """Paths of the arrays that carry a sharding of a parameter."""
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    found = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_variable)
    return [path for path, v in found if v.get_metadata().get("out_sharding") is not None]


def test_an_nnx_parameters_sharding_is_not_copied_onto_low_rank_arrays():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", None))
    with jax.set_mesh(mesh):
        model = nnx.Linear(16, 8, kernel_init=init, rngs=nnx.Rngs(0))
        adam = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        assert _annotated(adam.opt_state)  # so Flax does copy it
        optimizer = nnx.Optimizer(model, lorenza_optax.lorenza(1e-2, rank=4), wrt=nnx.Param)
        assert not _annotated(optimizer.opt_state)
        step = nnx.jit(nnx_train_step(lambda model, x: jnp.mean(model(x) ** 2)))
        values = [float(step(model, optimizer, jnp.ones((8, 16)))) for _ in range(3)]
    assert values[-1] < values[0]
    assert model.kernel[...].sharding.spec[0] == "data"


def test_a_linen_parameters_box_is_not_copied_either():
    init = linen.with_partitioning(linen.initializers.lecun_normal(), ("data", None))
    model, x = linen.Dense(8, kernel_init=init), jnp.ones((8, 16))
    boxed = model.init(jax.random.key(0), x)["params"]
    assert isinstance(boxed["kernel"], linen.Partitioned)
    tx = lorenza_optax.lorenza(1e-2, rank=4)
    state = tx.init(boxed)
    is_box = lambda node: isinstance(node, linen.Partitioned)  # noqa: E731
    assert not any(map(is_box, jax.tree.leaves(state, is_leaf=is_box)))
    chex.assert_trees_all_equal_structs(state, tx.init(linen.unbox(boxed)))
    loss = lambda params: jnp.mean(model.apply({"params": params}, x) ** 2)  # noqa: E731
    train_state = TrainState.create(apply_fn=None, params=boxed, tx=tx)
    new = train_state.apply_gradients(value_fn=loss).apply_gradients(value_fn=loss)
    assert isinstance(new.params["kernel"], linen.Partitioned)
    assert loss(new.params) < loss(boxed)


def test_a_loss_that_is_not_finite_is_seen():
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lorenza_optax.lorenza(1e-2, rank=4), wrt=nnx.Param)
    step = nnx.jit(nnx_train_step(lambda model, x: jnp.mean(model(x) ** 2)))
    losses = [step(model, optimizer, factor * jnp.ones((2, 16))) for factor in (1, jnp.nan, 1)]
    assert [bool(jnp.isfinite(loss)) for loss in losses] == [True, False, True]
