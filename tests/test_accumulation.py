"""Gradients of micro-batches, summed in the subspaces or by optax.MultiSteps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax import methods
from lorenza_optax._low_rank.compose import by_forward_passes

WIDTH, DEPTH, RANK, MICRO, ROWS = 64, 3, 8, 4, 16
SHARED = {"rank": RANK, "update_proj_gap": 100}


def _params(width=WIDTH):
    kernels = jax.random.normal(jax.random.key(0), (DEPTH, width, width)) / np.sqrt(width)
    return {
        f"layer_{i}": {"kernel": kernel, "bias": jnp.zeros(width)}
        for i, kernel in enumerate(kernels)
    }


def loss(params, x):
    y = x
    for i in range(DEPTH):
        layer = params[f"layer_{i}"]
        y = jnp.tanh(y @ layer["kernel"] + layer["bias"])
    return jnp.mean((y - jnp.sin(3 * x)) ** 2)


def _batch(step, width=WIDTH):
    return jax.random.normal(jax.random.key(100 + step), (MICRO, ROWS, width))


def _mean_in_subspaces(shared, params, state, micro_batches):
    """The mean gradient of micro-batches, of which none is held in full."""
    value_and_grad = lorenza_optax.subspace_value_and_grad(loss, **shared)
    plan = lorenza_optax.projection_plan(params, RANK)
    zeros = lorenza_optax.SubspaceGradients(
        {path: jnp.zeros(leaf.low_rank_shape) for path, leaf in plan.projected.items()},
        {path: jnp.zeros(leaf.shape) for path, leaf in plan.others.items()},
    )

    def add(carry, x):
        total, state = carry
        value, grads, state = value_and_grad(params, x, opt_state=state)
        return (jax.tree.map(jnp.add, total, grads), state), (value, state[0].last_refresh)

    (total, state), (values, refreshes) = jax.lax.scan(add, (zeros, state), micro_batches)
    return jax.tree.map(lambda g: g / len(micro_batches), total), state, values, refreshes


def _subspace_step(tx, shared, params, state, micro_batches):
    mean, state, values, refreshes = _mean_in_subspaces(shared, params, state, micro_batches)
    updates, state = tx.update(mean, state, params)
    return optax.apply_updates(params, updates), state, values, refreshes


def _mean_in_full(params, micro_batches):
    def add(total, x):
        return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), micro_batches)
    return jax.tree.map(lambda g: g / len(micro_batches), total)


@pytest.mark.parametrize("ascent", [{"rho": 0.0}, {"rho": 0.05, "ascent": "momentum"}], ids=str)
def test_micro_batches_equal_one_large_batch_while_the_subspace_stands(ascent):
    shared = SHARED | ascent
    tx = lorenza_optax.lorenza(1e-2, **shared)
    params = _params()
    state = tx.init(params)

    @jax.jit
    def large(params, state, x):
        updates, state = tx.update(None, state, params, value_fn=loss, x=x)
        return optax.apply_updates(params, updates), state

    params, state = large(params, state, _batch(0).reshape(-1, WIDTH))  # both begin from here
    one = two = params, state
    small = jax.jit(functools.partial(_subspace_step, tx, shared))
    for step in range(1, 5):
        one = large(*one, _batch(step).reshape(-1, WIDTH))
        *two, _, _ = small(*two, _batch(step))
    chex.assert_trees_all_close(one[0], two[0], atol=2e-5)
    assert int(two[1][0].count) == 5
    # Were the last micro-batch alone taken, or their sum, this would not hold.
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, one[0], params))
    assert moved > 0.5


@pytest.mark.parametrize("refresh", ["gradient", "sketch"])
def test_a_refresh_comes_at_the_start_of_an_accumulation_only(refresh):
    shared = {"rank": RANK, "update_proj_gap": 3, "refresh": refresh}
    tx = lorenza_optax.lorenza(1e-2, **shared)
    params = _params()
    state = tx.init(params)
    step = jax.jit(functools.partial(_subspace_step, tx, shared))
    found = []
    for t in range(8):
        params, state, _, refreshes = step(params, state, _batch(t))
        assert len(set(refreshes.tolist())) == 1, "the subspaces changed within an accumulation"
        found.append(int(refreshes[0]))
    warm_up = [0, 1, 2] if refresh == "sketch" else [0, 0, 0]
    assert found == [*warm_up, 3, 3, 3, 6, 6]


def test_each_micro_batch_finds_its_own_ascent_point():
    tx = lorenza_optax.lorenza(1e-2, rho=0.2, ascent="subspace", **SHARED)
    params = _params()
    state = tx.init(params)
    step = jax.jit(
        functools.partial(_subspace_step, tx, SHARED | {"rho": 0.2, "ascent": "subspace"})
    )
    _, state, _, _ = step(params, state, _batch(0))
    _, _, values, _ = step(params, state, _batch(1))
    unperturbed = jax.vmap(lambda x: loss(params, x))(_batch(1))
    assert np.all(values > unperturbed)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("vlorp", {"rank": 2, "granularity": 4}),
        ("projfactor", {"rank": 8, "subspace": "orthonormal", "moment_transport": "rotate"}),
    ],
)
def test_micro_batches_in_random_subspaces_equal_one_large_batch(method, arguments):
    """Also at a resampling: all micro-batches of an update go through one projector."""
    arguments = {"update_proj_gap": 2, **arguments}
    tx = getattr(methods, method)(1e-2, **arguments)
    scaled = getattr(methods, f"scale_by_{method}")(**arguments)
    value_and_grad = lorenza_optax.subspace_value_and_grad(loss, transformation=scaled)
    one = two = _params()
    state_one = state_two = tx.init(one)
    large = jax.jit(lambda *args, x: tx.update(None, *args, value_fn=loss, x=x))
    micro = jax.jit(lambda params, state, x: value_and_grad(params, x, opt_state=state))
    small = jax.jit(tx.update)
    for step in range(3):
        batch = _batch(step)[:3]
        updates, state_one = large(state_one, one, x=batch.reshape(-1, WIDTH))
        one = optax.apply_updates(one, updates)
        found = []
        for x in batch:
            _, grads, after = micro(two, state_two, x)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state_two)
            found.append(grads)
            state_two = after
        mean = jax.tree.map(lambda *g: sum(g) / 3, *found)
        updates, state_two = small(mean, state_two, two)
        two = optax.apply_updates(two, updates)
        chex.assert_trees_all_close(one, two, atol=2e-5)
    sizes = {g.size for g in mean.projected.values()}
    assert sizes == {arguments["rank"] * WIDTH * arguments.get("granularity", 1)}
    assert int(state_two[0].last_refresh) == 2
    assert optax.tree.norm(jax.tree.map(jnp.subtract, one, _params())) > 0.2


REFUSED = {
    "lorenza": (lorenza_optax.lorenza(1e-2), TypeError, "that part alone"),
    "adam": (optax.adam(1e-2), TypeError, "that part alone"),
    "fira": (methods.scale_by_fira(), ValueError, "MultiSteps"),
    "flora": (methods.scale_by_flora(), TypeError, "that part alone"),
    "zeroth order": (
        by_forward_passes(
            optax.identity(), mu=1e-3, num_probes=1, estimator="auto", probe_batch_size=None,
            axis_name=None,
        ),
        ValueError, "takes no gradients",
    ),
    "stage": (
        methods.scale_by_galore(gradient_transform=optax.clip(1.0)), ValueError,
        "gradient_transform",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_transformations_that_have_no_low_rank_gradients(name):
    transformation, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        lorenza_optax.subspace_value_and_grad(loss, transformation=transformation)


def test_a_transformation_and_arguments_are_too_much():
    scaled = lorenza_optax.scale_by_lorenza(rank=4)
    with pytest.raises(ValueError, match="leave out rank, seed here"):
        lorenza_optax.subspace_value_and_grad(loss, transformation=scaled, rank=4, seed=1)


def test_a_transformation_says_what_its_arguments_say():
    arguments = SHARED | {"rho": 0.0, "proj_type": "reverse_std", "seed": 3}
    tx = lorenza_optax.scale_by_lorenza(**arguments)
    state, found = tx.init(_params()), []
    for given in (arguments, {"transformation": tx}):
        value_and_grad = lorenza_optax.subspace_value_and_grad(loss, **given)
        step = jax.jit(lambda *args, state, f=value_and_grad: f(*args, opt_state=state))
        found.append(step(_params(), _batch(0)[0], state=state))
    chex.assert_trees_all_equal(*found)


def test_accumulators_have_the_size_of_the_subspaces():
    width, shared = 512, SHARED | {"rho": 0.0, "refresh": "sketch"}
    params = _params(width)
    state = lorenza_optax.lorenza(1e-2, **shared).init(params)

    def bytes_of(function, *args):
        memory = jax.jit(function).lower(*args).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    low = bytes_of(
        lambda *args: _mean_in_subspaces(shared, *args)[0], params, state, _batch(0, width)
    )
    full = bytes_of(_mean_in_full, params, _batch(0, width))
    weights = DEPTH * width * width * 4
    assert full > 1.3 * weights  # a mean, and gradients of one micro-batch that are added to it
    assert low < 0.5 * weights  # factors of rank 8, and what a refresh needs


def test_multi_steps_average_what_the_outer_gradient_gives():
    tx = lorenza_optax.lorenza(1e-2, **SHARED)
    multi = optax.MultiSteps(tx, MICRO).gradient_transformation()
    value_and_grad = lorenza_optax.perturbed_value_and_grad(loss, rho=0.1)
    params = _params()
    state, multi_state = tx.init(params), multi.init(params)

    @jax.jit
    def micro(params, state, x):
        value, grads = value_and_grad(params, x, opt_state=state)
        updates, state = multi.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def whole(params, state, batch):
        grads = jax.vmap(lambda x: value_and_grad(params, x, opt_state=state)[1])(batch)
        grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    one = two = params
    for t in range(3):
        one, state = whole(one, state, _batch(t))
        for x in _batch(t):
            held = two
            two, multi_state, value = micro(two, multi_state, x)
            assert (abs(value - loss(held, x)) > 1e-4) == (
                t > 0
            )  # perturbed, once there is a subspace
    chex.assert_trees_all_close(one, two, atol=5e-5)


@pytest.mark.parametrize("refresh", ["gradient", "sketch"])
def test_a_head_that_begins_at_zero_leaves_one_basis_to_a_sum(refresh):
    """It hides the gradient of what is below: the refresh stays due, but in the next update."""
    params = {"body": jax.random.normal(jax.random.key(0), (12, 16)), "head": jnp.zeros((16, 10))}
    batches = jax.random.normal(jax.random.key(1), (3, 20, 12))

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["body"]) @ params["head"] - x[:, :10]) ** 2)

    shared = {"rank": 3, "rho": 0.0, "refresh": refresh, "base_optimizer": optax.identity()}
    tx = lorenza_optax.scale_by_lorenza(**shared)
    value_and_grad = lorenza_optax.subspace_value_and_grad(loss, **shared)
    _, first, one = value_and_grad(params, batches[0], opt_state=tx.init(params))
    _, second, two = value_and_grad(params, batches[1], opt_state=one)
    chex.assert_trees_all_equal((one.q, one.r), (two.q, two.r))
    assert jnp.any(one.q["head"] if "head" in one.q else one.r["head"])
    updates, after = tx.update(jax.tree.map(jnp.add, first, second), two, params)
    whole = jax.tree.map(jnp.add, *(jax.grad(loss)(params, x)["head"] for x in batches[:2]))
    if refresh == "gradient":
        # The head has 10 columns and is compressed from the right.
        expected = whole @ one.r["head"].T @ one.r["head"]
        np.testing.assert_allclose(updates["head"], expected, atol=1e-6)
    params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))
    _, _, third = value_and_grad(params, batches[2], opt_state=after)
    assert int(one.last_refresh) < 0
    assert int(third.last_refresh) == 1
