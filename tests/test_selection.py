"""select_leaves and ranks of single leaves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax import WeightDimensionNumbers, projection_plan, select_leaves
from tests import problems

PARAMS = {
    "embed": {"embedding": jnp.ones((30, 8))},
    "layers": {
        "0": {"query": {"kernel": jnp.ones((8, 9)), "bias": jnp.ones(9)}},
        "1": {"query": {"kernel": jnp.ones((8, 9)), "bias": jnp.ones(9)}},
    },
    "conv": {"kernel": jnp.ones((3, 3, 8, 9))},
    "head": {"kernel": jnp.ones((9, 8))},
}
QUERIES = {"layers/0/query/kernel", "layers/1/query/kernel"}
CONV = WeightDimensionNumbers((0, 1, 2), 3)


def _mask(*paths):
    by_path = lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/") in paths  # noqa: E731
    return jax.tree_util.tree_map_with_path(by_path, PARAMS)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (select_leaves(), QUERIES | {"head/kernel"}),
        (select_leaves(r"layers/\d+/"), QUERIES),
        (select_leaves(["^layers/1/", "head"]), {"layers/1/query/kernel", "head/kernel"}),
        (select_leaves(exclude="head|/0/"), {"layers/1/query/kernel"}),
        (select_leaves("embed"), {"embed/embedding"} - {"embed/embedding"}),
        (select_leaves("embedding"), {"embed/embedding"}),
        (select_leaves(_mask("embed/embedding")), {"embed/embedding"}),
        (select_leaves({"layers": True}), QUERIES),
        (select_leaves(lambda params: {"layers": {"0": True}}), {"layers/0/query/kernel"}),
        (
            select_leaves("conv|head", weight_dimension_numbers={"conv": {"kernel": CONV}}),
            {"conv/kernel"},
        ),
    ],
)
def test_what_is_selected(selection, expected):
    if not expected:
        with pytest.raises(ValueError, match=r"'embed'.*chooses no leaf.*embed/embedding"):
            projection_plan(PARAMS, 2, weight_dimension_numbers=selection)
        return
    plan = projection_plan(PARAMS, 2, weight_dimension_numbers=selection)
    assert set(plan.projected) == expected


def test_a_mask_tree_is_followed_or_refused():
    plan = projection_plan(PARAMS, 2, weight_dimension_numbers=select_leaves(_mask(*QUERIES)))
    assert set(plan.projected) == QUERIES
    with pytest.raises(ValueError, match=r"chooses leaf 'conv/kernel' of shape \(3, 3, 8, 9\)"):
        projection_plan(PARAMS, 2, weight_dimension_numbers=select_leaves(_mask("conv/kernel")))
    with pytest.raises(TypeError, match="holds bools, got int at 'head'"):
        projection_plan(PARAMS, 2, weight_dimension_numbers=select_leaves({"head": 3}))
    with pytest.raises(ValueError, match="mask names 'tail', but no leaf"):
        projection_plan(PARAMS, 2, weight_dimension_numbers=select_leaves({"tail": True}))
    with pytest.raises(ValueError, match=r"include holds '\(', which is no regular expression"):
        select_leaves("(")


@pytest.mark.parametrize(
    "rank",
    [
        {"layers": {"0": 3, "1": 5}, "head": 0},
        lambda path, shape: {"0": 3, "1": 5}.get(path.split("/")[1], 0),
    ],
    ids=["prefix", "function"],
)
def test_ranks_of_single_leaves(rank):
    plan = projection_plan(PARAMS, rank)
    assert {path: leaf.rank for path, leaf in plan.projected.items()} == dict(
        zip(sorted(QUERIES), (3, 5), strict=True)
    )
    assert plan.leaves["head/kernel"].reason == "rank 0"
    assert len(plan.groups) == 2  # same shapes, but not to be stacked


def test_bad_ranks_name_the_leaf():
    with pytest.raises(ValueError, match="rank names 'tail'"):
        projection_plan(PARAMS, {"tail": 3})
    with pytest.raises(ValueError, match="rank of leaf 'head/kernel' must be at least 0, got -1"):
        projection_plan(PARAMS, {"head": -1})
    with pytest.raises(TypeError, match="rank of leaf 'head/kernel' must be an int, got float"):
        projection_plan(PARAMS, {"head": 0.5})
    for rank in (None, 4.0, jnp.asarray(4)):
        with pytest.raises(TypeError, match="rank must be an int"):
            lorenza_optax.lorenza(1e-2, rank)
    assert len(projection_plan(PARAMS, np.int64(4)).projected) == 3


SHAPES = {"a": (12, 20), "b": (12, 20), "c": (24, 10), "bias": (20,)}
RANKS = {"a": 3, "b": 7, "c": 5}


def test_each_leaf_trains_as_if_alone_with_its_rank():
    gradients = [problems.params(seed, shapes=SHAPES) for seed in range(5)]
    together = lorenza_optax.scale_by_lorenza(RANKS, update_proj_gap=2)
    state = together.init(gradients[0])
    assert state.q["a"].shape[-1] == 3
    alone = {k: lorenza_optax.scale_by_lorenza(r, update_proj_gap=2) for k, r in RANKS.items()}
    states = {k: tx.init({k: gradients[0][k]}) for k, tx in alone.items()}
    for g in gradients:
        updates, state = jax.jit(together.update)(g, state)
        for k, tx in alone.items():
            expected, states[k] = jax.jit(tx.update)({k: g[k]}, states[k])
            np.testing.assert_allclose(updates[k], expected[k], rtol=1e-3, atol=1e-5)
        assert np.linalg.matrix_rank(updates["b"], tol=1e-5) == 7


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"refresh": "sketch"}, id="sketch", marks=pytest.mark.slow),
        pytest.param(
            {"refresh": "sketch", "ascent": "subspace", "base_optimizer": optax.scale_by_sign()},
            id="sketch, no moment",
        ),
        pytest.param({"probe_rank": 4, "num_probes": 3}, id="fewer rows", marks=pytest.mark.slow),
        pytest.param(
            {"ascent": "momentum", "proj_type": "reverse_std"},
            id="momentum",
            marks=pytest.mark.slow,
        ),
        pytest.param({"stagger": True}, id="stagger", marks=pytest.mark.slow),
        pytest.param({"scale_probes": True, "probe_factors": "momentum"}, id="momentum's rows"),
    ],
)
def test_every_way_to_a_gradient_takes_them(arguments):
    params, target = (problems.params(seed, shapes=SHAPES) for seed in (0, 1))
    arguments = {"rank": RANKS, "update_proj_gap": 2, "factored": False, **arguments}
    tx = lorenza_optax.lorenza(1e-2, **arguments)
    state, before = tx.init(params), problems.quadratic(params, target)

    @jax.jit
    def step(params, state):
        updates, new = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        return optax.apply_updates(params, updates), new

    for _ in range(5):
        params, new = step(params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
    assert problems.quadratic(params, target) < before
    assert bool(state[0].ascent.perturbed)
    if arguments.get("stagger"):
        return
    value_and_grad = lorenza_optax.subspace_value_and_grad(problems.quadratic, **arguments)

    @jax.jit
    def accumulated(params, state):
        _, grads, state = value_and_grad(params, target, opt_state=state)
        assert {k: min(g.shape) for k, g in grads.projected.items()} == RANKS
        return tx.update(grads, state, params)

    updates, _ = accumulated(params, state)
    assert all(np.all(np.isfinite(u)) for u in updates.values())
