"""OwLore: against its reference, what it keeps, what moves, and which leaves are layers."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lorenza_optax
from lorenza_optax import WeightDimensionNumbers, projection_plan
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._layerwise.layer_stacks import outlier_ratios, sampled
from lorenza_optax._layerwise.layers import find_layers
from lorenza_optax.methods import galore, owlore
from tests import problems
from tests.reference import owlore as reference

LAYERS = 5
LAYER = {"attention": (8, 3, 4), "kernel": (8, 12), "bias": (12,)}
REST = {"head": (15, 6), "bias": (6,)}
NUMBERS = {"attention": WeightDimensionNumbers(0, (1, 2)), "kernel": WeightDimensionNumbers()}
# The layers' axis is the second, as linen's scan may put it.
STACKED = {
    "attention": WeightDimensionNumbers(0, (2, 3)),
    "kernel": WeightDimensionNumbers(0, 2),
}
COMMON = {"rank": 3, "update_proj_gap": 3, "sampling_interval": 4, "num_layers": 2}


def _model(seed=0, dtype=np.float32):
    """Layers of their own, the later ones with more outliers."""
    layers = [problems.params(10 * seed + i, dtype, LAYER) for i in range(LAYERS)]
    for i, layer in enumerate(layers):
        layer["kernel"] = layer["kernel"].at[0, : 1 + i].mul(20.0)
    return {"layers": layers, **problems.params(10 * seed + 9, dtype, REST)}


def _stack(params):
    layers = params["layers"]
    stacked = {k: jnp.stack([layer[k] for layer in layers], 1) for k in LAYER}
    return {**params, "layers": stacked}


def _numbers(params):
    def of(path, leaf):
        names = [getattr(key, "key", None) for key in path]
        if names[0] == "layers":
            return (STACKED if len(path) == 2 else NUMBERS).get(names[-1])
        return WeightDimensionNumbers() if leaf.ndim == 2 else None

    return jax.tree_util.tree_map_with_path(of, params)


def _tx(**changes):
    arguments = {"outlier_multiple": 3.0, "weight_dimension_numbers": _numbers, **COMMON, **changes}
    return owlore(0.03, **arguments)


def _named(tree):
    """2-D float64 arrays by path, as the reference sees them."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf, np.float64)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = leaf.reshape(len(leaf), -1) if leaf.ndim > 2 else leaf
    return found


def _run(tx, params, gradients, state=None):
    state, history = tx.init(params) if state is None else state, []
    step = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
def test_agrees_with_the_reference(stacked):
    steps = 10  # layers are sampled at 0, 4 and 8, and P is renewed at 3 and 7 too
    arrange = _stack if stacked else lambda tree: tree
    with jax.enable_x64(True):
        gradients = [_model(seed=t + 1, dtype=np.float64) for t in range(steps)]
        start = _model(dtype=np.float64)
        history = _run(_tx(), arrange(start), [arrange(g) for g in gradients])
        active = [np.asarray(state[0].active) for _, state in history]
        names = _named(start)
        expected = reference.run(
            names, lambda params, t: _named(gradients[t]), steps=steps, rank=3, gap=3, interval=4,
            active=active.__getitem__, learning_rate=0.03,
            projected={k for k, x in names.items() if x.ndim == 2},
        )  # fmt: skip
        before = start
        for t, ((params, state), record) in enumerate(zip(history, expected, strict=True)):
            wanted = jax.tree.map(
                lambda leaf, named: jnp.asarray(named).reshape(leaf.shape),
                start,
                jax.tree.unflatten(jax.tree.structure(start), record["params"].values()),
            )
            chex.assert_trees_all_close(params, arrange(wanted), rtol=1e-8, atol=1e-8)
            if not stacked:  # what is not trained moves by no bit
                still = set(range(LAYERS)) - set(active[t].tolist())
                for layer in still:
                    chex.assert_trees_all_equal(params["layers"][layer], before["layers"][layer])
                before = params
            assert int(state[0].layers.projected.count) == t % 4 + 1
            assert int(state[0].rest.projected.count) == t + 1
        assert len({tuple(one) for one in active}) > 1
        assert all(np.all(np.diff(one) > 0) and len(one) == 2 for one in active)


def test_keeps_state_for_the_trained_layers_only():
    def size(state):
        moments = jax.tree.leaves((state.q, state.r, state.projected, state.others))
        return sum(leaf.size for leaf in moments if leaf.ndim)

    one = _model()["layers"][0]
    layer = galore(1e-2, rank=3, weight_dimension_numbers=NUMBERS).init(one)[0]
    rest = galore(1e-2, rank=3).init(problems.params(shapes=REST))[0]
    for params in (_model(), _stack(_model())):
        state = _tx().init(params)[0]
        assert size(state.layers) == 2 * size(layer)
        assert size(state.rest) == size(rest)
        # And counts, a seed and scalars: not one array of all layers.
        total = sum(leaf.size for leaf in jax.tree.leaves(state))
        assert total - size(state.layers) - size(state.rest) < 40


def test_samples_in_proportion_to_outliers():
    params = _model()
    stacked, listed = (
        (find_layers(projection_plan(p, 3, weight_dimension_numbers=_numbers(p)), None), p)
        for p in (_stack(params), params)
    )
    expected = [
        reference.outlier_ratio([np.asarray(layer["attention"]), np.asarray(layer["kernel"])], 3.0)
        for layer in params["layers"]
    ]
    for layers, tree in (stacked, listed):
        assert layers.number == LAYERS
        ratios = outlier_ratios(layers, leaves_by_path(tree), 3.0)
        np.testing.assert_allclose(ratios, expected, rtol=1e-6)
    ratios = jnp.array([3.0, 1.0, 0.0, 0.0])
    draws = jax.vmap(lambda key: sampled(key, ratios, 1)[0])(
        jax.random.split(jax.random.key(0), 4000)
    )
    shares = np.bincount(draws, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.75, 0.25, 0, 0], atol=0.03)
    draws = jax.vmap(lambda key: sampled(key, ratios, 3))(jax.random.split(jax.random.key(1), 999))
    assert np.all(draws[:, :2] == np.array([0, 1]))
    assert 0.4 < np.mean(draws[:, 2] == 2) < 0.6


@pytest.mark.slow
def test_draws_by_scores_that_are_given():
    params = _model()
    for seed in range(5):
        tx = _tx(layer_scores=[0, 3, 0, 1, 0], seed=seed)
        ((_, state),) = _run(tx, params, [_model(seed=1)])
        assert list(state[0].active) == [1, 3]


def test_decay_and_clipping_are_of_what_is_trained():
    params, gradient = _model(), _model(seed=3)
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    ((after, state),) = _run(_tx(weight_decay=0.5), params, [zeros])
    for layer in range(LAYERS):
        factor = 1 - 0.03 * 0.5 if layer in state[0].active else 1.0
        shrunk = jax.tree.map(lambda p, factor=factor: p * factor, params["layers"][layer])
        chex.assert_trees_all_close(after["layers"][layer], shrunk, rtol=1e-6)
    chex.assert_trees_all_close(after["head"], params["head"] * (1 - 0.03 * 0.5), rtol=1e-6)

    spy = optax.GradientTransformation(lambda params: zeros, lambda u, state, _: (u, u))
    tx = _tx(gradient_transform=spy, scale=lambda count: 1.0 * (count > 0))
    updates, state = jax.jit(tx.update)(gradient, tx.init(params), params)
    seen = state[0].gradient_transform
    for layer in range(LAYERS):
        kept = gradient["layers"][layer] if layer in state[0].active else zeros["layers"][layer]
        chex.assert_trees_all_equal(seen["layers"][layer], kept)
    assert not np.any(updates["head"])
    assert np.any(updates["bias"])


@pytest.mark.parametrize(
    "dtype", [problems.slow(jnp.float32), jnp.bfloat16], ids=["float32", "bfloat16"]
)
def test_trains_with_stable_types_and_one_trace(dtype):
    params, target = _stack(_model(dtype=dtype)), _stack(_model(seed=1))
    tx = _tx(subspace="randomized_svd", weight_decay=1e-3, outlier_multiple=1.5)
    state = tx.init(params)
    before = problems.quadratic(params, target)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, new = tx.update(None, state, params, value_fn=problems.quadratic, target=target)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        return optax.apply_updates(params, updates), new

    seeds = set()
    for _ in range(9):
        params, state = step(params, state)
        seeds.add(tuple(state[0].layers.ascent.seed.tolist()))
    assert len(seeds) == 3  # one a sampling: a stack's own count begins at 0 each time
    assert problems.quadratic(params, target) < before
    assert all(leaf.size for leaf in jax.tree.leaves(state)), "Orbax refuses empty arrays"
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))
    scalars = lorenza_optax.diagnostics(state)
    assert 0 < scalars["0/layers/captured_energy"] <= 1
    assert scalars["0/rest/value"] == scalars["0/layers/value"] < before


def test_an_unusable_gradient_skips_the_update():
    params, gradients = _model(), [_model(seed=t) for t in range(1, 7)]
    tx = _tx()
    history = _run(tx, params, gradients[:2])
    params, state = history[-1]
    trained, idle = int(state[0].active[0]), min(set(range(LAYERS)) - set(state[0].active.tolist()))

    def poison(layer):
        bad = jax.tree.map(lambda g: g, gradients[2])
        bad["layers"][layer]["kernel"] = bad["layers"][layer]["kernel"].at[0, 0].set(jnp.nan)
        return bad

    updates, new = jax.jit(tx.update)(poison(trained), state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
    for part in ("layers", "rest"):
        for field in ("q", "r", "projected", "others"):
            old = getattr(getattr(state[0], part), field)
            chex.assert_trees_all_equal(getattr(getattr(new[0], part), field), old)
        assert int(getattr(new[0], part).skipped) == 1
    updates, new = jax.jit(tx.update)(poison(idle), state, params)  # is not looked at
    assert np.any(updates["head"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, new)))
    state = _run(tx, params, [poison(trained), *gradients[3:]], state)[-1][1]
    assert int(state[0].layers.skipped) == 1  # also after a sampling


@pytest.mark.slow
def test_checkpoints_maps_and_injection(tmp_path):
    params, gradients = _model(), [_model(seed=t) for t in range(1, 8)]
    tx = _tx(moment_dtype="bfloat16", subspace="randomized_svd")
    history = _run(tx, params, gradients)
    params, state = history[2]
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    chex.assert_trees_all_equal(mapped, state)
    restored = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
    resumed = _run(tx, params, gradients[3:], restored)
    chex.assert_trees_all_equal(resumed[-1], history[-1])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    chex.assert_trees_all_equal(restored, state)

    injected = optax.inject_hyperparams(owlore, lorenza_optax.structural_args(owlore))(
        learning_rate=0.03, weight_decay=0.1, outlier_multiple=3.0,
        weight_dimension_numbers=_numbers, **COMMON,
    )  # fmt: skip
    plain = _run(_tx(weight_decay=0.1), params, gradients[:3])
    chex.assert_trees_all_close(
        _run(injected, params, gradients[:3])[-1][0], plain[-1][0], rtol=1e-5
    )


def _found(shapes, pattern=None, numbers=None):
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda node: isinstance(node, tuple))
    plan = projection_plan(params, 2, weight_dimension_numbers=numbers)
    layers = find_layers(plan, pattern)
    return layers.number, {role.name for role in layers.roles}, set(layers.outside)


BLOCK = {"Dense_0": {"kernel": (6, 8)}, "Dense_1": {"kernel": (8, 6)}, "norm": {"scale": (6,)}}
NAMES = {"Dense_0/kernel", "Dense_1/kernel", "norm/scale"}
THREE = WeightDimensionNumbers(1, 2)
SCANNED = {"kernel": (4, 6, 8), "norm": {"scale": (4, 6)}}


@pytest.mark.parametrize(
    ("shapes", "pattern", "numbers", "expected"),
    [
        # linen's names; the two layers of a block are not alike, and lie inside others anyway
        ({"h_0": BLOCK, "h_1": BLOCK, "h_10": BLOCK, "head": (6, 9)}, None, None,
         (3, {f"h_N/{name}" for name in NAMES}, {"head"})),
        ({"a": [BLOCK] * 2, "b": [{"kernel": (6, 6)}] * 2}, None, None,
         (2, {*(f"a/N/{name}" for name in NAMES), "b/N/kernel"}, set())),
        ({"a": [BLOCK] * 2, "b": [{"kernel": (6, 6)}] * 3}, r"b/(\d+)/", None,
         (3, {"b/N/kernel"}, {f"a/{i}/{name}" for i in range(2) for name in NAMES})),
        ({"scan": SCANNED, "final": {"scale": (9,)}}, None, {"scan": {"kernel": THREE}},
         (4, {"scan/kernel", "scan/norm/scale"}, {"final/scale"})),
        # blocks within one of several numbered parts
        ({"p_0": (9, 6), "p_1": {"h_0": (6, 6), "h_1": (6, 6)}}, None, None,
         (2, {"p_1/h_N"}, {"p_0"})),
        ({"wq": (4, 6, 8), "norm": (4, 6), "table": (9, 6)}, "^(?:wq|norm)$", {"wq": THREE},
         (4, {"wq", "norm"}, {"table"})),
    ],
)  # fmt: skip
def test_finds_layers(shapes, pattern, numbers, expected):
    assert _found(shapes, pattern, numbers) == expected


@pytest.mark.parametrize(
    ("shapes", "pattern", "numbers", "message"),
    [
        ({"a": (6, 8), "b": (8, 6)}, None, None, "No layers are found.*Leaves: a, b"),
        ({"a": (6, 8)}, "^b", None, r"layers='\^b' is in no path"),
        ({"a": [BLOCK] * 2, "b": [{"kernel": (6, 6)}] * 3}, None, None, "disagree.*b/N/kernel: 3"),
        ({"a": [(6, 8), (6, 9)]}, r"a/(\d+)", None, r"'a/N'.*a/0 \(6, 8\), a/1 \(6, 9\)"),
        ({"a": (6, 8)}, "a", None, "'a' of shape .* has no axis for them"),
        ({"scan": SCANNED, "x": (3, 6, 8)}, "scan|x", {"x": THREE}, "disagree.*x: 3"),
        ({"a": {"b": (6, 8)}}, "a/(.)", None, "must be a layer's number, got 'b'"),
        (
            {
                "b_0": {"d_0": (6, 6), "d_1": (6, 6), "proj": (6, 6)},
                "b_1": {"d_0": (6, 6), "d_1": (6, 6)},
            },
            None,
            None,
            "'b_0', 'b_1' and so on .* not alike in 'proj'",
        ),
    ],
)
def test_says_what_it_found_where_layers_are_not_clear(shapes, pattern, numbers, message):
    with pytest.raises(ValueError, match=message):
        _found(shapes, pattern, numbers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "("}, "no regular expression"),
        ({"layers": "(a)(b)"}, "2 groups"),
        ({"sampling_interval": 0}, "sampling_interval must be at least 1"),
        ({"outlier_multiple": -1.0}, "outlier_multiple must be at least 0"),
        ({"num_layers": 6}, "num_layers=6 exceeds the 5 layers"),
        ({"layer_scores": [1.0, -2.0]}, "layer_scores must be finite and at least 0"),
        ({"layer_scores": [1.0, 2.0]}, r"each of the 5 layers that are found, got shape \(2,\)"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        _tx(**arguments).init(_model())


def test_a_state_for_another_number_of_layers_is_refused():
    params = _model()
    with pytest.raises(ValueError, match="trains 3 layers at a time"):
        _tx().update(params, _tx(num_layers=3).init(params), params)
