"""The inner optimizer, part by part: the same numbers as at once, and no array of a leaf's size.

Here in 8 bits; test_stacks.py compares parts in float64, to round-off.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax import methods
from lorenza_optax._inner.inner import store_moments
from lorenza_optax._low_rank import inner_step
from lorenza_optax._plan import plan
from tests import problems

STACKED = lorenza_optax.WeightDimensionNumbers(1, 2)
NUMBERS = {"stack": STACKED, "flat": lorenza_optax.WeightDimensionNumbers(0, 1)}
# The last part of "embedding" and of "table" is shorter than the others, that of "rows" is not.
SHAPES = {
    "stack": (3, 16, 600), "flat": (40, 600), "embedding": (50, 128), "rows": (48, 128),
    "table": (5, 4, 300), "bias": (64,), "empty": (3, 0),
}  # fmt: skip


def take_parts(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(plan, "LARGE", 1)
    monkeypatch.setattr(inner_step, "LARGE_LAYER", 1)
    monkeypatch.setattr(inner_step, "PART", 4 * 600)


def run(tx, steps=6, unusable=4, takes_gradients=True):
    """Updates on random gradients, of which one is not finite, and the states after each."""
    params = problems.params(shapes=SHAPES)
    state, rng, seen = tx.init(params), np.random.default_rng(0), []

    def loss(params, gradients):
        return sum(jnp.sum(gradients[name] * leaf) for name, leaf in params.items())

    @jax.jit
    def update(gradients, state, params):
        if not takes_gradients:
            return tx.update(None, state, params, value_fn=loss, gradients=gradients)
        return tx.update(gradients, state, params)

    for step in range(steps):
        gradients = {
            name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
            for name, shape in SHAPES.items()
        }
        if step == unusable:
            gradients["bias"] = gradients["bias"].at[0].set(jnp.nan)
        updates, state = update(gradients, state, params)
        seen.append((updates, state))
    return seen


def to_nearest(monkeypatch):
    """Without the keys, which parts have of their own."""
    without = lambda new, dtype, _, kept: store_moments(new, dtype, None, kept)  # noqa: E731
    monkeypatch.setattr(inner_step, "store_moments", without)


LORENZA = {"rank": 4, "update_proj_gap": 2, "weight_dimension_numbers": NUMBERS}
FACTORIES = {
    "keep": lambda: lorenza_optax.scale_by_lorenza(**LORENZA, moment_dtype="int8"),
    "rotate": lambda: lorenza_optax.scale_by_lorenza(
        **LORENZA, moment_dtype="int8", moment_transport="rotate"
    ),
    "reset": lambda: lorenza_optax.scale_by_lorenza(
        **LORENZA, moment_dtype="int8", moment_transport="reset"
    ),
    "sketch": lambda: lorenza_optax.scale_by_lorenza(
        **LORENZA, moment_dtype="int8", refresh="sketch"
    ),
    "fira": lambda: methods.scale_by_fira(**LORENZA, moment_dtype="int8"),
}


@pytest.mark.filterwarnings("ignore:value_fn uses some projected leaves")
@pytest.mark.parametrize(
    "name",
    ["sketch", *map(problems.slow, ("keep", "rotate", "reset", "fira"))],
)
def test_parts_give_what_all_at_once_gives(name, monkeypatch):
    to_nearest(monkeypatch)
    how = {"takes_gradients": name != "sketch"}
    together = run(FACTORIES[name](), **how)
    take_parts(monkeypatch)
    taken = []
    original = inner_step._in_parts
    spy = lambda step, path, *rest: taken.append(path) or original(step, path, *rest)  # noqa: E731
    monkeypatch.setattr(inner_step, "_in_parts", spy)
    in_parts = run(FACTORIES[name](), **how)
    assert set(taken) == {"stack", "embedding", "rows", "table"}
    for (updates, state), (others, other) in zip(in_parts, together, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(state, other)
        assert int(state.projected.count) == int(other.projected.count)
        # A code that rounding puts on the other side of a half changes a step by a few percent.
        for path, update in updates.items():
            difference = np.abs(np.asarray(update) - np.asarray(others[path]))
            assert np.sum(difference > 1e-3) <= 0.02 * difference.size, path
            np.testing.assert_allclose(update, others[path], atol=0.15)


@pytest.mark.slow
def test_an_update_that_is_skipped_leaves_every_code(monkeypatch):
    take_parts(monkeypatch)
    # At a step that would have refreshed.
    (_, before), (updates, after) = run(FACTORIES["rotate"](), steps=5, unusable=4)[3:]
    assert int(after.skipped) == 1
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
    chex.assert_trees_all_equal(after.projected, before.projected)
    chex.assert_trees_all_equal(after.others, before.others)


def test_parts_draw_their_own_noise(monkeypatch):
    """Like parts of like gradients are rounded apart, so that errors do not add up."""
    take_parts(monkeypatch)
    params = {name: jnp.zeros(SHAPES[name]) for name in ("stack", "rows")}
    row = jnp.asarray(np.random.default_rng(0).standard_normal((1, 128)), jnp.float32)
    layer = jnp.asarray(np.random.default_rng(1).standard_normal((1, 16, 600)), jnp.float32)
    gradients = {"rows": jnp.tile(row, (48, 1)), "stack": jnp.tile(layer, (3, 1, 1))}
    tx = lorenza_optax.scale_by_lorenza(
        **LORENZA | {"weight_dimension_numbers": {"stack": STACKED}}, moment_dtype="int8"
    )
    _, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    for codes in (state.others.mu["rows"]["codes"], state.projected.mu["stack"]["codes"]):
        parts = codes.reshape(3, -1)
        assert all(np.any(parts[0] != part) for part in parts[1:])


@pytest.mark.slow
def test_an_optimizer_that_somebody_made_is_not_taken_apart(monkeypatch):
    """Nothing says that it treats each entry by itself."""
    take_parts(monkeypatch)
    monkeypatch.setattr(inner_step, "_in_parts", None)
    run(lorenza_optax.scale_by_lorenza(**LORENZA, moment_dtype="int8",
                                       base_optimizer=optax.scale_by_adam()))  # fmt: skip


def test_moments_are_decoded_for_a_part_at_a_time(monkeypatch):
    """8 bits save memory in the step, too, and not in its state only."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    shapes = {"stack": (16, 256, 1024), "embedding": (16 * 1024, 256)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    weights = 4 * sum(np.prod(shape) for shape in shapes.values())

    def held(tx):
        """Of a step that is given its gradient: temporaries, in copies of the weights."""

        def step(gradients, state, params):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        arguments = params, jax.eval_shape(tx.init, params), params
        compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes / weights

    def adam():
        nothing = lambda params: dict.fromkeys(params)  # noqa: E731
        arguments = {"rank": 1, "weight_dimension_numbers": nothing, "moment_dtype": "int8"}
        with pytest.warns(UserWarning, match="No leaf is projected"):
            return held(methods.galore(1e-3, **arguments))

    in_parts = adam()
    monkeypatch.setattr(inner_step, "is_elementwise", lambda inner: False)
    assert in_parts < 1.2 < 2 < adam()
