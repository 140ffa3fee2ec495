"""The matrix view and the plan."""

import functools
import warnings
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lorenza_optax
from lorenza_optax import WeightDimensionNumbers, projection_plan
from lorenza_optax._plan.matrix_view import PROJ_TYPES, matrix_view


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_view_and_back_is_the_identity(data, shape):
    axes = data.draw(st.permutations(range(len(shape))))
    rows = data.draw(st.integers(1, len(shape) - 1))
    columns = data.draw(st.integers(1, len(shape) - rows))
    numbers = WeightDimensionNumbers(axes[:rows], axes[rows : rows + columns])
    view = matrix_view(tuple(shape), numbers, data.draw(st.sampled_from(PROJ_TYPES)))
    leaf = np.arange(np.prod(shape)).reshape(shape)
    matrix = view.matrix(leaf)
    assert matrix.shape == (*view.batch, view.m, view.n)
    chex.assert_trees_all_equal(view.leaf(matrix), leaf)
    chex.assert_trees_all_equal(view.orient(view.orient(matrix)), matrix)


def test_attention_kernel_rows_and_columns():
    leaf = jnp.arange(2 * 3 * 4).reshape(2, 3, 4)
    view = matrix_view((2, 3, 4), WeightDimensionNumbers((1, 2), 0))
    np.testing.assert_array_equal(view.matrix(leaf), leaf.reshape(2, 12).T)
    stack = matrix_view((2, 3, 4), WeightDimensionNumbers(1, -1))
    np.testing.assert_array_equal(stack.matrix(leaf), leaf)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [  # std, reverse_std, left, right
        ((4, 6), ("left", "right", "left", "right")),
        ((6, 4), ("right", "left", "left", "right")),
        ((5, 5), ("left", "left", "left", "right")),
    ],
)
def test_compressed_side(shape, sides):
    for proj_type, side in zip(PROJ_TYPES, sides, strict=True):
        assert matrix_view(shape, None, proj_type).compressed == side


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        x = x + linen.Dense(16)(linen.LayerNorm()(x))
        return x, None


class Stacked(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(50, 16)(tokens)
        x, _ = linen.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=7
        )()(x, None)
        x = linen.MultiHeadDotProductAttention(num_heads=4)(x)
        return linen.Dense(50)(x)  # fmt: skip


def test_default_rule_on_a_linen_model_with_scan_and_attention():
    params = jax.eval_shape(Stacked().init, jax.random.key(0), jnp.zeros((2, 5), int))["params"]
    plan = projection_plan(params, rank=4)
    # The scanned scale (7, 16) and bias are matrices by shape, but not by name.
    assert set(plan.projected) == {"Dense_0/kernel"}
    with pytest.warns(UserWarning, match=r"3 or more dimensions.*query/kernel"):
        plan.warn()
    numbers = {
        "ScanBlock_0": {"Dense_0": {"kernel": WeightDimensionNumbers(1, 2)}},
        "MultiHeadDotProductAttention_0": {
            name: {"kernel": WeightDimensionNumbers(*axes)}
            for name, axes in {
                "query": (0, (1, 2)), "key": (0, (1, 2)), "value": (0, (1, 2)), "out": ((0, 1), 2),
            }.items()
        },
    }  # fmt: skip
    plan = projection_plan(params, rank=4, weight_dimension_numbers=numbers)
    assert len(plan.projected) == 5
    view = plan.leaves["ScanBlock_0/Dense_0/kernel"].matrix
    assert (view.batch, view.m, view.n) == ((7,), 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.warn()


def test_nnx_paths_are_the_same_boxed_and_bare():
    model = nnx.Linear(16, 24, rngs=nnx.Rngs(0))
    boxed = nnx.state(model, nnx.Param)
    bare = nnx.as_pure(boxed)
    paths = [set(projection_plan(tree, rank=4).leaves) for tree in (boxed, bare)]
    assert paths == [{"kernel", "bias"}] * 2


def test_optax_dimension_numbers_prefixes_and_functions():
    params = {"a": {"x": jnp.ones((8, 9)), "y": jnp.ones((9, 8))}, "b": jnp.ones((8, 8))}
    numbers = {"a": optax.contrib.GaLoreDimensionNumbers(), "b": None}
    plan = projection_plan(params, 2, weight_dimension_numbers=numbers)
    assert set(plan.projected) == {"a/x", "a/y"}
    plan = projection_plan(
        params, 2, weight_dimension_numbers=lambda tree: {"b": WeightDimensionNumbers()}
    )
    assert set(plan.projected) == {"b"}
    plan = projection_plan(params, 2, weight_dimension_numbers=WeightDimensionNumbers(1, 0))
    assert set(plan.projected) == {"a/x", "a/y", "b"}  # fmt: skip


def test_a_prefix_selects_the_matrices_below_it():
    params = {"d": {"kernel": jnp.ones((8, 9)), "bias": jnp.ones(9)}, "e": jnp.ones((8, 9))}
    plan = projection_plan(params, 2, weight_dimension_numbers={"d": WeightDimensionNumbers()})
    assert set(plan.projected) == {"d/kernel"}


def test_a_field_called_value_is_no_box():
    class Heads(NamedTuple):
        query: Any
        key: Any
        value: Any

    params = {"attn": Heads(*(jnp.ones((8, 9)) for _ in range(3)))}
    numbers = {"attn": Heads(None, None, WeightDimensionNumbers())}
    plan = projection_plan(params, 2, weight_dimension_numbers=numbers)
    assert set(plan.leaves) == {"attn/query", "attn/key", "attn/value"}
    assert set(plan.projected) == {"attn/value"}


def test_table_counts_what_is_kept():
    params = {"kernel": jnp.zeros((64, 96)), "bias": jnp.zeros(96), "embedding": jnp.zeros((9, 9))}
    plan = projection_plan(params, rank=8)
    tx = lorenza_optax.lorenza(1e-3, rank=8)
    state = tx.init(params)[0]
    kept = sum(plan.numbers_kept(path)[0] for path in params)
    inner = [x for x in jax.tree.leaves((state.projected, state.others)) if x.ndim]
    assert kept == sum(x.size for x in [*state.q.values(), *state.r.values(), *inner])
    adam = [x for x in jax.tree.leaves(optax.scale_by_adam().init(params)) if x.ndim]
    assert sum(plan.numbers_kept(path)[1] for path in params) == sum(x.size for x in adam)
    text = str(plan)
    assert "named 'embedding'" in text
    assert f"{kept:,}" in text


def test_axes_may_be_numpys_numbers():
    params, axes = {"k": jnp.ones((16, 8))}, WeightDimensionNumbers(np.int64(0), (np.int32(1),))
    plan = lorenza_optax.projection_plan(params, 4, weight_dimension_numbers=axes)
    assert (plan.leaves["k"].matrix.m, plan.leaves["k"].matrix.n) == (16, 8)


def test_bad_trees_name_the_leaf():
    with pytest.raises(ValueError, match="proj_type must be one of"):
        projection_plan({}, 2, proj_type="rigth")
    with pytest.raises(ValueError, match="rank must be at least 1"):
        projection_plan({}, -1)
    leaf = {"layer": {"kernel": jnp.ones((4, 5))}}
    with pytest.raises(ValueError, match=r"'layer/kernel' do not fit its shape \(4, 5\)"):
        projection_plan(leaf, 2, weight_dimension_numbers=WeightDimensionNumbers(0, 2))
    with pytest.raises(ValueError, match="do not fit.*named twice"):
        projection_plan(leaf, 2, weight_dimension_numbers=WeightDimensionNumbers(0, 0))
    with pytest.raises(ValueError, match="names 'laier/kernel'"):
        projection_plan(
            leaf, 2, weight_dimension_numbers={"laier": {"kernel": WeightDimensionNumbers()}}
        )
    with pytest.raises(TypeError, match="must hold WeightDimensionNumbers or None, got int at"):
        projection_plan(leaf, 2, weight_dimension_numbers={"layer": {"kernel": 3}})
    with pytest.raises(TypeError, match=r"'steps' has dtype int32.*hand it to the loss"):
        projection_plan({"steps": jnp.zeros(3, jnp.int32)}, 2)
    with pytest.raises(ValueError, match="Two leaves"):
        projection_plan({"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}, 2)  # fmt: skip


def test_a_plan_without_projections_warns_at_init():
    with pytest.warns(UserWarning, match="No leaf is projected.*rank = 128"):
        lorenza_optax.lorenza(1e-3).init({"kernel": jnp.ones((8, 8))})


def test_what_a_granularity_does_not_cut_runs_in_full():
    params = {"body": jnp.ones((64, 64)), "head": jnp.ones((64, 3))}
    plan = functools.partial(lorenza_optax.projection_plan, params, granularity=16)
    assert set(plan(1).projected) == {"body"}
    assert "cannot be cut" in plan(1).leaves["head"].reason
    assert not plan(lambda path, shape: 0).projected
    with pytest.raises(ValueError, match="granularity of leaf 'head'"):
        plan(1, weight_dimension_numbers=lorenza_optax.WeightDimensionNumbers())
