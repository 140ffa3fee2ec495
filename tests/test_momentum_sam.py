"""momentum_sam: SAM along the first moment in loops that only know gradients and updates."""

import functools

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorenza_optax
from lorenza_optax import methods, momentum_sam, momentum_sam_eval_params
from tests import problems

NUMBERS = problems.DIMENSION_NUMBERS
RHO = 0.1


def _lorenza(**kwargs):
    return lorenza_optax.lorenza(
        1e-2, 3, 4, weight_decay=0.1, weight_dimension_numbers=NUMBERS, **kwargs
    )


def _loop(tx, params, steps, dtype=np.float32, **numbers):
    """A trainer's loop: the losses it sees, and the unperturbed parameters after each step."""
    state, points = tx.init(params), []

    @jax.jit
    def step(params, state, batch):
        gradient = jax.grad(problems.loss)(params, batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    unperturbed = jax.jit(functools.partial(momentum_sam_eval_params, **numbers))
    for t in range(steps):
        params, state = step(params, state, problems.batch(t, dtype))
        points.append(unperturbed(state, params))
    return params, state, points


@pytest.mark.parametrize(
    "rho", [problems.slow(RHO), problems.slow(-RHO), optax.linear_schedule(0.0, 0.2, 5)]
)
def test_steps_are_those_of_lorenza_with_the_loss_in_its_hands(rho):
    """Over three refreshes; with weight decay, which must see the unperturbed parameters."""
    with jax.enable_x64(True):
        params = problems.params(dtype=np.float64)
        numbers = {"weight_dimension_numbers": NUMBERS}
        _, state, points = _loop(
            momentum_sam(_lorenza(), rho, **numbers), params, 10, np.float64, **numbers
        )
        tx = _lorenza(rho=rho, ascent="momentum", factored=False)
        expected_state = tx.init(params)

        @jax.jit
        def step(params, state, batch):
            updates, state = tx.update(None, state, params, value_fn=problems.loss, batch=batch)
            return optax.apply_updates(params, updates), state

        for t, point in enumerate(points):
            params, expected_state = step(params, expected_state, problems.batch(t, np.float64))
            chex.assert_trees_all_close(point, params, rtol=1e-6, atol=1e-7)
        assert int(state.base_optimizer_state[0].last_refresh) == 8
        assert bool(expected_state[0].ascent.perturbed)


def test_agrees_with_formulas_for_adam():
    """ε = ρ m / ‖m‖ in NumPy: the loop's parameters lie there, and gradients are taken there."""
    params, target = problems.params(), problems.params(seed=1)
    tx = momentum_sam(optax.adam(1e-2), RHO)
    held, state = params, tx.init(params)
    update, unperturbed = jax.jit(tx.update), jax.jit(momentum_sam_eval_params)
    theta = {k: np.asarray(p, np.float64) for k, p in params.items()}
    m = {k: np.zeros_like(p) for k, p in theta.items()}
    v = {k: np.zeros_like(p) for k, p in theta.items()}
    for t in range(1, 6):
        norm = np.sqrt(sum(np.sum(x * x) for x in m.values()))
        y = {k: theta[k] + (RHO * m[k] / norm if norm else 0) for k in theta}
        chex.assert_trees_all_close(held, jax.tree.map(np.float32, y), atol=1e-5)
        g = {k: y[k] - np.asarray(target[k], np.float64) for k in y}
        m = {k: 0.9 * m[k] + 0.1 * g[k] for k in m}
        v = {k: 0.999 * v[k] + 0.001 * g[k] ** 2 for k in v}
        for k in theta:
            step = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
            theta[k] = theta[k] - 1e-2 * step
        updates, state = update(problems.gradients(held, target), state, held)
        held = optax.apply_updates(held, updates)
        clean = unperturbed(state, held)
        chex.assert_trees_all_close(clean, jax.tree.map(np.float32, theta), atol=1e-5)


BASES = {
    "adamw": lambda: optax.adamw(1e-2),
    "clipped sgd": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9)
    ),
    "muon": lambda: optax.contrib.muon(1e-2),
    "partition": lambda: optax.partition(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, 0.9)},
        {k: "a" if k < "s" else "b" for k in problems.SHAPES},
    ),
    "lorenza": _lorenza,
    "lorenza_plus": lambda: lorenza_optax.lorenza_plus(1e-2, 3, weight_dimension_numbers=NUMBERS),
    "adazo_sam": lambda: lorenza_optax.adazo_sam(1e-2),
}


@pytest.mark.parametrize("base", problems.few(BASES, ("adamw", "clipped sgd", "lorenza")))
def test_any_optimizer_with_a_first_moment(base):
    numbers = {"weight_dimension_numbers": NUMBERS}
    params = problems.params()
    tx = momentum_sam(BASES[base](), RHO, **numbers)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), tx.init(params))
    held, state, points = _loop(tx, params, 5, **numbers)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    distance = optax.tree.norm(optax.tree.sub(held, points[-1]))
    np.testing.assert_allclose(distance, RHO, rtol=1e-4)
    batch = problems.batch(0)
    assert problems.loss(points[-1], batch) < problems.loss(params, batch)
    # Uphill, which is what a SAM step needs.
    assert problems.loss(held, problems.batch(5)) > problems.loss(points[-1], problems.batch(5))


@pytest.mark.slow
def test_somebody_elses_loops():
    """MultiSteps, apply_if_finite, inject_hyperparams, a linen TrainState; resumed from bytes."""
    params, target = problems.params(), problems.params(seed=1)
    inject = optax.inject_hyperparams(momentum_sam, static_args=("base_optimizer", "proj_type"))
    for wrap in (
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.chain(optax.clip_by_global_norm(10.0), tx),
        lambda _: inject(optax.adam(1e-2), rho=RHO),
    ):
        tx = wrap(momentum_sam(optax.adam(1e-2), RHO))
        train_state = TrainState.create(apply_fn=None, params=params, tx=tx)
        step = jax.jit(lambda s: s.apply_gradients(grads=problems.gradients(s.params, target)))
        for _ in range(6):
            train_state = step(train_state)
        data = flax.serialization.to_bytes(train_state)
        fresh = TrainState.create(apply_fn=None, params=params, tx=tx)
        train_state = flax.serialization.from_bytes(fresh, data)
        clean = momentum_sam_eval_params(train_state.opt_state, train_state.params)
        distance = optax.tree.norm(optax.tree.sub(train_state.params, clean))
        np.testing.assert_allclose(distance, RHO, rtol=1e-4)
        optax.tree.map_params(tx, lambda leaf: leaf, train_state.opt_state)


def test_a_gradient_that_is_not_finite_moves_nothing():
    numbers = {"weight_dimension_numbers": NUMBERS}
    tx = momentum_sam(
        lorenza_optax.lorenza(1e-2, 3, weight_dimension_numbers=NUMBERS), RHO, **numbers
    )
    held, state, _ = _loop(tx, problems.params(), 3, **numbers)
    bad = jax.tree.map(lambda p: p * jnp.nan, held)
    updates, state = jax.jit(tx.update)(bad, state, held)
    chex.assert_trees_all_close(updates, jax.tree.map(jnp.zeros_like, held), atol=1e-8)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_meshes_give_the_numbers_of_one_device(axis_type):
    shapes = {"a": (12, 20), "b": (24, 10), "bias": (20,)}
    target = problems.params(seed=1, shapes=shapes)
    tx = momentum_sam(lorenza_optax.lorenza(1e-2, 4, 2), RHO)

    @jax.jit
    def step(params, state, target):
        updates, state = tx.update(problems.gradients(params, target), state, params)
        return optax.apply_updates(params, updates), state

    def run(params, target):
        state = tx.init(params)
        for _ in range(4):
            params, state = step(params, state, target)
        return momentum_sam_eval_params(state, params)

    params = problems.params(shapes=shapes)
    expected = jax.device_get(run(params, target))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        place = lambda tree: {  # noqa: E731
            k: jax.device_put(v, NamedSharding(mesh, P("x", "y") if v.ndim == 2 else P()))
            for k, v in tree.items()
        }
        found = run(place(params), place(target))
    chex.assert_trees_all_close(jax.device_get(found), expected, rtol=1e-3, atol=1e-4)


def test_what_cannot_work_is_said():
    params = problems.params()
    with pytest.raises(TypeError, match="Call it: adamw"):
        momentum_sam(optax.adamw)
    with pytest.raises(ValueError, match="keeps no first moment"):
        momentum_sam(optax.sgd(1e-2)).init(params)
    with pytest.raises(ValueError, match=r"shape .* for leaf 'square'"):
        momentum_sam(optax.contrib.galore(1e-2, 3)).init({"square": params["square"]})
    with pytest.raises(ValueError, match="'attention' is bfloat16"):
        momentum_sam(optax.adam(1e-2)).init(problems.params(dtype=jnp.bfloat16))
    tx = momentum_sam(optax.adam(1e-2))
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="no value_fn"):
        tx.update(params, state, params, value_fn=problems.loss)
    with pytest.raises(ValueError, match="no state of momentum_sam"):
        momentum_sam_eval_params(optax.adam(1e-2).init(params), params)
    with pytest.raises(ValueError, match="weight_dimension_numbers"):
        momentum_sam(_lorenza()).init(params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (methods.cosmos, "keeps none in the subspace of 'w': use one that does, such as lorenza"),
        (methods.apollo, "draws its subspaces anew.*Use one that keeps its subspaces, such as"),
        (methods.flora, "draws its subspaces anew.*Use one that keeps its subspaces, such as"),
        (methods.gradnormlorp, r"shape \(8,\) for leaf 'w' of shape \(16, 8\).*methods.galore"),
        (
            functools.partial(lorenza_optax.lorenza, proj_type="reverse_std"),
            r"'w', whose shape is \(16, 8\), .* \(4, 8\) .* give momentum_sam .* the proj_type",
        ),
    ],
)
def test_moments_in_other_bases_are_not_overlooked(make, message):
    params = {"w": jnp.ones((16, 8)), "b": jnp.ones(8)}
    with pytest.raises(ValueError, match=message):
        momentum_sam(make(1e-2, rank=4), rho=0.05).init(params)
