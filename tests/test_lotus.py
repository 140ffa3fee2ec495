"""Lotus: switches of single matrices, against the float64 NumPy reference and by its laws."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorenza_optax import methods
from tests import problems
from tests.reference import lotus as reference_lotus

STEPS, RANK, ETA, GAMMA = 10, 3, 2, 0.1
MATRICES = {"wide", "tall", "square", "attention", "stacked/0", "stacked/1", "stacked/2"}
pytestmark = pytest.mark.usefixtures("compile_quickly")


def _gradients(t, dtype=np.float64):
    """Gradients of which some turn quickly, and some hardly at all: in a stack too."""
    fixed = problems.params(seed=7, dtype=dtype)
    noise = problems.params(seed=100 + t, dtype=dtype)
    amounts = {"wide": 0.05, "tall": 3.0, "square": 0.5, "attention": 0.02, "bias": 1.0}
    layers = np.array([0.02, 0.6, 3.0])[:, None, None]
    mixed = {k: fixed[k] + amounts.get(k, layers) * noise[k] for k in fixed}
    return {k: jnp.asarray(g, dtype) for k, g in mixed.items()}


def _history(tx, gradients, steps, dtype):
    params = problems.params(dtype=dtype)
    state = tx.init(params)
    step = jax.jit(tx.update)
    found = []
    for t in range(steps):
        updates, state = step(gradients(t), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        found.append((params, state[0]))
    return found


def _ages(state):
    flat = {k: float(a) for k, a in state.displacement["age"].items() if k != "stacked"}
    stack = state.displacement["age"]["stacked"]
    return flat | {f"stacked/{i}": float(age) for i, age in enumerate(stack)}


@pytest.mark.parametrize("proj_type", ["std", problems.slow("reverse_std")])
def test_lotus_agrees_with_the_reference(proj_type):
    with jax.enable_x64(True):
        tx = methods.lotus(
            1e-2, RANK, check_every=ETA, threshold=GAMMA, scale=0.5, subspace="svd",
            proj_type=proj_type, weight_dimension_numbers=problems.DIMENSION_NUMBERS,
        )  # fmt: skip
        history = _history(tx, _gradients, STEPS, np.float64)
        expected = reference_lotus.run(
            problems.matrices(problems.params(dtype=np.float64)),
            lambda _, t: problems.matrices(_gradients(t)),
            steps=STEPS, rank=RANK, eta=ETA, gamma=GAMMA, projected=MATRICES,
            learning_rate=1e-2, scale=0.5, proj_type=proj_type,
        )  # fmt: skip
        for (params, state), record in zip(history, expected, strict=True):
            chex.assert_trees_all_close(
                problems.matrices(params), record["params"], rtol=1e-8, atol=1e-8
            )
            assert _ages(state) == record["age"]
    patterns = {k: tuple(record["switched"][k] for record in expected) for k in MATRICES}
    stack = {patterns[f"stacked/{i}"] for i in range(3)}
    assert len(stack) == 3, "layers must switch at different times"
    assert {sum(pattern) for pattern in patterns.values()} >= {1, 3, STEPS}
    margins = [abs(d - GAMMA) for r in expected for d in r["displacement"].values()]
    assert min(margins) > 1e-6, "no switch may hang on round-off"


@functools.cache
def _lotus():
    tx = methods.scale_by_lotus(
        RANK, check_every=ETA, threshold=GAMMA,
        weight_dimension_numbers=problems.DIMENSION_NUMBERS,
    )  # fmt: skip
    return tx.init, jax.jit(tx.update)


def _factors(state):
    """Each matrix's projector by name, as it lies in the state."""
    found = {}
    for name, stack in (state.q | state.r).items():
        layers = {f"{name}/{i}": one for i, one in enumerate(stack)} if stack.ndim == 3 else {}
        found |= layers or {name: stack}
    return found


def test_a_switch_leaves_the_other_matrices_as_they_are():
    init, update = _lotus()
    params = problems.params()
    state, switches = init(params), 0
    for t in range(6):
        before = state
        _, state = update(_gradients(t, np.float32), state, params)
        switched = {k for k, age in _ages(state).items() if age == 1}
        assert state.last_refresh == t  # the constant ones switch at each update
        old, new = _factors(before), _factors(state)
        assert set(old) == set(new) == MATRICES
        changed = {k for k in MATRICES if np.any(np.asarray(old[k]) != np.asarray(new[k]))}
        assert changed == switched
        switches += 0 < len({k for k in switched if k.startswith("stacked")}) < 3
    assert switches >= 3, "of the stack some layers must switch and some not"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_skipped(bad):
    init, update = _lotus()
    params = problems.params()
    states = [init(params)]
    for t in (0, 1, 2):
        states.append(update(_gradients(t, np.float32), states[-1], params)[1])
    for before in states[0], states[2]:
        gradients = _gradients(2, np.float32)
        spoilt = gradients | {"wide": gradients["wide"].at[1, 2].set(bad)}
        updates, after = update(spoilt, before, params)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        counted = after._replace(count=before.count, skipped=before.skipped)
        chex.assert_trees_all_equal(counted, before)
        assert after.skipped == 1
        # The same switches are made at the next gradient, from the same ages.
        updates, resumed = update(gradients, after, params)
        assert all(np.all(np.isfinite(u)) and np.any(u) for u in jax.tree.leaves(updates))
        _, expected = update(gradients, before, params)
        assert _ages(resumed) == _ages(expected)


def test_lotus_keeps_what_galore_keeps_and_directions_and_ages():
    init, _ = _lotus()
    state = jax.eval_shape(init, problems.params())
    galore = methods.scale_by_galore(RANK, weight_dimension_numbers=problems.DIMENSION_NUMBERS)
    numbers = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    sizes = [problems.matrices(problems.params())[k].shape for k in MATRICES]
    extra = sum(RANK * max(shape) + 1 for shape in sizes)
    assert numbers(state.displacement) == extra
    assert numbers(state) == numbers(jax.eval_shape(galore.init, problems.params())) + extra


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"check_every": 0}, ValueError, "check_every must be at least 1"),
        ({"threshold": "low"}, TypeError, "threshold must be a float"),
        ({"subspace": "gaussian"}, ValueError, "subspace must be one of 'randomized_svd', 'svd'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        methods.lotus(1e-2, 4, **arguments)
