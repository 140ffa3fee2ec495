"""diagnostics: the scalars that a trainer logs, wherever the state sits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax import diagnostics
from tests import problems

SHAPES = {"a": (12, 20), "b": (24, 10), "stacked": (3, 8, 12), "bias": (20,)}
AXES = lorenza_optax.WeightDimensionNumbers
NUMBERS = {"a": AXES(), "b": AXES(), "stacked": AXES(1, 2)}
LOW_RANK = [
    "value", "ascent_norm", "perturbed", "captured_energy", "subspace_overlap",
    "steps_since_refresh", "skipped_steps",
]  # fmt: skip


def _tx(**kwargs):
    kwargs = {"rank": 4, "update_proj_gap": 3, "weight_dimension_numbers": NUMBERS} | kwargs
    return lorenza_optax.lorenza(1e-2, **kwargs)


def _run(tx, steps, bad=None):
    """The state and the scalars after each update on a quadratic that turns."""
    params = problems.params(shapes=SHAPES)
    state, logged, states = tx.init(params), [], []

    @jax.jit
    def step(params, state, target):
        updates, state = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        return optax.apply_updates(params, updates), state, diagnostics(state)

    for t in range(steps):
        target = problems.params(seed=t + 1, shapes=SHAPES)
        if t == bad:
            target["bias"] = target["bias"].at[0].set(jnp.nan)
        params, state, scalars = step(params, state, target)
        logged.append({name: float(value) for name, value in scalars.items()})
        states.append(state)
    return states, logged


def _overlap(new, old):
    """mean over matrices of ‖P_newᵀ P_old‖² / r, from the projectors that the states hold."""
    shares = []
    for name, side in (("a", "q"), ("b", "r"), ("stacked", "q")):
        now, then = (np.asarray(getattr(state[0], side)[name], np.float64) for state in (new, old))
        if side == "r":
            now, then = now.swapaxes(-1, -2), then.swapaxes(-1, -2)
        squares = np.sum(np.square(now.swapaxes(-1, -2) @ then), axis=(-1, -2)) / 4
        shares += np.ravel(squares).tolist()
    return np.mean(shares)


@pytest.mark.parametrize("refresh", ["gradient", "sketch"])
def test_names_and_meaning(refresh):
    states, logged = _run(_tx(refresh=refresh), 8, bad=5)
    assert all(set(scalars) == set(LOW_RANK) for scalars in logged)  # jit sorts them
    refreshes = [0, 3, 6] if refresh == "gradient" else [0, 1, 2, 3, 6]
    since = [t - max(s for s in refreshes if s <= t) for t in range(8)]
    assert [scalars["steps_since_refresh"] for scalars in logged] == since
    assert [scalars["skipped_steps"] for scalars in logged] == [0] * 5 + [1] * 3
    for scalars in logged[1:5]:
        assert scalars["perturbed"] == 1
        assert scalars["ascent_norm"] > 0
        assert 0 < scalars["captured_energy"] <= 1
        assert scalars["value"] > 0
    # The first subspaces from gradients had none before them.
    assert (logged[0]["subspace_overlap"] == 0) == (refresh == "gradient")
    assert logged[4]["subspace_overlap"] == logged[3]["subspace_overlap"]
    for t in refreshes[1:]:
        expected = _overlap(states[t], states[t - 1])
        np.testing.assert_allclose(logged[t]["subspace_overlap"], expected, rtol=1e-4)
        assert 0.05 < expected < 0.99


@pytest.mark.slow
def test_overlap_where_refreshes_are_staggered():
    states, logged = _run(_tx(stagger=True, update_proj_gap=1), 3)
    expected = _overlap(states[2], states[1])
    np.testing.assert_allclose(logged[2]["subspace_overlap"], expected, rtol=1e-4)


def test_low_rank_gradients_from_outside():
    shared = {"rank": 4, "update_proj_gap": 1, "weight_dimension_numbers": NUMBERS}
    tx = lorenza_optax.lorenza(1e-2, **shared)
    params = problems.params(shapes=SHAPES)
    value_and_grad = jax.jit(
        lambda p, t, s: lorenza_optax.subspace_value_and_grad(problems.quadratic, **shared)(
            p, t, opt_state=s
        )
    )
    states = [tx.init(params)]
    for t in range(3):
        target = problems.params(seed=t + 1, shapes=SHAPES)
        _, grads, state = value_and_grad(params, target, states[-1])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        states.append(state)
    scalars = diagnostics(states[-1])
    expected = _overlap(states[-1], states[-2])
    np.testing.assert_allclose(scalars["subspace_overlap"], expected, rtol=1e-4)
    assert int(scalars["steps_since_refresh"]) == 0


def test_states_inside_others():
    params = problems.params(shapes=SHAPES)
    inside = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), _tx()), 2).init(params)
    assert list(diagnostics(inside)) == LOW_RANK
    both = optax.partition(
        {"x": _tx(), "y": _tx(weight_dimension_numbers=None)},
        {"a": "x", "b": "y", "stacked": "x", "bias": "y"},
    )
    found = list(diagnostics(both.init(params)))
    assert len(found) == 14
    assert any("x" in name and name.endswith("/value") for name in found)


def test_other_optimizers():
    params = problems.params(shapes=SHAPES)
    full = diagnostics(lorenza_optax.adazo_sam(1e-2).init(params))
    assert list(full) == ["value", "ascent_norm", "perturbed", "skipped_steps"]
    stage = optax.chain(lorenza_optax.zo_sam_perturbation(), optax.sgd(1e-2))
    assert list(diagnostics(stage.init(params))) == ["value", "ascent_norm", "perturbed"]
    with pytest.raises(ValueError, match="no state of lorenza"):
        diagnostics(optax.adam(1e-2).init(params))
