"""On meshes: one device's numbers, state sharded as the parameters are, no gather of a weight."""

import functools
import math
import re
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorenza_optax
from lorenza_optax import WeightDimensionNumbers

SHAPES = {"in": (16, 24), "out": (24, 16), "layers": (2, 16, 20), "back": (20, 16), "bias": (16,)}
NUMBERS = {
    "in": WeightDimensionNumbers(),
    "out": WeightDimensionNumbers(),
    "layers": WeightDimensionNumbers(1, 2),
    "back": None,
    "bias": None,
}
# name -> (specs of the parameters, of the batch); the mesh is 4 "data" x 2 "model".
LAYOUTS = {
    "data-parallel": ({}, P(("data", "model"))),
    "fsdp": (
        {"in": P("data"), "out": P(None, "data"), "layers": P(None, "data"), "back": P("data")},
        P("data"),
    ),
    "tensor-parallel": (
        {"in": P(None, "model"), "out": P("model"), "layers": P(None, None, "model"),
         "back": P("model")},
        P(),
    ),
    "both": (
        {"in": P("data", "model"), "out": P("model", "data"), "layers": P(None, "data", "model"),
         "back": P("model", "data"), "bias": P("data")},
        P("data"),
    ),
}  # fmt: skip
SHARED = {"rank": 3, "update_proj_gap": 2, "weight_dimension_numbers": NUMBERS}  # 3 is no multiple
each_kind = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)


def _product(x, w):
    """x @ w; on a mesh with Explicit axes as one says it there: the weight whole but for "model"."""
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return x @ w
    rows, columns = ("model" if axis == "model" else None for axis in jax.typeof(w).sharding.spec)
    w = jax.sharding.reshard(w, P(rows, columns))
    batch = jax.typeof(x).sharding.spec[0]
    return jnp.einsum("bi,io->bo", x, w, out_sharding=P(batch, columns))


def loss(params, x, y):
    """Products, a scan over stacked layers, and a leaf that is not projected."""
    h = _product(jnp.tanh(_product(x, params["in"])), params["out"])
    bias = params["bias"]
    if jax.sharding.get_abstract_mesh().explicit_axes:
        bias = jax.sharding.reshard(bias, P())
    h, _ = jax.lax.scan(
        lambda h, layer: (h + 0.3 * _product(jnp.tanh(_product(h, layer)), params["back"]), None),
        h + bias,
        params["layers"],
    )
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


def _train_step(tx, variant, loss=loss, **kwargs):
    """variant: how the gradient is asked for."""
    outside = lorenza_optax.perturbed_value_and_grad(
        loss, weight_dimension_numbers=NUMBERS, ascent=kwargs.get("ascent", "zo")
    )
    low_rank = lorenza_optax.subspace_value_and_grad(loss, **SHARED, **kwargs)

    def step(params, state, x, y):
        if variant == "value_fn":
            updates, state = tx.update(None, state, params, value_fn=loss, x=x, y=y)
        elif variant == "perturbed":
            _, gradient = outside(params, x, y, opt_state=state)
            updates, state = tx.update(gradient, state, params)
        else:
            _, gradient, state = low_rank(params, x, y, opt_state=state)
            updates, state = tx.update(gradient, state, params)
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


@each_kind
@pytest.mark.parametrize(
    ("layout", "way"),
    [(layout, "value_fn") for layout in LAYOUTS] + [("both", way) for way in WAYS if way != "value_fn"],
)
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
    chex.assert_trees_all_close(jax.device_get(params), expected_params, atol=1e-5, rtol=1e-5)
    scalars = [jax.device_get(lorenza_optax.diagnostics(s)) for s in (state, expected_state)]
    chex.assert_trees_all_close(*scalars, atol=1e-4, rtol=1e-3)
