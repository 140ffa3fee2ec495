"""On meshes: one device's numbers, state sharded as the parameters are, no gather of a weight."""

import functools
import math
import re
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorenza_optax
from lorenza_optax import WeightDimensionNumbers
from lorenza_optax._base.noise import Noise, plus_noise
from lorenza_optax._low_rank.update import LowRankUpdate
from lorenza_optax._plan.matrix_view import matrix_view
from tests import problems

SHAPES = {"in": (16, 24), "out": (24, 16), "layers": (2, 16, 16), "bias": (16,)}
NUMBERS = {
    "in": WeightDimensionNumbers(),
    "out": WeightDimensionNumbers(),
    "layers": WeightDimensionNumbers(1, 2),
    "bias": None,
}
# name -> (specs of the parameters, of the batch); the mesh is 4 "data" x 2 "model".
LAYOUTS = {
    "data-parallel": ({}, P(("data", "model"))),
    "fsdp": ({"in": P("data"), "out": P(None, "data"), "layers": P(None, "data")}, P("data")),
    "tensor-parallel": (
        {"in": P(None, "model"), "out": P("model"), "layers": P(None, None, "model")}, P()
    ),
    "both": (
        {"in": P("data", "model"), "out": P("model", "data"), "layers": P(None, "data", "model"),
         "bias": P("data")},
        P("data"),
    ),
}  # fmt: skip
SHARED = {"rank": 3, "update_proj_gap": 2, "weight_dimension_numbers": NUMBERS}  # 3 is no multiple


def _is_explicit():
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def _product(x, w):
    """x @ w; with Explicit axes as one says it there: of the weight "model" alone stays sharded."""
    if not _is_explicit():
        return x @ w
    rows, columns = ("model" if axis == "model" else None for axis in jax.typeof(w).sharding.spec)
    w = jax.sharding.reshard(w, P(rows, columns))
    batch = jax.typeof(x).sharding.spec[0]
    return jnp.einsum("bi,io->bo", x, w, out_sharding=P(batch, columns))


def loss(params, x, y):
    """Products, a scan over stacked layers, and a leaf that is not projected."""
    replicate = jax.sharding.reshard if _is_explicit() else lambda array, spec: array
    batch = jax.typeof(x).sharding.spec[0]

    def layer(h, w):
        return h + 0.3 * replicate(jnp.tanh(_product(h, w)), P(batch, None)), None

    h = _product(jnp.tanh(_product(x, params["in"])), params["out"])
    h, _ = jax.lax.scan(layer, h + replicate(params["bias"], P()), params["layers"])
    return jnp.mean((h - y) ** 2)


def _params(shapes=SHAPES):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: 0.5 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _batch(step, width=16):
    """Inputs whose directions differ in size, so that singular vectors are well determined."""
    x = jax.random.normal(jax.random.key(100 + step), (16, width)) * jnp.logspace(0.5, -1, width)
    return x, jnp.sin(3 * x[:, ::-1])


def _optimizer(**kwargs):
    return lorenza_optax.lorenza(1e-2, **SHARED, **kwargs)


def _train_step(tx, way, loss=loss, **kwargs):
    """way: how the gradient is asked for."""
    if way == "perturbed":
        outside = lorenza_optax.perturbed_value_and_grad(loss, weight_dimension_numbers=NUMBERS)
    elif way == "subspace":
        outside = lorenza_optax.subspace_value_and_grad(loss, **SHARED, **kwargs)

    def step(params, state, x, y):
        if way == "value_fn":
            updates, state = tx.update(None, state, params, value_fn=loss, x=x, y=y)
        else:
            _, gradient, *new = outside(params, x, y, opt_state=state)
            updates, state = tx.update(gradient, new[0] if new else state, params)
        return optax.apply_updates(params, updates), state

    return step


WAYS = {
    "value_fn": ("value_fn", {}),
    "value_fn-subspace-sketch": ("value_fn", {"ascent": "subspace", "refresh": "sketch"}),
    "value_fn-sketch-bfloat16": (
        "value_fn", {"refresh": "sketch", "factor_dtype": "bfloat16", "scale_probes": True}
    ),
    "value_fn-signed_momentum": ("value_fn", {"ascent": "signed_momentum", "stagger": True}),
    "perturbed": ("perturbed", {"moment_transport": "rotate"}),
    "subspace_value_and_grad": ("subspace", {}),
    "subspace_value_and_grad-sketch": ("subspace", {"refresh": "sketch", "ascent": "momentum"}),
}  # fmt: skip


@functools.cache
def _on_one_device(way):
    variant, kwargs = WAYS[way]
    tx = _optimizer(**kwargs)
    step = jax.jit(_train_step(tx, variant, **kwargs))
    params, state = _params(), tx.init(_params())
    for t in range(4):
        params, state = step(params, state, *_batch(t))
    return jax.device_get((params, state))


def _mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def _shardings(mesh, layout):
    specs, batch = LAYOUTS[layout]
    names = {name: NamedSharding(mesh, specs.get(name, P())) for name in SHAPES}
    return names, NamedSharding(mesh, batch)


def _cells():
    """Layouts, ways and kinds: those that add least to the rest are slow."""
    pairs = [(layout, "value_fn") for layout in LAYOUTS] + [("both", way) for way in WAYS]
    for layout, way in dict.fromkeys(pairs):
        for kind in (AxisType.Auto, AxisType.Explicit):
            auto = way == "value_fn" and layout != "both"
            explicit = way == "value_fn-subspace-sketch"
            usual = auto if kind == AxisType.Auto else explicit
            marks = () if usual else (pytest.mark.slow,)
            yield pytest.param(layout, way, kind, marks=marks, id=f"{layout}-{way}-{kind.name}")


@pytest.mark.parametrize(("layout", "way", "kind"), list(_cells()))
def test_one_devices_numbers_and_stable_shardings(layout, way, kind):
    variant, kwargs = WAYS[way]
    tx = _optimizer(**kwargs)
    mesh = _mesh(kind)
    shardings, of_batch = _shardings(mesh, layout)
    with jax.set_mesh(mesh):
        params = jax.device_put(_params(), shardings)
        for_state = lorenza_optax.state_shardings(tx, params)
        explicit = kind == AxisType.Explicit
        state = jax.jit(tx.init, out_shardings=None if explicit else for_state)(params)
        step = jax.jit(
            _train_step(tx, variant, **kwargs),
            out_shardings=None if explicit else (shardings, for_state),
        )
        batches = [jax.device_put(_batch(t), of_batch) for t in range(4)]
        compiled = step.lower(params, state, *batches[0]).compile()
        types = jax.tree.map(jax.typeof, (params, state))
        for batch in batches:
            # Refuses arrays of other types or shardings than those that it was compiled for.
            params, state = compiled(params, state, *batch)
            assert jax.tree.map(jax.typeof, (params, state)) == types
            found = jax.tree.map(lambda leaf: leaf.sharding, state)
            same = jax.tree.map(
                lambda leaf, a, b: a.is_equivalent_to(b, leaf.ndim), state, found, for_state
            )
            assert all(jax.tree.leaves(same)), (found, for_state)
    expected_params, expected_state = _on_one_device(way)
    # An entry of a factor close to the middle between two bfloat16 numbers may go either way.
    tolerance = 1e-4 if "factor_dtype" in kwargs else 1e-5
    chex.assert_trees_all_close(
        jax.device_get(params), expected_params, atol=tolerance, rtol=tolerance
    )
    scalars = [jax.device_get(lorenza_optax.diagnostics(s)) for s in (state, expected_state)]
    chex.assert_trees_all_close(*scalars, atol=1e-4, rtol=1e-3)


WIDE = {"in": (256, 384), "out": (384, 256), "layers": (2, 256, 256), "bias": (256,)}
LARGE = 20_000  # numbers: more than activations and sketches have, less than a part of a weight
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def _large_collectives(tx, step, layout):
    """What a compiled step moves between devices and is as large as a weight: a Counter."""
    mesh = _mesh(AxisType.Auto)
    shardings, of_batch = _shardings(mesh, layout)
    place = lambda shape, s: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s)  # noqa: E731
    params = {name: place(WIDE[name], shardings[name]) for name in WIDE}
    for_state = lorenza_optax.state_shardings(tx, params)
    state = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        jax.eval_shape(tx.init, params), for_state,
    )  # fmt: skip
    x = place((16, 256), of_batch)
    given = (params,) if step is _given else (x, x)
    step = functools.partial(step, tx) if step is _given else step
    lowered = jax.jit(step, out_shardings=(shardings, for_state)).lower(params, state, *given)
    found = Counter()
    for line in lowered.compile().as_text().splitlines():
        if match := COLLECTIVE.search(line):
            for shape in re.findall(r"\w+\[([\d,]+)\]", match[1]):
                if math.prod(map(int, shape.split(","))) >= LARGE:
                    found[match[2], shape] += 1
    return found


def _given(tx, params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def _of_adamw(layout):
    tx = optax.adamw(1e-3)

    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    return _large_collectives(tx, step, layout)


@pytest.mark.parametrize("layout", [pytest.param("fsdp", marks=pytest.mark.slow), "both"])
def test_a_refresh_from_a_sharded_gradient_gathers_nothing(layout):
    assert not _large_collectives(_optimizer(), _given, layout)
    assert not _large_collectives(_optimizer(stagger=True), _given, layout)
    # A whole decomposition has to: gathers are seen.
    assert _large_collectives(_optimizer(subspace="svd"), _given, layout)


@pytest.mark.parametrize(
    ("layout", "refresh", "way"),
    [
        ("both", "gradient", "value_fn"),
        problems.slow("both", "gradient", "subspace"),
        problems.slow("both", "sketch", "value_fn"),
        ("both", "sketch", "subspace"),
        problems.slow("data-parallel", "sketch", "value_fn"),
        ("tensor-parallel", "gradient", "value_fn"),
        problems.slow("tensor-parallel", "sketch", "subspace"),
    ],
)
def test_no_weight_or_gradient_is_gathered_but_by_adamw_too(layout, refresh, way):
    tx = _optimizer(refresh=refresh, rho=0.0)
    found = _large_collectives(tx, _train_step(tx, way, refresh=refresh, rho=0.0), layout)
    usual = _of_adamw(layout)
    # Each pass gathers the weights that it multiplies with, as AdamW's two do.
    assert set(found) <= set(usual), found - usual
    summed = Counter({key: count for key, count in found.items() if key[0] != "all-gather"})
    # One backward pass in a step sums a whole gradient, or with sketches none does.
    assert not summed - usual
    assert refresh == "gradient" or not summed
    assert bool(usual) == (layout != "tensor-parallel")  # or nothing was looked at


@pytest.mark.slow
def test_updates_in_place_gather_no_stack_of_experts(monkeypatch):
    """Each device has its own matrices, and the numbers are those of one that takes turns."""
    shape, keys = (8, 256, 256), jax.random.split(jax.random.key(0), 4)
    stack, left, right = (
        jax.random.normal(key, s)
        for key, s in zip(keys[1:], (shape, (8, 256, 9), (8, 9, 256)), strict=True)
    )
    view = matrix_view(shape, WeightDimensionNumbers(1, 2))

    def moved(stack, left, right, keys):
        update = LowRankUpdate(0.1, stack.dtype, view, left, right)
        return plus_noise(update.added_to(stack), Noise(keys, jnp.ones(1)))

    of_stack = NamedSharding(_mesh(AxisType.Auto), P(("data", "model")))
    arguments = (*jax.device_put((stack, left, right), of_stack), keys[:1])
    lowered = jax.jit(moved, out_shardings=of_stack, donate_argnums=0).lower(*arguments)
    compiled = lowered.compile()
    assert "all-gather" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < stack.nbytes / 8
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
    expected = jax.jit(moved)(stack, left, right, keys[:1])
    chex.assert_trees_all_close(compiled(*arguments), expected, rtol=1e-5, atol=1e-5)
