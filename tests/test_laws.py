"""Laws that hold whatever the numbers: full rank, transposition, stacking, linearity, skipping."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorenza_optax import (
    WeightDimensionNumbers,
    adazo_sam,
    lorenza,
    lorenza_plus,
    perturbed_value_and_grad,
    scale_by_lorenza,
    zo_sam_perturbation,
)
from tests import problems

SHAPES = {"a": (12, 20), "b": (24, 10), "bias": (20,)}
SIDES = ("std", "reverse_std", "left", "right")


def _gradients(count, shapes=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    return [
        {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
        for _ in range(count)
    ]


def _run(tx, gradients, params=None):
    params = jax.tree.map(jnp.zeros_like, gradients[0]) if params is None else params
    state, history = tx.init(params), []
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        history.append(updates)
    return history, state


def test_rank_at_least_the_dimensions_is_the_inner_optimizer():
    gradients = _gradients(5)
    with pytest.warns(UserWarning, match="No leaf is projected"):
        ours, _ = _run(lorenza(1e-2, rank=64, weight_decay=0.1), gradients)
    theirs, _ = _run(optax.adamw(1e-2, weight_decay=0.1), gradients)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6, atol=1e-9)  # of updates of 1e-2


@pytest.mark.parametrize("proj_type", problems.few(SIDES, ("std", "reverse_std")))
@pytest.mark.parametrize("moment_transport", problems.few(("keep", "reset", "rotate"), ("rotate",)))
def test_nearly_full_rank_with_a_linear_inner_optimizer_is_that_optimizer(
    proj_type, moment_transport
):
    """Gradients of rank 6 lie in a subspace of rank 8: nothing is lost."""
    rng = np.random.default_rng(0)
    left = {"a": rng.standard_normal((12, 6)), "b": rng.standard_normal((24, 6))}
    right = {"a": rng.standard_normal((6, 20)), "b": rng.standard_normal((6, 10))}
    gradients = [
        {k: jnp.asarray(left[k] * rng.standard_normal(6) @ right[k], jnp.float32) for k in left}
        for _ in range(7)
    ]
    # The momentum of an old basis means something in a new one only if it is rotated.
    inner = optax.trace(0.9) if moment_transport == "rotate" else optax.identity()
    tx = scale_by_lorenza(
        rank=8, update_proj_gap=3, base_optimizer=inner, proj_type=proj_type,
        moment_transport=moment_transport,
    )  # fmt: skip
    ours, state = _run(tx, gradients)
    theirs, _ = _run(inner, gradients)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(state.captured_energy, 1.0, rtol=1e-4)


def test_truncation_loses_what_is_outside_the_subspace():
    (gradient,) = _gradients(1)
    ours, state = _run(scale_by_lorenza(rank=4, base_optimizer=optax.identity()), [gradient])
    for name in ("a", "b"):
        q = state.q[name] if name == "a" else state.r[name].T
        g = gradient[name] if name == "a" else gradient[name].T
        update = ours[0][name] if name == "a" else ours[0][name].T
        np.testing.assert_allclose(update, q @ (q.T @ g), atol=1e-4)
    assert 0.2 < state.captured_energy < 0.95


def test_rotate_with_an_unchanged_subspace_changes_nothing():
    # In float64: Adam divides tiny entries by themselves, so round-off in C would show in them.
    with jax.enable_x64(True):
        one = jax.tree.map(lambda g: g.astype(jnp.float64), _gradients(1)[0])
        runs = [
            _run(
                scale_by_lorenza(rank=4, update_proj_gap=2, subspace="svd", moment_transport=kind),
                [one] * 5,
            )
            for kind in ("keep", "rotate")
        ]
    (kept, _), (rotated, state) = runs
    assert int(state.last_refresh) == 4
    chex.assert_trees_all_close(kept, rotated, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("moment_transport", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("inner", [None, optax.scale_by_adam()], ids=["known", "unknown"])
def test_steps_do_not_explode_at_a_refresh(moment_transport, inner):
    rng = np.random.default_rng(0)
    base = rng.standard_normal((24, 32))
    gradients = [
        {"a": jnp.asarray(base + 0.5 * rng.standard_normal((24, 32)), jnp.float32)}
        for _ in range(60)
    ]
    tx = scale_by_lorenza(
        rank=4, update_proj_gap=10, moment_transport=moment_transport, base_optimizer=inner
    )
    history, _ = _run(tx, gradients)
    sizes = [float(jnp.linalg.norm(updates["a"])) for updates in history]
    assert max(sizes) < 1.5 * sizes[0], sizes


def test_fira_does_not_scale_up_round_off():
    """Columns that the subspace does not hold at all have no scale to be recovered by."""
    rng = np.random.default_rng(0)
    block = np.zeros((12, 20))
    block[:4, :10], block[4:, 10:] = rng.standard_normal((4, 10)), 0.01
    gradients = [{"a": jnp.asarray(block, jnp.float32)}] * 3
    history, _ = _run(lorenza_plus(1.0, rank=4), gradients)
    assert max(float(jnp.abs(updates["a"]).max()) for updates in history) < 10


def test_x64_mode_with_float32_parameters():
    with jax.enable_x64(True):
        params = {"a": jnp.ones((8, 9), jnp.float32), "bias": jnp.ones(9, jnp.bfloat16)}
        target = jax.tree.map(jnp.zeros_like, params)
        schedule = optax.constant_schedule(jnp.asarray(0.05, jnp.float64))
        for tx in (
            lorenza(1e-2, rank=2, rho=schedule, mu=schedule, estimator="central"),
            adazo_sam(1e-2, rho=schedule, num_probes=2),
        ):
            state = tx.init(params)
            for _ in range(2):
                updates, new = tx.update(
                    None, state, params, value_fn=problems.quadratic, target=target
                )
                chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
                chex.assert_trees_all_equal_dtypes(updates, params)
                state = new
            assert bool(state[0].ascent.perturbed)


def test_reset_restarts_the_projected_state_only():
    gradients = _gradients(4)
    _, state = _run(
        scale_by_lorenza(rank=4, update_proj_gap=3, moment_transport="reset"), gradients
    )
    assert int(state.projected.count) == 1
    assert int(state.others.count) == 4


def test_transposition_of_a_leaf_transposes_its_update():
    gradients = _gradients(6)
    transposed = [{k: g.T for k, g in gradient.items()} for gradient in gradients]
    plain, _ = _run(lorenza(1e-2, rank=4, update_proj_gap=2, subspace="svd"), gradients)
    turned, _ = _run(lorenza(1e-2, rank=4, update_proj_gap=2, subspace="svd"), transposed)
    back = [{k: u.T for k, u in updates.items()} for updates in turned]
    chex.assert_trees_all_close(plain, back, rtol=1e-3, atol=1e-5)


def test_a_stack_is_as_good_as_its_layers():
    layers = _gradients(5, {f"layer{i}": (12, 20) for i in range(3)})
    stacks = [{"layers": jnp.stack(list(g.values()))} for g in layers]
    one_by_one, _ = _run(lorenza(1e-2, rank=4, update_proj_gap=2), layers)
    numbers = {"layers": WeightDimensionNumbers(1, 2)}
    at_once, _ = _run(
        lorenza(1e-2, rank=4, update_proj_gap=2, weight_dimension_numbers=numbers), stacks
    )
    for single, stacked in zip(one_by_one, at_once, strict=True):
        chex.assert_trees_all_close(
            jnp.stack(list(single.values())), stacked["layers"], rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("proj_type", ["std", problems.slow("reverse_std")])
def test_linear_in_the_gradient_between_refreshes(proj_type):
    tx = scale_by_lorenza(rank=4, base_optimizer=optax.trace(0.9), proj_type=proj_type)
    first, x, y = _gradients(3)
    _, state = _run(tx, [first])
    zero = jax.tree.map(jnp.zeros_like, x)
    update = lambda g: tx.update(g, state)[0]  # noqa: E731
    base = update(zero)
    combined = update(jax.tree.map(lambda a, b: 2 * a - 3 * b, x, y))
    expected = jax.tree.map(
        lambda o, a, b: o + 2 * (a - o) - 3 * (b - o), base, update(x), update(y)
    )
    chex.assert_trees_all_close(combined, expected, rtol=1e-4, atol=1e-4)


def test_scale_acts_on_projected_leaves_only():
    gradients = _gradients(3)
    one, _ = _run(scale_by_lorenza(rank=4), gradients)
    quarter, _ = _run(scale_by_lorenza(rank=4, scale=0.25), gradients)
    expected = [{k: u if k == "bias" else 0.25 * u for k, u in updates.items()} for updates in one]
    chex.assert_trees_all_close(quarter, expected, rtol=1e-6)
    scheduled, _ = _run(
        scale_by_lorenza(rank=4, scale=lambda count: jnp.where(count < 2, 1.0, 0.25)), gradients
    )
    chex.assert_trees_all_close(scheduled, one[:2] + expected[2:], rtol=1e-6)


def test_gradient_scale_does_not_matter_to_adam_inside():
    gradients = _gradients(5)
    plain, _ = _run(scale_by_lorenza(rank=4, update_proj_gap=2), gradients)
    small = [jax.tree.map(lambda g: 1e-3 * g, gradient) for gradient in gradients]
    scaled, _ = _run(scale_by_lorenza(rank=4, update_proj_gap=2, eps=1e-11), small)
    chex.assert_trees_all_close(plain, scaled, rtol=1e-2, atol=1e-4)


def test_adazo_sam_is_its_stage_with_adamw_behind():
    shapes = {"wide": (8, 14), "bias": (14,)}
    params, batch = problems.params(shapes=shapes), problems.batch(shapes=shapes)
    ascent = {"rho": 0.1, "num_probes": 2, "seed": 4}
    one = adazo_sam(1e-2, weight_decay=0.1, **ascent)
    two = optax.chain(zo_sam_perturbation(**ascent), optax.adamw(1e-2, weight_decay=0.1))

    @jax.jit
    def run(params):
        results = []
        for tx in (one, two):
            p, state = params, tx.init(params)
            for _ in range(3):
                updates, state = tx.update(None, state, p, value_fn=problems.loss, batch=batch)
                p = optax.apply_updates(p, updates)
            results.append(p)
        return results

    chex.assert_trees_all_close(*run(params), rtol=1e-5, atol=1e-6)


def test_lorenza_is_its_chain():
    gradients, params = _gradients(4), problems.params(shapes=SHAPES)
    whole, _ = _run(lorenza(1e-2, rank=4, weight_decay=0.1), gradients, params)
    parts = optax.chain(
        scale_by_lorenza(rank=4), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-2)
    )
    chex.assert_trees_all_equal(whole, _run(parts, gradients, params)[0])


@pytest.mark.parametrize("add_back", ["fira", "sumo"])
def test_lorenza_plus_moves_outside_the_subspace_too(add_back):
    gradients = _gradients(4)
    updates, state = _run(lorenza_plus(1.0, rank=4, add_back=add_back), gradients)
    inside, _ = _run(lorenza(1.0, rank=4), gradients)
    q = state[0].q["a"]
    outside = lambda u: u - q @ (q.T @ u)  # noqa: E731
    assert jnp.linalg.norm(outside(inside[-1]["a"])) < 1e-4
    assert jnp.linalg.norm(outside(updates[-1]["a"])) > 1e-1
    assert set(state[0].residual["norm"]) == {"a", "b"}


@pytest.mark.parametrize("make", [lorenza, lorenza_plus])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_an_unusable_gradient_skips_the_step(make, bad):
    gradients = _gradients(6)
    gradients[0]["bias"] = gradients[0]["bias"].at[3].set(bad)  # at a refresh
    gradients[3]["a"] = gradients[3]["a"].at[1, 1].set(bad)  # between refreshes
    tx = make(1e-2, rank=4, update_proj_gap=2)
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state, states = tx.init(params), []
    for t, gradient in enumerate(gradients):
        before = state
        updates, state = jax.jit(tx.update)(gradient, state, params)
        states.append(state)
        if t in (0, 3):
            chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
            for field in ("q", "r", "projected", "others", "residual"):
                chex.assert_trees_all_equal(getattr(state[0], field), getattr(before[0], field))
        else:
            assert jnp.linalg.norm(updates["a"]) > 0
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
    assert [int(s[0].count) for s in states] == [1, 2, 3, 4, 5, 6]
    assert [int(s[0].last_refresh) for s in states] == [-1, 1, 2, 2, 4, 4]
    assert int(state[0].skipped) == 2


def test_signs_are_kept_over_a_refresh():
    """A basis vector may come back negated; kept momentum must not turn round with it."""
    (gradient,) = _gradients(1)
    opposite = jax.tree.map(jnp.negative, gradient)
    tx = scale_by_lorenza(rank=4, update_proj_gap=1, subspace="svd")
    state, states = tx.init(gradient), []
    for g in (gradient, opposite, gradient):
        _, state = jax.jit(tx.update)(g, state)
        states.append(state)
    for later in states[1:]:  # "a" is projected by Q, "b" by R
        chex.assert_trees_all_close(states[0].q["a"], later.q["a"], atol=1e-4)
        chex.assert_trees_all_close(states[0].r["b"], later.r["b"], atol=1e-4)
    chex.assert_trees_all_close(states[0].r["a"], -states[1].r["a"], atol=1e-4)


def test_same_seed_same_bits_and_another_seed_others():
    shapes = {"wide": (8, 14), "bias": (14,)}
    params, batch = problems.params(shapes=shapes), problems.batch(shapes=shapes)

    def run(seed):
        tx = lorenza(1e-2, rank=3, seed=seed)
        p, state = params, tx.init(params)
        step = jax.jit(lambda p, s: tx.update(None, s, p, value_fn=problems.loss, batch=batch))
        for _ in range(3):
            updates, state = step(p, state)
            p = optax.apply_updates(p, updates)
        return p

    chex.assert_trees_all_equal(run(1), run(1))
    assert np.any(run(1)["wide"] != run(2)["wide"])


def test_a_leaf_draws_the_same_probes_whatever_its_neighbours():
    params = problems.params(shapes=SHAPES)
    points = []
    for names in (("a",), ("a", "b", "bias")):
        part = {k: params[k] for k in names}
        tx = scale_by_lorenza(rank=4)
        _, state = tx.update(part, tx.init(part))
        loss = lambda p: (jnp.sum(p["a"] ** 2), p)  # noqa: E731
        (_, point), _ = perturbed_value_and_grad(loss, has_aux=True)(part, opt_state=state)
        direction = point["a"] - part["a"]
        points.append(direction / jnp.linalg.norm(direction))
    chex.assert_trees_all_close(*points, atol=1e-3)
