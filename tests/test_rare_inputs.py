"""What is rare but legal: gradients of zero, huge ones, leaves without entries, mixed dtypes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax import methods
from tests import problems

pytestmark = pytest.mark.usefixtures("compile_quickly")
STACK = {"weight_dimension_numbers": lorenza_optax.WeightDimensionNumbers(-2, -1)}
SHAPES = {"known": (16, 8), "stack": (3, 16, 8)}
REFRESHING = {
    "galore": lambda: methods.galore(1e-2, 4, update_proj_gap=6, **STACK),
    "staggered": lambda: lorenza_optax.lorenza(
        1e-2, 4, update_proj_gap=6, rho=0.0, stagger=True, **STACK
    ),
    "rotating": lambda: lorenza_optax.lorenza(
        1e-2, 4, update_proj_gap=6, rho=0.0, moment_transport="rotate", **STACK
    ),
    "lotus": lambda: methods.lotus(1e-2, 4, check_every=1, threshold=10.0, **STACK),
}


def _steps(tx, zero_at, steps=10):
    """The states after updates of which some have no gradient for the stack's second matrix."""
    params = problems.params(shapes=SHAPES)
    state, step, states = tx.init(params), jax.jit(tx.update), []
    for t in range(steps):
        gradients = problems.params(seed=t, shapes=SHAPES)
        if t in zero_at:
            gradients["stack"] = gradients["stack"].at[1].set(0)
        _, state = step(gradients, state, params)
        states.append(state[0])
    return states


def _projector(state):
    return np.asarray(state.r["stack"][1])


@pytest.mark.parametrize("name", REFRESHING)
def test_a_gradient_of_zero_takes_no_subspace_away(name):
    tx, turns = REFRESHING[name](), {6, 7, 8, 9}  # in which each matrix is refreshed
    states = _steps(tx, turns)
    for t in turns:
        np.testing.assert_array_equal(_projector(states[t]), _projector(states[5]))
    states = _steps(tx, set())
    assert np.any(_projector(states[9]) != _projector(states[5]))


@pytest.mark.parametrize("name", REFRESHING)
def test_the_first_subspace_waits_for_a_gradient(name):
    """As under a head that begins at zero; but not for a matrix that is never used."""
    dense = lambda state: np.count_nonzero(_projector(state)) == _projector(state).size  # noqa: E731
    states = _steps(REFRESHING[name](), {0, 1}, 4)
    assert [int(state.last_refresh) for state in states[:3]] == [-1, -1, 2]
    assert dense(states[2])
    states = _steps(REFRESHING[name](), set(range(10)), 4)
    assert [int(state.last_refresh) for state in states] == [-1, -1, -1, 3]
    assert np.linalg.matrix_rank(_projector(states[3])) == 4


def test_updates_that_were_skipped_are_not_the_first_ones():
    """Loss scaling begins with some: the first subspace still has its tries to come."""
    params = {"body": jnp.ones((8, 16)), "head": jnp.zeros((16, 12))}
    x = jax.random.normal(jax.random.key(0), (4, 8))

    def loss(params, scale):
        return scale * jnp.mean((jnp.sin(x @ params["body"]) @ params["head"] - 1) ** 2)

    refreshes = {}
    for refresh in ("gradient", "sketch"):
        tx = lorenza_optax.lorenza(1e-2, 4, update_proj_gap=100, rho=0.0, refresh=refresh)
        state, step = tx.init(params), jax.jit(functools.partial(tx.update, value_fn=loss))
        at, refreshes[refresh] = params, []
        for t in range(7):
            updates, state = step(None, state, at, scale=jnp.where(t < 3, jnp.inf, 1.0))
            at = optax.apply_updates(at, updates)
            refreshes[refresh].append(int(state[0].last_refresh))
        assert int(state[0].skipped) == 3
    assert refreshes == {"gradient": [-1, -1, -1, -1, 4, 4, 4],
                         "sketch": [-1, -1, -1, -1, 4, 5, 5]}  # fmt: skip


@pytest.mark.parametrize("name", ["galore", "gum", problems.slow("lotus"), problems.slow("cosmos")])
def test_leaves_of_one_shape_and_two_dtypes(name):
    params = {"a": jnp.ones((16, 8)), "b": jnp.ones((16, 8), jnp.bfloat16)}
    gradients = problems.params(shapes={"a": (16, 8), "b": (16, 8)})
    alone = {}
    tx = getattr(methods, name)(1e-2, rank=4)
    updates, _ = tx.update(gradients, tx.init(params), params)
    for path in params:
        one = {path: params[path]}
        alone |= tx.update({path: gradients[path]}, tx.init(one), one)[0]
    assert updates["b"].dtype == jnp.bfloat16
    if name != "gum":  # which draws among the matrices of a shape
        chex.assert_trees_all_close(updates, alone, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("size", [problems.slow(4e18), 1.2e19])
@pytest.mark.parametrize("name", ["vlorp", "projfactor"])
def test_nothing_that_overflows_is_kept(name, size):
    """Of G with a finite norm, P Pᵀ G with a random P may have none."""
    params = {"w": jnp.ones((256, 128))}
    of = {"vlorp": {"granularity": 1}, "projfactor": {"subspace": "gaussian"}}[name]
    tx = getattr(methods, name)(1e-2, rank=1, **of)
    good = problems.params(shapes={"w": (256, 128)})
    state = tx.init(params)
    for gradient in (good, {"w": jnp.zeros((256, 128)).at[3, 4].set(size)}, good):
        updates, state = tx.update(gradient, state, params)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state))
    assert jnp.all(updates["w"] != 0)


@pytest.mark.parametrize(
    "tx",
    [
        methods.mezo(1e-2),
        lorenza_optax.adazo_sam(1e-2),
        lorenza_optax.lorenza(1e-2, 4, ascent="subspace"),
        optax.chain(methods.sam(), optax.sgd(1e-2)),
    ],
    ids=["mezo", "adazo_sam", "lorenza", "sam"],
)
def test_leaves_without_entries(tx):
    params = {"kernel": jnp.ones((16, 8)), "empty": jnp.zeros((0, 3))}
    loss = lambda p: jnp.sum((p["kernel"] @ jnp.ones(8)) ** 2)  # noqa: E731
    updates, _ = tx.update(None, tx.init(params), params, value_fn=loss)
    assert jax.tree.map(jnp.shape, updates) == {"kernel": (16, 8), "empty": (0, 3)}
    assert jnp.any(updates["kernel"] != 0)


@pytest.mark.parametrize(
    "wrap",
    [lambda w: {"layers": [w, w]}, lambda w: [w, w], lambda w: {"w": w, "none": None}],
    ids=["dict of lists", "list", "None"],
)
def test_states_that_hold_trees_like_the_parameters(wrap):
    params = wrap(jnp.ones((16, 8)))
    tx = lorenza_optax.momentum_sam(optax.adam(1e-2), rho=0.05)
    updates, state = tx.update(params, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    clean = lorenza_optax.momentum_sam_eval_params(state, moved)
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, moved, clean))
    np.testing.assert_allclose(distance, 0.05, rtol=1e-4)

    tx = lorenza_optax.lorenza(1e-2, 4, gradient_transform=optax.ema(0.9))
    loss = lambda p: sum(jnp.sum(jnp.square(leaf @ jnp.eye(8))) for leaf in jax.tree.leaves(p))  # noqa: E731
    state = tx.init(params)
    _, gradients = lorenza_optax.perturbed_value_and_grad(loss)(params, opt_state=state)
    jax.tree.map(lambda g, p: np.testing.assert_allclose(g, 2 * p, rtol=0.1), gradients, params)
    assert int(lorenza_optax.diagnostics(state)["skipped_steps"]) == 0


WITH_A_LOSS = {
    "mezo": methods.mezo(1e-2),
    "adazo_sam": lorenza_optax.adazo_sam(1e-2),
    "lorenza": lorenza_optax.lorenza(1e-2, 4),
    "sam": optax.chain(methods.sam(), optax.sgd(1e-2)),
    "zo_sam": optax.chain(lorenza_optax.zo_sam_perturbation(), optax.sgd(1e-2)),
}


@pytest.mark.parametrize("name", WITH_A_LOSS)
def test_trees_without_leaves_and_numbers_that_are_no_arrays(name):
    tx = WITH_A_LOSS[name]
    updates, _ = tx.update(None, tx.init({}), {}, value_fn=lambda p: jnp.ones(()))
    assert updates == {}
    params = {"kernel": jnp.ones((16, 8)), "temperature": 0.5}
    loss = lambda p: p["temperature"] * jnp.mean(p["kernel"] @ jnp.arange(8.0))  # noqa: E731
    state = tx.init(params)
    updates, _ = tx.update(None, state, params, value_fn=loss)
    moved = optax.apply_updates(params, updates)
    assert loss(moved) < loss(params)
    assert moved["temperature"] != 0.5
    if name != "mezo":
        _, gradients = lorenza_optax.perturbed_value_and_grad(loss, rho=0.0)(
            params, opt_state=state
        )
        np.testing.assert_allclose(gradients["temperature"], 28, rtol=1e-5)


@pytest.mark.parametrize(  # stages tell of any loss
    "tx", [lorenza_optax.adazo_sam(1e-2), lorenza_optax.lorenza(1e-2, rank=2)]
)
def test_a_loss_that_is_not_finite_is_not_kept(tx):
    params = {"kernel": jnp.ones((16, 8))}
    state, loss = tx.init(params), lambda p, scale: scale * jnp.mean(p["kernel"] ** 2)
    for scale in (2.0, jnp.nan):
        _, state = tx.update(None, state, params, value_fn=loss, scale=scale)
    assert 2 <= optax.tree.get(state, "value") < 2.2
