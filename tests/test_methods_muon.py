"""GUM and COSMOS, and Newton-Schulz: against references, by counts of what they keep, by laws."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorenza_optax import methods
from lorenza_optax._linalg.newton_schulz import newton_schulz
from lorenza_optax._residual import full_rank
from lorenza_optax._residual.residual import outside
from tests import problems
from tests.reference import cosmos as reference_cosmos
from tests.reference import gum as reference_gum
from tests.reference.newton_schulz import newton_schulz as reference_newton_schulz

STEPS, RANK, GAP, SHARE = 8, 3, 3, 0.4  # refreshes at 0, 3 and 6
SEED = 0
MATRICES = {"wide", "tall", "square", "attention", "stacked/0", "stacked/1", "stacked/2"}
# Of one shape and side: "attention" (8, 12) is like the layers of the stack.
GROUPS = {
    "wide": ["wide"], "tall": ["tall"], "square": ["square"],
    "attention": ["attention", "stacked/0", "stacked/1", "stacked/2"],
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("compile_quickly")
SCALE_BY = {"gum": {"update_proj_gap": GAP, "full_rank_share": SHARE}, "cosmos": {}}


def _gradients(t, dtype=np.float64):
    """Gradients that drift, of full rank and with singular values apart."""
    fixed = problems.params(seed=7, dtype=dtype)
    noise = problems.params(seed=100 + t, dtype=dtype)
    sizes = {k: np.linspace(0.3, 2.0, g.shape[-1]) for k, g in fixed.items()}
    return {k: jnp.asarray((fixed[k] + noise[k]) * sizes[k], dtype) for k in fixed}


def _history(tx, steps=STEPS):
    params = problems.params(dtype=np.float64)
    state = tx.init(params)
    step = jax.jit(tx.update)
    found = []
    for t in range(steps):
        updates, state = step(_gradients(t), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        found.append((params, state[0]))
    return found


def _reference(run, **arguments):
    return run(
        problems.matrices(problems.params(dtype=np.float64)),
        lambda _, t: problems.matrices(_gradients(t)),
        steps=STEPS, rank=RANK, projected=MATRICES, learning_rate=1e-2, **arguments,
    )  # fmt: skip


def _check_params(history, expected):
    for (params, _), record in zip(history, expected, strict=True):
        chex.assert_trees_all_close(
            problems.matrices(params), record["params"], rtol=1e-8, atol=1e-8
        )


def _full(state):
    """The names of the matrices that are full-rank, and the slot of each."""
    found = {}
    for first, held in state.residual["holds"].items():
        taken = [int(one) for one in held if one]
        assert len(taken) == len(set(taken))
        found |= {GROUPS[first][one - 1]: (first, s) for s, one in enumerate(held) if one}
    return found


@pytest.mark.parametrize("proj_type", ["std", problems.slow("reverse_std")])
def test_gum_agrees_with_the_reference(proj_type):
    with jax.enable_x64(True):
        tx = methods.gum(
            1e-2, RANK, GAP, full_rank_share=SHARE, scale=0.5, proj_type=proj_type, seed=SEED,
            weight_dimension_numbers=problems.DIMENSION_NUMBERS,
        )  # fmt: skip
        history = _history(tx)
        chosen = [_full(state) for _, state in history]
        expected = _reference(
            reference_gum.run, gap=GAP, q=SHARE, full=lambda t: set(chosen[t]), scale=0.5,
            proj_type=proj_type,
        )  # fmt: skip
        _check_params(history, expected)
        for (_, state), record, full in zip(history, expected, chosen, strict=True):
            assert set(full) == record["full"]
            for name, (first, slot) in full.items():  # momenta but for the constant factor
                kept = state.residual["momentum"][first][slot]
                np.testing.assert_allclose(kept, SHARE * record["momentum"][name], atol=1e-8)
            if "tall" not in full:
                side = "r" if proj_type == "std" else "q"  # lifted: signs are a convention
                low = state.projected[0].trace["tall"]
                lifted = low.T @ state.r["tall"] if side == "r" else state.q["tall"] @ low
                wanted = (1 - SHARE) * record["p"]["tall"] @ record["momentum"]["tall"]
                wanted = wanted.T if side == "r" else wanted
                np.testing.assert_allclose(lifted, wanted, atol=1e-8)
    periods = [set(chosen[t]) for t in range(0, STEPS, GAP)]
    assert len({frozenset(one) for one in periods}) == 3
    assert any(0 < len(one & set(GROUPS["attention"])) < 4 for one in periods)
    assert any("attention" in one for one in periods)
    assert any("wide" in one or "tall" in one or "square" in one for one in periods)


@pytest.mark.parametrize("proj_type", ["std", problems.slow("right"), problems.slow("reverse_std")])
def test_cosmos_agrees_with_the_reference(proj_type):
    with jax.enable_x64(True):
        tx = methods.cosmos(
            1e-2, RANK, gamma=0.3, b1=0.9, proj_type=proj_type,
            weight_dimension_numbers=problems.DIMENSION_NUMBERS,
        )  # fmt: skip
        history = _history(tx)
        expected = _reference(reference_cosmos.run, gamma=0.3, b1=0.9, proj_type=proj_type)
        _check_params(history, expected)
        for (_, state), record in zip(history, expected, strict=True):
            s = state.singular_values
            np.testing.assert_allclose(s["wide"], record["s"]["wide"], atol=1e-8)
            np.testing.assert_allclose(s["stacked"][1], record["s"]["stacked/1"], atol=1e-8)
            np.testing.assert_allclose(state.residual["v"]["wide"], record["v"]["wide"], atol=1e-8)


@functools.cache
def _method(name):
    """Its init and its jitted update, in float32."""
    factory = getattr(methods, f"scale_by_{name}")
    tx = factory(
        rank=RANK, weight_dimension_numbers=problems.DIMENSION_NUMBERS, **SCALE_BY[name]
    )  # fmt: skip
    return tx.init, jax.jit(tx.update)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", SCALE_BY)
def test_a_gradient_that_is_not_finite_is_skipped(name, bad):
    init, update = _method(name)
    params = problems.params()
    states = [init(params)]
    for t in range(4):
        states.append(update(_gradients(t, np.float32), states[-1], params)[1])
    for before in states[0], states[3], states[4]:  # at a refresh of GUM's and between
        gradients = _gradients(9, np.float32)
        spoilt = gradients | {"stacked": gradients["stacked"].at[1, 2, 3].set(bad)}
        updates, after = update(spoilt, before, params)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        counted = after._replace(count=before.count, skipped=before.skipped)
        chex.assert_trees_all_equal(counted, before)
        assert after.skipped == 1
        updates, resumed = update(gradients, after, params)
        assert all(np.all(np.isfinite(u)) and np.any(u) for u in jax.tree.leaves(updates))
        due = name == "cosmos" or before is not states[4]
        assert (resumed.last_refresh == after.count) == due
    # Nothing of COSMOS hangs on the count of updates, skipped ones included.
    if name == "cosmos":
        chex.assert_trees_all_equal(updates, update(gradients, states[4], params)[0])


def _sizes():
    shapes = [one.shape for one in problems.matrices(problems.params()).values()]
    return [(min(shape), max(shape)) for shape in shapes if len(shape) == 2]


def _numbers(tree):
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(math.prod(leaf.shape) for leaf in floats)


SCALARS = 4  # captured_energy, subspace_overlap, the ascent's value and norm
ADAM_OF_BIAS = 2 * 14


def test_gum_keeps_low_rank_momenta_and_a_few_of_full_size():
    state = jax.eval_shape(_method("gum")[0], problems.params())
    low = sum(RANK * (k + l_) for k, l_ in _sizes())
    slots = {"wide": 1, "tall": 1, "square": 1, "attention": 2}  # ceil of 0.4 and of 0.4 * 4
    full = sum(
        slots[name] * math.prod(problems.matrices(problems.params())[name].shape) for name in GROUPS
    )
    assert _numbers(state) == low + full + ADAM_OF_BIAS + SCALARS
    holds = state.residual["holds"]
    assert {name: held.shape[0] for name, held in holds.items()} == slots


def test_cosmos_keeps_a_whole_momentum_and_small_factors():
    state = jax.eval_shape(_method("cosmos")[0], problems.params())
    own = sum(k * l_ + RANK * (k + l_) + RANK**2 for k, l_ in _sizes())
    assert _numbers(state) == own + ADAM_OF_BIAS + SCALARS


@pytest.mark.parametrize(("number", "share"), [(5, 0.3), (10, 0.1), (1, 0.4), (3, 0.9)])
def test_each_matrix_is_full_rank_with_probability_q(number, share):
    slots = full_rank._slots(share, number)
    assert slots == {5: 2, 10: 1, 1: 1, 3: 3}[number]
    draw = jax.vmap(lambda key: full_rank._drawn(key, number, slots, share))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(draw(keys))
    is_full = np.array([[i in row for i in range(1, number + 1)] for row in drawn])
    assert all(len(set(row[row > 0])) == (row > 0).sum() for row in drawn)
    error = np.sqrt(share * (1 - share) / len(keys))
    np.testing.assert_allclose(is_full.mean(axis=0), share, atol=4 * error)


def test_slots_of_many_matrices():
    assert [full_rank._slots(0.1, n) for n in (1, 10, 30, 31)] == [1, 1, 3, 4]
    assert full_rank._slots(1e-12, 3) == 1


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((24, 60), np.float64), ((200, 300), np.float32), ((200, 300), jnp.bfloat16)],
)
def test_round_off_is_not_outside_the_subspace(shape, dtype):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        wide = jnp.promote_types(dtype, jnp.float32)
        p = jnp.linalg.qr(jax.random.normal(keys[0], (shape[0], 16), wide))[0].astype(dtype)
        within = p.astype(wide) @ jax.random.normal(keys[1], (16, shape[1]), wide)
        assert not np.any(outside(within, p, p.astype(wide).T @ within))
        whole = within + 0.1 * jax.random.normal(keys[2], shape, wide)
        rest = outside(whole, p, p.astype(wide).T @ whole)
        assert np.linalg.norm(rest) > 0.05 * np.linalg.norm(whole)
        stack = jnp.stack([within, whole])
        both = outside(stack, jnp.stack([p, p]), p.astype(wide).T @ stack)
        assert not np.any(both[0])
        assert np.any(both[1])


def test_a_gradient_within_the_subspace_moves_nothing_outside():
    params = {"w": jnp.zeros((20, 30))}
    a, b = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((20, 2), (2, 30)))
    )
    gradient = {"w": a @ b}
    tx = methods.scale_by_gum(4, 1, full_rank_share=0.5, subspace="svd")
    state, seen = tx.init(params), set()
    update = jax.jit(tx.update)
    for _ in range(8):
        updates, state = update(gradient, state, params)
        is_full = bool(state.residual["holds"]["w"][0])
        assert np.any(updates["w"]) != is_full
        seen.add(is_full)
    assert seen == {False, True}
    found = []
    for gamma in (0.2, 0.0):
        tx = methods.scale_by_cosmos(4, gamma=gamma)
        found.append(tx.update(gradient, tx.init(params), params)[0])
    chex.assert_trees_all_equal(*found)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 6, 4)])
def test_newton_schulz_is_optax_muons(shape):
    with jax.enable_x64(True):
        matrix = jnp.asarray(np.random.default_rng(0).standard_normal(shape))
        muon = optax.contrib.scale_by_muon(
            beta=0.0, eps=0.0, nesterov=False,
            weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1),
        )  # fmt: skip
        expected = muon.update(matrix, muon.init(matrix))[0]
        np.testing.assert_allclose(newton_schulz(matrix), expected, rtol=1e-8, atol=1e-10)
        for index in np.ndindex(shape[:-2]):
            own = reference_newton_schulz(matrix[index])
            np.testing.assert_allclose(newton_schulz(matrix)[index], own, rtol=1e-8, atol=1e-10)
    assert not np.any(newton_schulz(jnp.zeros(shape)))


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        ("gum", {"full_rank_share": 0}, ValueError, "full_rank_share must be above 0 and below 1"),
        ("gum", {"full_rank_share": 1.0}, ValueError, "full_rank_share must be above 0"),
        ("gum", {"full_rank_share": "two"}, TypeError, "full_rank_share must be a float, got str"),
        ("gum", {"full_rank_share": jnp.ones(())}, TypeError, "full_rank_share must not be an arr"),
        ("gum", {"subspace": "gaussian"}, ValueError, "subspace must be one of"),
        ("cosmos", {"proj_type": "columns"}, ValueError, "proj_type must be one of 'std'"),
    ],
)
def test_bad_arguments(method, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(methods, method)(1e-2, 4, **arguments)
