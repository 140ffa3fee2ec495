"""Checkpoints in the middle of a refresh window and of an accumulation, on any mesh."""

import functools

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorenza_optax
from lorenza_optax import SubspaceGradients

SHAPES = {"a": (16, 24), "b": (24, 16), "bias": (16,)}
SHARED = {"rank": 3, "update_proj_gap": 3}
BEFORE, AFTER = 9, 7  # (micro-)batches


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"] - y) ** 2)


def _params():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    pairs = zip(keys, SHAPES.items(), strict=True)
    return {name: 0.5 * jax.random.normal(key, shape) for key, (name, shape) in pairs}


def _batch(number):
    x = jax.random.normal(jax.random.key(100 + number), (16, 16)) * jnp.logspace(0.5, -1, 16)
    return x, jnp.sin(3 * x[:, ::-1])


# Each way: (the optimizer, what is trained at first, one micro-batch, the last one of an update).


def _in_update():
    """A window only, its moments rounded stochastically: keys must go on where they were."""
    tx = lorenza_optax.lorenza(
        1e-2, rank=3, update_proj_gap=4, refresh="sketch", moment_dtype="bfloat16"
    )

    def step(train, x, y):
        params, state = train["params"], train["state"]
        updates, state = tx.update(None, state, params, value_fn=loss, x=x, y=y)
        return {"params": optax.apply_updates(params, updates), "state": state}

    return tx, lambda params: {"params": params, "state": tx.init(params)}, step, step


def _in_subspace():
    """The sum of gradients in the subspaces is a part of what is saved."""
    tx = lorenza_optax.lorenza(1e-2, **SHARED)
    value_and_grad = lorenza_optax.subspace_value_and_grad(loss, **SHARED)

    def init(params):
        state = tx.init(params)
        like = SubspaceGradients(state[0].projected.mu, state[0].others.mu)
        return {"params": params, "state": state, "sum": jax.tree.map(jnp.zeros_like, like)}

    def add(train, x, y):
        _, grads, state = value_and_grad(train["params"], x, y, opt_state=train["state"])
        return {**train, "state": state, "sum": jax.tree.map(jnp.add, train["sum"], grads)}

    def last(train, x, y):
        train = add(train, x, y)
        mean = jax.tree.map(lambda g: g / 2, train["sum"])
        updates, state = tx.update(mean, train["state"], train["params"])
        empty = jax.tree.map(jnp.zeros_like, mean)
        params = optax.apply_updates(train["params"], updates)
        return {"params": params, "state": state, "sum": empty}

    return tx, init, add, last


def _in_multi_steps():
    tx = optax.MultiSteps(lorenza_optax.lorenza(1e-2, **SHARED), 2).gradient_transformation()
    value_and_grad = lorenza_optax.perturbed_value_and_grad(loss)

    def step(train, x, y):
        params, state = train["params"], train["state"]
        _, grads = value_and_grad(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return {"params": optax.apply_updates(params, updates), "state": state}

    return tx, lambda params: {"params": params, "state": tx.init(params)}, step, step


WAYS = {"value_fn": _in_update, "subspace": _in_subspace, "MultiSteps": _in_multi_steps}


@functools.cache
def _program(way, devices):
    """(shapes with shardings of what is trained, its start, run(train, first, count))."""
    tx, init, add, last = WAYS[way]()
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    by_rows = NamedSharding(mesh, P("data"))
    params = jax.device_put(_params(), by_rows)
    shapes = jax.eval_shape(init, params)
    shardings = dict.fromkeys(shapes, by_rows)
    shardings["params"] = jax.tree.map(lambda _: by_rows, params)
    shardings["state"] = lorenza_optax.state_shardings(tx, params)
    if "sum" in shapes:  # gradients in the subspaces lie where their moments do
        state = shardings["state"][0]
        shardings["sum"] = SubspaceGradients(state.projected.mu, state.others.mu)
    programs = [jax.jit(one, out_shardings=shardings) for one in dict.fromkeys((add, last))]

    def run(train, first, count):
        for number in range(first, first + count):
            batch = jax.device_put(_batch(number), by_rows)
            train = programs[number % len(programs)](train, *batch)
        return train

    like = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings
    )
    return like, jax.jit(init, out_shardings=shardings)(params), run


@functools.cache
def _unbroken(way):
    """Before and after, on 8 devices."""
    _, start, run = _program(way, 8)
    half = run(start, 0, BEFORE)
    return half, jax.device_get(run(half, BEFORE, AFTER))


def _by_orbax(half, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "half", half)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "half", like)


def _by_flax(half, like, folder):
    del folder
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    stored = flax.serialization.from_bytes(zeros, flax.serialization.to_bytes(half))
    return jax.device_put(stored, jax.tree.map(lambda leaf: leaf.sharding, like))


LIBRARIES = {"orbax": _by_orbax, "flax": _by_flax}


@pytest.mark.parametrize(("way", "count", "last"), [
    pytest.param("value_fn", 9, 8, marks=pytest.mark.slow), ("subspace", 4, 3),
    pytest.param("MultiSteps", 4, 3, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_checkpoint_is_in_the_middle_of_everything(way, count, last):
    half, _ = _unbroken(way)
    state = half["state"]
    if way == "MultiSteps":
        assert int(state.mini_step) == 1
        state = state.inner_opt_state
    if way == "subspace":
        assert all(jnp.any(g != 0) for g in jax.tree.leaves(half["sum"]))
    assert (int(state[0].count), int(state[0].last_refresh)) == (count, last)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("way", WAYS)
def test_same_mesh_same_bits(way, library, tmp_path):
    half, expected = _unbroken(way)
    like, _, run = _program(way, 8)
    restored = LIBRARIES[library](half, like, tmp_path)
    chex.assert_trees_all_equal_structs(restored, half)
    chex.assert_trees_all_equal(jax.device_get(run(restored, BEFORE, AFTER)), expected)


@pytest.mark.parametrize(
    ("way", "devices", "library"), [("subspace", 4, "orbax"), ("MultiSteps", 1, "flax")]
)
def test_another_mesh_same_numbers(way, devices, library, tmp_path):
    half, expected = _unbroken(way)
    like, _, run = _program(way, devices)
    restored = LIBRARIES[library](half, like, tmp_path)
    assert len(restored["params"]["a"].sharding.device_set) == devices
    result = jax.device_get(run(restored, BEFORE, AFTER))
    chex.assert_trees_all_close(result["params"], expected["params"], atol=1e-5, rtol=1e-5)


def _made(shapes=SHAPES, **kwargs):
    """An optimizer, and parameters for it."""
    tx = lorenza_optax.lorenza(1e-2, **{**SHARED, **kwargs})
    return tx, {name: jnp.ones(shape) for name, shape in shapes.items()}


def _metadata(library, state, folder):
    """What a library says of a stored state without restoring it."""
    if library == "flax":
        return flax.serialization.msgpack_restore(flax.serialization.to_bytes({"s": state}))["s"]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "other", {"s": state})
        checkpointer.wait_until_finished()
        return checkpointer.metadata(folder / "other").item_metadata.tree["s"]


DIFFERENT = {
    "rank": ({"rank": 4}, "0/q/a: stored (16, 4), needed (16, 3)"),
    "proj_type": ({"proj_type": "reverse_std"}, "0/projected/mu/a: stored (3, 16), needed (3, 24)"),
    "rho": ({"rho": 0.0}, "0/r/a: stored nothing, needed (3, 24)"),
    "no moments": (
        {"base_optimizer": optax.scale_by_sign()},
        "0/projected/nu/b: stored nothing, needed (3, 24)",
    ),
    "tree": (
        {"shapes": {"a": (16, 24), "c": (24, 16), "bias": (16,)}},
        "0/projected/mu/c: stored (3, 24), needed nothing",
    ),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_stored_state_is_checked_before_it_is_restored(library, tmp_path):
    for name, (kwargs, difference) in DIFFERENT.items():
        tx, params = _made(**kwargs)
        stored = _metadata(library, tx.init(params), tmp_path / name)
        with pytest.raises(ValueError, match="Build the optimizer with the arg") as error:
            lorenza_optax.check_state(*_made(), stored)
        listed = str(error.value)
        assert difference in listed, (name, listed)
        lorenza_optax.check_state(tx, params, stored)
    wrapped = optax.MultiSteps(tx, 2).gradient_transformation()
    stored = _metadata(library, wrapped.init(params), tmp_path / "wrapped")
    lorenza_optax.check_state(wrapped, params, stored)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 4}, r"holds \(16, 4\) as factor q of leaf 'a'.*need \(16, 3\)"),
        ({"proj_type": "reverse_std"}, r"holds \(3, 16\) as 'projected/mu/a'.*need \(3, 24\)"),
    ],
)
def test_update_refuses_what_flax_restores_all_the_same(kwargs, message):
    other, params = _made(**kwargs)
    tx, _ = _made()
    data = flax.serialization.to_bytes(other.init(params))
    restored = flax.serialization.from_bytes(tx.init(params), data)
    with pytest.raises(ValueError, match=message):
        tx.update(params, restored, params)
    value_and_grad = lorenza_optax.subspace_value_and_grad(loss, **SHARED)
    with pytest.raises(ValueError, match=message):
        value_and_grad(params, *_batch(0), opt_state=restored)


@pytest.mark.parametrize("name", ["rho", "no moments", "tree"])
def test_a_state_with_other_arrays_is_refused_by_update_too(name):
    other, params = _made(**DIFFERENT[name][0])
    tx, own = _made()
    with pytest.raises(ValueError, match=r"The state holds .* (more arrays differ|need nothing)"):
        tx.update(own, other.init(params), own)


def test_a_state_without_its_structure_is_refused():
    tx, params = _made()
    plain = flax.serialization.to_state_dict(tx.init(params))
    with pytest.raises(TypeError, match="got a dict: restore a checkpoint into the structure"):
        tx.update(params, tuple(plain.values()), params)


def test_gradients_in_other_subspaces_are_refused():
    tx, params = _made()
    state = tx.init(params)
    sums = SubspaceGradients(state[0].projected.mu, state[0].others.mu)
    stored = flax.serialization.to_bytes(jax.tree.map(lambda g: g[:2], sums))
    restored = flax.serialization.from_bytes(sums, stored)
    with pytest.raises(ValueError, match=r"\(2, 24\) for leaf 'a'.*needs \(3, 24\).*same rank"):
        tx.update(restored, state, params)
