"""The shardings of an optimizer's state that go with those of the parameters."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorenza_optax
from lorenza_optax import WeightDimensionNumbers

# name -> (shape, dimension numbers, spec, specs of Q, R and moments)
LEAVES = {
    "wide": ((16, 32), WeightDimensionNumbers(), P("x", "y"), (P("x"), P(None, "y"), P(None, "y"))),
    "tall": ((32, 16), WeightDimensionNumbers(), P("x", "y"), (P("x"), P(None, "y"), P(None, "x"))),
    "rows": ((16, 32), WeightDimensionNumbers(), P(("x", "y")), (P(("x", "y")), P(), P())),
    "turned": (
        (32, 16), WeightDimensionNumbers(1, 0), P("x", "y"), (P("y"), P(None, "x"), P(None, "x"))
    ),
    "layers": (
        (2, 16, 24), WeightDimensionNumbers(1, 2), P("y", None, "x"),
        (P("y"), P("y", None, "x"), P("y", None, "x")),
    ),
    "heads": ((16, 4, 8), WeightDimensionNumbers(0, (1, 2)), P(None, "x", "y"),
              (P(), P(None, "x"), P(None, "x"))),
    # Neighbouring columns lie on different devices, which no sharding of all columns says.
    "widths": ((16, 4, 8), WeightDimensionNumbers(0, (1, 2)), P("y", None, "x"),
               (P("y"), P(), P())),
    "replicated": ((16, 32), WeightDimensionNumbers(), P(), (P(), P(), P())),
}  # fmt: skip
OTHERS = {"embedding": ((12, 16), P("x", "y")), "bias": ((16,), P("x")), "odd": ((6,), P("x"))}
SHAPES = {name: row[0] for name, row in (LEAVES | OTHERS).items()}
NUMBERS = {name: row[1] for name, row in LEAVES.items()} | dict.fromkeys(OTHERS)


def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def _given(mesh):
    specs = {name: row[2] for name, row in LEAVES.items()}
    specs |= {name: row[1] for name, row in OTHERS.items()}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def _abstract():
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}


def _specs(tree):
    return jax.tree.map(lambda sharding: sharding.spec, tree)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("refresh", ["gradient", "sketch"])
def test_factors_and_moments_follow_the_axes_of_their_leaf(kind, refresh):
    tx = lorenza_optax.lorenza(
        1e-2, rank=3, weight_dimension_numbers=NUMBERS, refresh=refresh, scale_probes=True
    )
    mesh = _mesh(kind)
    state = lorenza_optax.state_shardings(tx, _abstract(), _given(mesh))[0]
    assert all(sharding.mesh == mesh for sharding in jax.tree.leaves(state))
    for name, (_, _, _, expected) in LEAVES.items():
        trees = (state.q, state.r, state.projected.mu)
        assert tuple(tree[name].spec for tree in trees) == expected, name
        assert state.projected.nu[name] == state.projected.mu[name]
    assert state.singular_values["layers"].spec == P("y")
    mu = _specs(state.others.mu)
    assert mu == {"embedding": P("x", "y"), "bias": P("x"), "odd": P()}  # 6 is no multiple of 4
    assert state.count.spec == state.ascent.seed.spec == P()


def test_wherever_the_state_sits():
    tx = lorenza_optax.lorenza(1e-2, rank=3, weight_dimension_numbers=NUMBERS)
    mesh = _mesh()
    alone = lorenza_optax.state_shardings(tx, _abstract(), _given(mesh))
    among = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), tx), 2)
    state = lorenza_optax.state_shardings(
        among.gradient_transformation(), _abstract(), _given(mesh)
    )
    assert state.inner_opt_state[1] == alone
    assert _specs(state.acc_grads) | {"odd": P("x")} == _specs(_given(mesh))

    labels = {name: "low" if name in LEAVES else "full" for name in SHAPES}
    numbers = lambda params: {name: NUMBERS[name] for name in LEAVES}  # noqa: E731
    low = lorenza_optax.lorenza(1e-2, rank=3, weight_dimension_numbers=numbers)
    parts = optax.partition({"low": low, "full": optax.adafactor(1e-3, 4)}, labels)
    state = lorenza_optax.state_shardings(parts, _abstract(), _given(mesh)).inner_states
    assert state["low"].inner_state[0].q == alone[0].q
    sums = optax.tree.get(state["full"], "v_row")  # of each row, 12
    assert sums["embedding"].spec == P("x")


def test_jit_places_the_state_there_and_explicit_axes_by_themselves():
    tx = lorenza_optax.lorenza(1e-2, rank=3, weight_dimension_numbers=NUMBERS, refresh="sketch")
    shapes = {name: shape for name, shape in SHAPES.items() if name != "odd"}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = _mesh(kind)
        given = {name: sharding for name, sharding in _given(mesh).items() if name in shapes}
        ones = {name: jnp.ones(shape) for name, shape in shapes.items()}
        params = jax.device_put(ones, given)
        wanted = lorenza_optax.state_shardings(tx, params)
        with jax.set_mesh(mesh):
            if kind == AxisType.Auto:
                states = [jax.jit(tx.init, out_shardings=wanted)(params)]
            else:
                states = [jax.jit(tx.init)(params), tx.init(params)]
        for state in states:
            for leaf, sharding in zip(
                jax.tree.leaves(state[0]._replace(ascent=())),
                jax.tree.leaves(wanted[0]._replace(ascent=())),
                strict=True,
            ):
                own = leaf.sharding
                assert leaf.ndim == 0 or own.is_equivalent_to(sharding, leaf.ndim), (own, sharding)


def test_boxed_parameters():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            init = linen.with_partitioning(linen.initializers.ones, ("x", None))
            return linen.Dense(32, kernel_init=init)(x)

    tx, mesh = lorenza_optax.lorenza(1e-2, rank=3), _mesh()
    variables = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((2, 16)))
    shardings = linen.get_sharding(variables, mesh)
    state = lorenza_optax.state_shardings(tx, variables["params"], shardings["params"])[0]
    assert state.q["Dense_0/kernel"].spec == P("x")

    model = nnx.eval_shape(lambda: nnx.Linear(16, 32, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, P("y")), params)
    state = lorenza_optax.state_shardings(tx, params, shardings)[0]
    assert state.q["kernel"].spec == P("y")


def test_what_cannot_be_told_is_said():
    tx, params = lorenza_optax.lorenza(1e-2, rank=3), {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match="found a SingleDeviceSharding for 'a'. Pass param_sh"):
        lorenza_optax.state_shardings(tx, params)
    mesh = _mesh()
    with pytest.raises(ValueError, match="found nothing for 'b'"):
        lorenza_optax.state_shardings(tx, params, {"a": NamedSharding(mesh, P())})
    other = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    mixed = {"a": NamedSharding(mesh, P()), "b": NamedSharding(other, P())}
    with pytest.raises(ValueError, match=r"on one mesh, found 'a' on .*'b' on"):
        lorenza_optax.state_shardings(tx, params, mixed)
    one = lorenza_optax.state_shardings(tx, params, NamedSharding(mesh, P("x")))
    assert one[0].q["a"].spec == one[0].q["b"].spec == P("x")
