"""The library against the float64 NumPy references, over refreshes, sides and transports."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax._ascent.directions import full_space, in_subspace
from lorenza_optax._ascent.gradient import PROBE, step_key
from lorenza_optax._factored.landscape import Subspaces
from lorenza_optax._plan.matrix_view import matrix_view
from tests import problems
from tests.reference import adazo_sam as reference_adazo_sam
from tests.reference import lorenza as reference_lorenza

STEPS, RANK, GAP = 9, 3, 4  # refreshes at 0, 4 and 8
PROJECTED = {"wide", "tall", "square", "attention", "stacked/0", "stacked/1", "stacked/2"}


pytestmark = pytest.mark.usefixtures("compile_quickly")


def _run_library(tx, dtype, steps=STEPS):
    params = problems.params(dtype=dtype)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(None, state, params, value_fn=problems.loss, batch=batch)
        return optax.apply_updates(params, updates), state

    history = []
    for t in range(steps):
        params, state = step(params, state, problems.batch(t, dtype))
        history.append((params, state[0]))
    return history


def _subspace_probes(state, num_probes, dtype=np.float64):
    """The u_j that the library draws: they depend on seed, count and shapes alone."""
    views = {
        k: matrix_view(problems.SHAPES[k], d) for k, d in problems.DIMENSION_NUMBERS.items() if d
    }

    @jax.jit
    def draw(t):
        projectors = {k: v.projector(state.q[k], state.r[k]) for k, v in views.items()}
        partners = {k: v.partner(state.q[k], state.r[k]).astype(dtype) for k, v in views.items()}
        family = in_subspace(Subspaces(views, projectors), partners)
        return family.draw(step_key(state.ascent.seed, t, PROBE), num_probes).weights

    def probes(t):
        weights = draw(t)
        flat = {k: np.asarray(u) for k, u in weights.items() if k != "stacked"}
        return flat | {f"stacked/{i}": np.asarray(weights["stacked"][:, i]) for i in range(3)}

    return probes


def _reference_problem(dtype):
    value = jax.jit(problems.loss)
    gradient = jax.jit(jax.grad(problems.loss))

    def loss(params, t):
        return float(value(problems.leaves(params), problems.batch(t, np.float64)))

    def grad(params, t):
        return problems.matrices(gradient(problems.leaves(params), problems.batch(t, np.float64)))

    return loss, grad


def _check(history, expected, rtol):
    for (params, state), record in zip(history, expected, strict=True):
        chex.assert_trees_all_close(
            problems.matrices(params), record["params"], rtol=rtol, atol=rtol
        )
        np.testing.assert_allclose(state.ascent.value, record["value"], rtol=max(rtol, 1e-6))
        np.testing.assert_allclose(
            state.ascent.ascent_norm, record["ascent_norm"], rtol=max(1e2 * rtol, 1e-6)
        )


COMMON = {
    "rank": RANK, "update_proj_gap": GAP, "rho": 0.1, "mu": 1e-2, "seed": 3,
    "refresh": "gradient",
}  # fmt: skip
CASES = [
    pytest.param(
        side, transport, "discard", {}, id=f"{side}-{transport}",
        # Where the moments are kept is one choice, how they are carried over another.
        marks=() if (side, transport) in (("std", "keep"), ("reverse_std", "rotate"))
        else pytest.mark.slow,
    )
    for side, transport in itertools.product(
        ("std", "reverse_std", "left", "right"), ("keep", "reset", "rotate")
    )
] + [
    pytest.param("std", "keep", "fira", {}, id="fira"),
    pytest.param("reverse_std", "keep", "sumo", {}, id="sumo"),
    pytest.param("std", "keep", "discard", {"num_probes": 3, "estimator": "jvp"}, id="jvp-3"),
    pytest.param(
        "std", "keep", "discard", {"num_probes": 2, "estimator": "forward"}, id="forward-2"
    ),
    pytest.param(
        "std", "rotate", "discard", {"perturb_every": 2, "scale": 0.25, "weight_decay": 0.1},
        id="perturb_every-scale-decay",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("side", "transport", "residual", "more"), CASES)
def test_lorenza_agrees_with_the_reference(side, transport, residual, more):
    with jax.enable_x64(True):
        arguments = {"num_probes": 1, "estimator": "central", **COMMON, **more}
        factory = lorenza_optax.lorenza
        if residual != "discard":
            factory = lorenza_optax.lorenza_plus
            arguments["add_back"] = residual
            del arguments["refresh"]
        tx = factory(
            1e-2, **arguments, proj_type=side, moment_transport=transport, subspace="svd",
            weight_dimension_numbers=problems.DIMENSION_NUMBERS,
        )  # fmt: skip
        history = _run_library(tx, np.float64)
        loss, grad = _reference_problem(np.float64)
        expected = reference_lorenza.run(
            problems.matrices(problems.params(dtype=np.float64)), loss, grad, steps=STEPS,
            rank=RANK, gap=GAP, rho=0.1, mu=1e-2, num_probes=arguments["num_probes"],
            probes=_subspace_probes(history[0][1], arguments["num_probes"]), proj_type=side,
            transport=transport, estimator=arguments["estimator"], learning_rate=1e-2,
            projected=PROJECTED, residual=None if residual == "discard" else residual,
            scale=more.get("scale", 1.0), weight_decay=more.get("weight_decay", 0.0),
            perturb_every=more.get("perturb_every", 1),
        )  # fmt: skip
        _check(history, expected, rtol=1e-8)
        assert history[-1][1].last_refresh == 8
        for t, ((_, state), record) in enumerate(zip(history, expected, strict=True)):
            if residual != "discard" or t % GAP == 0:  # else there is no full gradient
                share = record["captured_energy"]
                np.testing.assert_allclose(state.captured_energy, share, rtol=1e-5)
            assert 0.2 < record["captured_energy"] < 0.99, "truncation must bite"
            _check_projectors(state, record)


def _check_projectors(state, record):
    """Compares Q Qᵀ and Rᵀ R, which are unique where the bases are not."""
    q, r = problems.matrices(state.q), problems.matrices(state.r)
    q["attention"], r["attention"] = (
        np.asarray(state.q["attention"]),
        np.asarray(state.r["attention"]),
    )
    for name in PROJECTED:
        ours, theirs = q[name] @ q[name].T, record["q"][name] @ record["q"][name].T
        np.testing.assert_allclose(ours, theirs, atol=1e-8)
        ours, theirs = r[name].T @ r[name], record["r"][name].T @ record["r"][name]
        np.testing.assert_allclose(ours, theirs, atol=1e-8)


@pytest.mark.parametrize("subspace", [problems.slow("svd"), "randomized_svd"])
def test_lorenza_in_float32_agrees_with_the_reference(subspace):
    # For the randomized SVD rank 3 + oversampling 8 is at least min(m, n) of every leaf, so that
    # its subspace too is that of the exact one.
    tx = lorenza_optax.lorenza(
        1e-2, **COMMON, num_probes=2, estimator="jvp", subspace=subspace,
        weight_dimension_numbers=problems.DIMENSION_NUMBERS,
    )  # fmt: skip
    history = _run_library(tx, np.float32)
    chex.assert_trees_all_equal_dtypes(history[0][0], problems.params())
    probes = _subspace_probes(history[0][1], 2, np.float32)
    drawn = [probes(t) for t in range(STEPS)]
    with jax.enable_x64(True):
        loss, grad = _reference_problem(np.float64)
        expected = reference_lorenza.run(
            problems.matrices(problems.params()), loss, grad, steps=STEPS, rank=RANK, gap=GAP,
            rho=0.1, mu=1e-2, num_probes=2, probes=drawn.__getitem__, proj_type="std",
            transport="keep", estimator="jvp", learning_rate=1e-2, projected=PROJECTED,
        )  # fmt: skip
    _check(history, expected, rtol=2e-3)


@pytest.mark.parametrize(
    ("estimator", "num_probes"),
    [("central", 1), problems.slow("forward", 2), problems.slow("jvp", 3)],
)
def test_adazo_sam_agrees_with_the_reference(estimator, num_probes):
    with jax.enable_x64(True):
        tx = lorenza_optax.adazo_sam(
            1e-2, rho=0.1, mu=1e-2, num_probes=num_probes, estimator=estimator,
            weight_decay=0.1, seed=5,
        )  # fmt: skip
        history = _run_library(tx, np.float64)
        seed = history[0][1].ascent.seed
        family = full_space(problems.params(dtype=np.float64))

        @jax.jit
        def draw(t):
            drawn = family.draw(step_key(seed, t, PROBE), num_probes)
            return jax.vmap(lambda probe: family.displacement(probe).full)(drawn)

        def probes(t):
            stacked = draw(t)
            each = [
                problems.matrices({k: x[j] for k, x in stacked.items()}) for j in range(num_probes)
            ]
            return {k: np.stack([one[k] for one in each]) for k in each[0]}

        loss, grad = _reference_problem(np.float64)
        expected = reference_adazo_sam.run(
            problems.matrices(problems.params(dtype=np.float64)), loss, grad, steps=STEPS, rho=0.1,
            mu=1e-2, num_probes=num_probes, probes=probes, estimator=estimator,
            learning_rate=1e-2, weight_decay=0.1,
        )  # fmt: skip
        _check(history, expected, rtol=1e-8)
        assert all(bool(state.ascent.perturbed) for _, state in history)


def test_a_skipped_step_agrees_with_the_reference():
    with jax.enable_x64(True):
        tx = lorenza_optax.lorenza(
            1e-2, **COMMON, subspace="svd", estimator="central", weight_decay=0.1,
            weight_dimension_numbers=problems.DIMENSION_NUMBERS,
        )  # fmt: skip
        bad_steps = {0, 4, 6}

        def poisoned(params, batch, bad):
            value = problems.loss(params, batch)
            return value + jnp.where(bad, jnp.nan, 0) * jnp.sum(params["bias"])

        params = problems.params(dtype=np.float64)
        state = tx.init(params)

        @jax.jit
        def step(params, state, batch, bad):
            return tx.update(None, state, params, value_fn=poisoned, batch=batch, bad=bad)

        history = []
        for t in range(STEPS):
            batch = problems.batch(t, np.float64)
            updates, state = step(params, state, batch, t in bad_steps)
            params = optax.apply_updates(params, updates)
            history.append((params, state[0]))

        loss, clean = _reference_problem(np.float64)

        def grad(params, t):
            gradient = clean(params, t)
            if t in bad_steps:
                gradient["bias"] = np.full_like(gradient["bias"], np.nan)
            return gradient

        def finite_loss(params, t):
            return np.nan if t in bad_steps else loss(params, t)

        expected = reference_lorenza.run(
            problems.matrices(problems.params(dtype=np.float64)), finite_loss, grad, steps=STEPS,
            rank=RANK, gap=GAP, rho=0.1, mu=1e-2, num_probes=1,
            probes=_subspace_probes(history[0][1], 1), proj_type="std", transport="keep",
            estimator="central", learning_rate=1e-2, weight_decay=0.1, projected=PROJECTED,
        )  # fmt: skip
        for (params, _), record in zip(history, expected, strict=True):
            chex.assert_trees_all_close(
                problems.matrices(params), record["params"], rtol=1e-8, atol=1e-8
            )
        refreshes = [int(state.last_refresh) for _, state in history]
        assert refreshes == [-1, 1, 1, 1, 1, 5, 5, 5, 8]
        assert int(history[-1][1].skipped) == 3
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(history))
