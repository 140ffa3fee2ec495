"""Tests that would catch a silent "no SAM": the perturbation is read back from a quadratic.

The gradient of ½‖θ - target‖² at θ + ε minus that at θ is ε itself.
"""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax import perturbed_value_and_grad
from lorenza_optax._ascent.ascent import normalized
from lorenza_optax._factored.landscape import Displacement, Subspaces
from tests import problems

SHAPES = {"a": (12, 20), "b": (24, 10), "bias": (20,)}
RHO = 0.05


def _setup(dtype=jnp.float32, weight_size=1.0, **kwargs):
    """A transformation with a subspace, found at the first update."""
    params = problems.params(shapes=SHAPES)
    params = jax.tree.map(lambda p: (weight_size * p).astype(dtype), params)
    target = problems.params(seed=1, shapes=SHAPES)
    kwargs = {"rank": 4, "rho": RHO, **kwargs}
    tx = lorenza_optax.scale_by_lorenza(**kwargs)
    _, state = jax.jit(tx.update)(problems.gradients(params, target), tx.init(params), params)
    return tx, params, target, state


def _epsilon(params, target, state, **kwargs):
    """ε: the gradient's difference, and equal to it the point that the loss was evaluated at."""

    def loss(point):
        return problems.quadratic(point, target), point

    gradient = perturbed_value_and_grad(loss, estimator="jvp", has_aux=True, **kwargs)
    (_, point), grads = jax.jit(lambda p: gradient(p, opt_state=state))(params)
    chex.assert_trees_all_equal_dtypes(grads, params)
    epsilon = {
        k: np.asarray(point[k], np.float64) - np.asarray(params[k], np.float64) for k in point
    }
    # Gradients have the parameters' dtype: in bfloat16 they show ε to 2^-8 of their own size.
    rtol = 1e-5 if params["a"].dtype == jnp.float32 else 2.0**-8
    read_back = jax.tree.map(
        lambda g, p, t: np.asarray(g, np.float64) - (p - t), grads, params, target
    )
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    chex.assert_trees_all_close(read_back, epsilon, atol=rtol * largest)
    return epsilon


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weight_size", [1.0, 10.0])
def test_norm_sign_and_span_of_the_perturbation(dtype, weight_size):
    # At weights of 3, a bfloat16 step is 0.0156 and most of ε would be rounded away.
    _, params, target, state = _setup(dtype, weight_size)
    epsilon = _epsilon(params, target, state, rho=RHO)
    norm = np.sqrt(sum(np.sum(e**2) for e in epsilon.values()))
    np.testing.assert_allclose(norm, RHO, rtol=1e-3 if dtype == jnp.float32 else 2e-3)
    assert np.all(epsilon["bias"] == 0), "leaves without a subspace are not perturbed"
    slope = 0.0
    for name in ("a", "b"):
        q, r = np.asarray(state.q[name], np.float64), np.asarray(state.r[name], np.float64)
        inside = q @ np.linalg.lstsq(q, epsilon[name], rcond=None)[0]
        np.testing.assert_allclose(inside, epsilon[name], atol=2e-6)
        inside = np.linalg.lstsq(r.T, epsilon[name].T, rcond=None)[0].T @ r
        np.testing.assert_allclose(inside, epsilon[name], atol=2e-6)
        # ε = Q diag(u) R: in the basis of the factors it is diagonal.
        core = np.linalg.pinv(q) @ epsilon[name] @ np.linalg.pinv(r)
        assert np.abs(core - np.diag(np.diag(core))).max() < 1e-2 * np.abs(core).max()
        gradient = np.asarray(params[name], np.float64) - np.asarray(target[name])
        slope += np.sum(gradient * epsilon[name])
    assert slope > 0, "positive rho ascends"
    negative = _epsilon(params, target, state, rho=-RHO)
    chex.assert_trees_all_close(negative, jax.tree.map(np.negative, epsilon), atol=2e-6)


@pytest.mark.parametrize("make", ["zo_sam_perturbation", "adazo_sam"])
def test_full_space_perturbation(make):
    params, target = problems.params(shapes=SHAPES), problems.params(seed=1, shapes=SHAPES)
    tx = (
        lorenza_optax.zo_sam_perturbation()
        if make != "adazo_sam"
        else lorenza_optax.adazo_sam(1e-3)
    )
    epsilon = _epsilon(params, target, tx.init(params), rho=RHO)
    norm = np.sqrt(sum(np.sum(e**2) for e in epsilon.values()))
    np.testing.assert_allclose(norm, RHO, rtol=1e-4)
    assert all(np.all(e != 0) for e in epsilon.values())
    slope = sum(np.sum((np.asarray(params[k]) - target[k]) * epsilon[k]) for k in params)
    assert slope > 0


def test_perturbation_raises_the_loss_and_the_value_says_so():
    tx, params, target, state = _setup()
    _, state = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
    assert bool(state.ascent.perturbed)
    assert state.ascent.ascent_norm > 0
    assert state.ascent.value > problems.quadratic(params, target)
    _, plain = tx.update(params, state, params)
    assert not bool(plain.ascent.perturbed)


def test_more_probes_find_more_of_the_ascent():
    _, params, target, state = _setup(rank=8)
    rises = []
    for num_probes in (1, 16, 256):
        value_and_grad = perturbed_value_and_grad(problems.quadratic, num_probes=num_probes)
        perturbed = jax.jit(
            lambda count, f=value_and_grad: f(
                params, target, opt_state=state._replace(count=count)
            )[0]
        )
        rise = [perturbed(count) - problems.quadratic(params, target) for count in range(1, 9)]
        rises.append(np.mean(rise))
    assert 0 < rises[0] < rises[1] < rises[2]


@pytest.mark.parametrize("estimator", ["central", "forward", "jvp", "auto"])
@pytest.mark.parametrize("probe_batch_size", [problems.slow(None), 2, problems.slow(3)])
def test_estimators_and_batches_agree(estimator, probe_batch_size):
    _, params, target, state = _setup()

    def gradient(**kwargs):
        return jax.jit(
            lambda p: perturbed_value_and_grad(problems.quadratic, num_probes=5, **kwargs)(
                p, target, opt_state=state
            )
        )(params)

    exact = gradient(estimator="jvp")
    estimated = gradient(estimator=estimator, probe_batch_size=probe_batch_size, mu=1e-3)
    chex.assert_trees_all_close(estimated, exact, rtol=2e-3, atol=2e-4)


def test_bfloat16_slope_is_exact():
    """The toy of the design: with bfloat16 weights a difference of losses is mostly noise."""
    tx, params, target, state = _setup(jnp.bfloat16, 10.0, estimator="jvp")
    _, new = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    _, expected = tx.update(None, state, wide, value_fn=problems.quadratic, target=target)
    np.testing.assert_allclose(new.ascent.ascent_norm, expected.ascent.ascent_norm, rtol=1e-5)


def test_auto_falls_back_once_and_says_so():
    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))

    def loss(params, target):
        del target
        return sum(jnp.sum(square(p)) for p in jax.tree.leaves(params))

    _, params, target, state = _setup()
    with pytest.warns(UserWarning, match="estimator='central'") as caught:
        jax.jit(
            lambda p: perturbed_value_and_grad(loss, factored=False)(p, target, opt_state=state)
        )(params)  # fmt: skip
    assert len([w for w in caught if "forward mode" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perturbed_value_and_grad(loss, estimator="central", factored=False)(
            params, target, opt_state=state
        )
    with pytest.raises(TypeError, match="custom_vjp"):
        perturbed_value_and_grad(loss, estimator="jvp")(params, target, opt_state=state)


def test_a_flat_loss_gives_no_perturbation():
    tx, params, target, state = _setup()
    flat = lambda params, target: 1.0 + 0.0 * problems.quadratic(params, target)  # noqa: E731
    _, new = tx.update(None, state, params, value_fn=flat, target=target)
    assert not bool(new.ascent.perturbed)
    assert float(new.ascent.ascent_norm) == 0.0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(new))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_ascent_that_is_not_finite_gives_no_perturbation(bad):
    tx, params, target, state = _setup(estimator="central")
    center = params["a"]

    def loss(params, target):  # finite at θ itself, so that the gradient there is usable
        value = problems.quadratic(params, target)
        return jnp.where(jnp.all(params["a"] == center), value, bad)

    updates, new = tx.update(None, state, params, value_fn=loss, target=target)
    assert not bool(new.ascent.perturbed)
    assert int(new.skipped) == 0
    assert np.any(updates["a"] != 0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, new)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_large_move_that_is_not_finite_is_left_out(bad):
    move = Displacement({}, {"a": jnp.ones((300, 80)).at[17, 5].set(bad), "b": jnp.ones(3)})
    jitted = jax.jit(
        lambda move: normalized(move, Subspaces({}, {})), compiler_options=problems.OWN_EMITTERS
    )
    unit, norm = jitted(move)
    assert float(norm) == 0
    chex.assert_trees_all_equal(unit, jax.tree.map(jnp.zeros_like, move))


def test_tiny_slopes_still_ascend():
    _, params, target, state = _setup()
    tx = lorenza_optax.scale_by_lorenza(rank=4)
    loss = lambda params, target: 1e-30 * problems.quadratic(params, target)  # noqa: E731
    _, new = tx.update(None, state, params, value_fn=loss, target=target)
    assert bool(new.ascent.perturbed)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"perturb_every": 3}, [False, False, False, True, False, False, True]),
        ({"rho": optax.constant_schedule(0.0)}, [False] * 7),
        ({"rho": lambda count: jnp.where(count < 4, 0.0, 0.1)}, [False] * 4 + [True] * 3),
        ({"rho": 0.0}, [False] * 7),
        ({"ascent": "none"}, [False] * 7),
    ],
    ids=["perturb_every", "schedule-0", "schedule", "rho-0", "none"],
)
def test_when_a_step_is_perturbed(kwargs, expected):
    params, target = problems.params(shapes=SHAPES), problems.params(seed=1, shapes=SHAPES)
    tx = lorenza_optax.scale_by_lorenza(rank=4, **kwargs)
    state = tx.init(params)
    step = jax.jit(lambda s: tx.update(None, s, params, value_fn=problems.quadratic, target=target))
    seen = []
    for _ in expected:
        _, state = step(state)
        seen.append(bool(state.ascent.perturbed))
    assert seen == expected


def test_a_step_that_is_not_perturbed_makes_one_evaluation():
    calls = []

    def loss(params, target):
        jax.debug.callback(lambda: calls.append(1))
        return problems.quadratic(params, target)

    tx, params, target, state = _setup(perturb_every=2, estimator="central", num_probes=1)
    counts = []
    for _ in range(3):  # counts 1, 2, 3: only the second is perturbed
        calls.clear()
        _, state = tx.update(None, state, params, value_fn=loss, target=target)
        jax.effects_barrier()
        counts.append(len(calls))
    assert counts == [1, 3, 1]


@pytest.mark.slow
def test_mu_may_be_scheduled():
    _, params, target, state = _setup()
    schedule = optax.linear_schedule(1.0, 0.5, 5)
    norms = []
    for mu in (schedule, float(schedule(1)), float(schedule(0))):
        # A forward difference of a quadratic depends on μ.
        tx = lorenza_optax.scale_by_lorenza(rank=4, mu=mu, estimator="forward")
        _, new = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        norms.append(float(new.ascent.ascent_norm))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] != pytest.approx(norms[2], rel=1e-3)


@pytest.mark.slow
def test_a_scan_in_bfloat16_is_widened_as_a_whole():
    """A scan's carry must keep its dtype, so float32 for the perturbed leaves alone won't do."""
    params = {
        "embedding": jnp.ones((4, 12), jnp.bfloat16),
        "layers": 0.1 * jnp.ones((3, 12, 12), jnp.bfloat16),
    }
    numbers = {"embedding": None, "layers": lorenza_optax.WeightDimensionNumbers(1, 2)}

    def loss(params):
        x, _ = jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w), None), params["embedding"], params["layers"]
        )
        return jnp.mean(x.astype(jnp.float32) ** 2)

    for factored in (True, False):
        tx = lorenza_optax.lorenza(
            1e-2, rank=2, factored=factored, weight_dimension_numbers=numbers
        )
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(None, state, params, value_fn=loss)
        assert bool(state[0].ascent.perturbed)
        chex.assert_trees_all_equal_dtypes(updates, params)

    def fixed(p):
        return loss(jax.tree.map(lambda x: x, p)) + jnp.sum(
            jax.lax.scan(lambda x, w: (x @ w, None), jnp.ones((1, 12), jnp.bfloat16), p["layers"])[
                0
            ]
        ).astype(jnp.float32)

    with pytest.raises(TypeError, match="does not accept float32 parameters"):
        tx.update(None, state, params, value_fn=fixed)
    # Kept factored, the weights keep their dtype, and nothing has to be widened.
    tx = lorenza_optax.lorenza(1e-2, rank=2, weight_dimension_numbers=numbers)
    updates, _ = tx.update(None, state, params, value_fn=fixed)
    chex.assert_trees_all_equal_dtypes(updates, params)
