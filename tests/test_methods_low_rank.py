"""GaLore, Fira, APOLLO, VLoRP, ProjFactor, Flora against references, and Optax's GaLore."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorenza_optax import WeightDimensionNumbers, methods
from lorenza_optax._low_rank.random_subspace import opened
from lorenza_optax._low_rank.renewal import projectors_of
from lorenza_optax._subspace.subspace import RANDOM
from tests import problems
from tests.gold import make_galore
from tests.reference import apollo as reference_apollo
from tests.reference import flora as reference_flora
from tests.reference import galore as reference_galore
from tests.reference import vlorp as reference_vlorp

STEPS, RANK, GAP = 9, 3, 4  # refreshes at 0, 4 and 8
COMMON = {"rank": RANK, "update_proj_gap": GAP}
gradient = jax.jit(jax.grad(problems.loss))


def _grad(params, t):
    at = problems.leaves(params)
    return problems.matrices(gradient(at, _batch(at, t)))


def _batch(params, t):
    return problems.batch(
        t, np.float64, {k: shape for k, shape in problems.SHAPES.items() if k in params}
    )


def _compare(method, reference, arguments, theirs, *, left_out=()):
    """Runs both, and hands the reference the projectors that the library has."""
    shapes = {k: shape for k, shape in problems.SHAPES.items() if k not in left_out}
    numbers = {k: problems.DIMENSION_NUMBERS[k] for k in shapes}
    with jax.enable_x64(True):
        tx = getattr(methods, f"scale_by_{method}")(weight_dimension_numbers=numbers, **arguments)
        # A chain does not tell its choices, and what is drawn depends on few of them.
        config = (
            getattr(tx.update, "config", None)
            or methods.scale_by_apollo(**COMMON, weight_dimension_numbers=numbers).update.config
        )
        start = params = problems.params(dtype=np.float64, shapes=shapes)
        plan = config.plan(params)
        update, open_ = jax.jit(tx.update), jax.jit(lambda state: opened(config, plan, state))
        state, history, projectors = tx.init(params), [], {}
        for t in range(STEPS):
            drawn = open_(_low_rank(state)) if config.subspace in RANDOM else None
            updates, state = update(gradient(params, _batch(params, t)), state, params)
            params = jax.tree.map(lambda p, u: p - 1e-2 * u, params, updates)
            history.append(problems.matrices(params))
            used = drawn or _low_rank(state)
            projectors[t] = _by_matrix(projectors_of(plan, used.q, used.r))
        if reference is not reference_galore:  # which has an SVD of its own
            theirs = theirs | {"projector": lambda name, t: projectors[t][name]}
        expected = reference.run(
            problems.matrices(start), _grad, steps=STEPS, rank=arguments["rank"],
            learning_rate=1e-2, projected=set(projectors[0]), **theirs,
        )  # fmt: skip
    for ours, record in zip(history, expected, strict=True):
        chex.assert_trees_all_close(ours, record["params"], rtol=1e-8, atol=1e-8)
    return history


def _low_rank(state):
    return state if hasattr(state, "q") else state[0]


def _by_matrix(projectors):
    found = {name: p for name, p in projectors.items() if name != "stacked"}
    return found | {f"stacked/{i}": p for i, p in enumerate(projectors.get("stacked", ()))}


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("galore", {"eps_before_correction": True, "eps": 1e-4}),
        ("fira", {"proj_type": "reverse_std"}),
        problems.slow("galore", {"proj_type": "reverse_std"}),
        problems.slow("fira", {"scale": 1.5}),
    ],
    ids=str,
)
def test_galore_and_fira_agree_with_the_reference(method, arguments):
    arguments = {"scale": 0.25} | arguments
    residual = {"residual": "fira"} if method == "fira" else {}
    _compare(method, reference_galore, COMMON | arguments, {"gap": GAP} | arguments | residual)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
def test_galore_compresses_the_side_that_the_published_code_does(shape):
    """It holds layers transposed, (outputs, inputs), and multiplies tall and square ones by V."""
    gradient = np.random.default_rng(0).normal(size=shape[::-1])
    outputs, inputs = gradient.shape
    u, _, vh = np.linalg.svd(gradient, full_matrices=False)
    if outputs >= inputs:
        expected = np.sign(gradient @ vh[:RANK].T) @ vh[:RANK]  # the sign is Adam's first step
    else:
        expected = u[:, :RANK] @ np.sign(u[:, :RANK].T @ gradient)
    kernel = {"kernel": jnp.asarray(gradient.T, jnp.float32)}
    tx = methods.scale_by_galore(**COMMON, scale=1.0)
    updates, _ = tx.update(kernel, tx.init(kernel), kernel)
    np.testing.assert_allclose(updates["kernel"], expected.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("scale_type", "proj_type"), [("channel", "std"), ("tensor", "reverse_std")]
)
def test_apollo_agrees_with_the_reference(scale_type, proj_type):
    chosen = {"scale_type": scale_type, "proj_type": proj_type, "scale": 2.0}
    _compare("apollo", reference_apollo, COMMON | chosen | {"seed": 5}, {"gap": GAP} | chosen)


@pytest.mark.parametrize(
    ("granularity", "transport", "eps_in_root", "left_out"),
    [(2, "keep", True, ["square"]), (0.5, "rotate", False, ["square", "tall"])],  # odd sides
)
def test_vlorp_agrees_with_the_reference(granularity, transport, eps_in_root, left_out):
    arguments = {"granularity": granularity, "eps_in_root": eps_in_root}
    _compare(
        "vlorp", reference_vlorp,
        {"rank": 2, "update_proj_gap": GAP, "moment_transport": transport} | arguments,
        {"gap": GAP, "transport": transport} | arguments, left_out=left_out,
    )  # fmt: skip


def test_projfactor_agrees_with_the_reference():
    arguments = COMMON | {"subspace": "svd", "moment_transport": "rotate"}
    _compare(
        "projfactor", reference_vlorp, arguments,
        {"gap": GAP, "granularity": 1, "transport": "rotate"},
    )  # fmt: skip


@pytest.mark.parametrize("normalize", ["after", "before"])
def test_flora_agrees_with_the_reference(normalize):
    chosen = {"normalize": normalize, "min_dim_size_to_factor": 9}  # of the square leaf
    # Optax's clipping and the sizes of parameters are those of the whole stack.
    _compare(
        "flora", reference_flora, COMMON | chosen, {"kappa": GAP} | chosen, left_out=["stacked"]
    )


@pytest.mark.parametrize("index", [0, 1])
def test_galore_agrees_with_its_authors_package(index):
    """To the 9 digits of the file, or to the float32 of galore-torch's SVD."""
    gold = json.loads(make_galore.PATH.read_text())
    settings, run = gold["settings"], gold["runs"][index]
    steps = settings.pop("steps")
    with jax.enable_x64(True):
        tx = methods.galore(**settings, eps=run["eps"], eps_before_correction=True)
        params = jax.tree.map(jnp.asarray, make_galore.START)
        state, update = tx.init(params), jax.jit(tx.update)
        for t in range(steps):
            grads = make_galore.gradients(jax.tree.map(np.asarray, params), t)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            expected = {name: np.array(values[t]) for name, values in run["params"].items()}
            chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-7)


def test_galore_compressing_the_longer_side_is_optax_galore():
    """Without a first moment: Optax leaves singular vectors the signs that they come with."""
    numbers = problems.DIMENSION_NUMBERS | {"stacked": None}  # Optax has no batch axes
    ours = methods.galore(
        1e-2, RANK, GAP, b1=0.0, proj_type="reverse_std", weight_dimension_numbers=numbers
    )
    theirs = optax.contrib.galore(
        1e-2, RANK, GAP, scale=0.25, base_optimizer=optax.scale_by_adam(b1=0.0),
        weight_dimension_numbers={
            k: n and optax.contrib.GaLoreDimensionNumbers(*n) for k, n in numbers.items()
        },
    )  # fmt: skip
    params = problems.params()
    runs = []
    for tx in (ours, theirs):
        state, update, history = tx.init(params), jax.jit(tx.update), []
        for t in range(STEPS):
            updates, state = update(problems.params(seed=t), state, params)
            history.append(updates)
        runs.append(history)
    chex.assert_trees_all_close(*runs, rtol=1e-3, atol=1e-6)


def test_fira_as_published_scales_the_projected_part_alone():
    params = {"kernel": jnp.zeros((16, 8))}
    g = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}

    def first(factory, **arguments):
        tx = factory(rank=RANK, **arguments)
        return tx.update(g, tx.init(params), params)[0]["kernel"]

    inside = first(methods.scale_by_galore, scale=1.0)  # P N
    whole = first(methods.scale_by_fira, scale=1.0)
    published = first(methods.scale_by_fira, scale=0.25, scale_added=False)
    # α P N + φ (G - α P ĝ), where φ P ĝ has as long rows as P N.
    rest = published - (0.25 * inside + whole - inside)
    lengths = [jnp.linalg.norm(x, axis=1) for x in (rest, inside)]
    np.testing.assert_allclose(lengths[0], 0.75 * lengths[1], rtol=1e-4)
    np.testing.assert_allclose(
        first(methods.scale_by_fira, scale=0.25), 0.25 * whole, rtol=1e-5, atol=1e-7
    )


SIZES = {
    # (m, n) = (24, 16), a stack of two and a bias of 5, r = 3, k = 16, l = 24.
    "galore": 3 * (2 * 3 * 24 + 3 * 16) + 2 * 5,
    "fira": 3 * (2 * 3 * 24 + 3 * 16 + 1) + 2 * 5,
    "apollo": 3 * (2 * 3 * 24 + 1) + 2 * 5,
    "projfactor": 3 * (3 * 24 + 3 * 16 + 24 + 16) + 2 * 5,
    "vlorp": 3 * (3 * 24 * 4 + 24 + 16) + 2 * 5,  # c = 4
    # Optax keeps an array of one number where it keeps none: 2 of the others, and 1 of V.
    "flora": 3 * 3 * 24 + (24 + 16 + 1) + (2 * (24 + 16) + 1) + 2 * 5 + 2,
}
# Of all: captured_energy, subspace_overlap, and of the ascent value and ascent_norm.
SCALARS = 4


@pytest.mark.parametrize("method", SIZES)
def test_states_have_the_size_that_the_papers_say(method):
    params = {"a": jnp.zeros((24, 16)), "b": jnp.zeros((2, 24, 16)), "bias": jnp.zeros(5)}
    numbers = {"a": WeightDimensionNumbers(), "b": WeightDimensionNumbers(1, 2), "bias": None}
    more = {"vlorp": {"granularity": 4}, "flora": {"min_dim_size_to_factor": 16}}.get(method, {})
    tx = getattr(methods, method)(1e-2, 3, weight_dimension_numbers=numbers, **more)
    state = jax.eval_shape(tx.init, params)
    found = [x.size for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert sum(found) == SIZES[method] + SCALARS


@pytest.mark.parametrize("method", ["flora", "projfactor"])
def test_a_gradient_that_is_not_finite_leaves_all_memory_as_it_is(method):
    params = {"a": jnp.ones((12, 8), jnp.bfloat16), "bias": jnp.ones(5)}
    tx = getattr(methods, method)(1e-2, RANK)
    update = jax.jit(tx.update)
    _, before = update(params, tx.init(params), params)
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(before) if x.ndim == 1)
    updates, after = update(jax.tree.map(lambda x: x * jnp.nan, params), before, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(optax.tree.get(after, "skipped")) == 1
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    chex.assert_trees_all_equal(
        *[[x for x in jax.tree.leaves(state) if is_float(x)] for state in (before, after)]
    )


def test_vlorp_takes_its_own_gradient_of_narrow_weights():
    """A loss that is no product with the weight, which W + P N could not be kept factored in."""
    params = {"kernel": jnp.ones((16, 8), jnp.bfloat16)}
    tx = methods.vlorp(1e-2, granularity=2)
    call = lambda state: tx.update(None, state, params, value_fn=problems.quadratic, target=params)  # noqa: E731
    updates, state = jax.eval_shape(call, tx.init(params))
    assert updates["kernel"].dtype == jnp.bfloat16
    assert state[0].projected.ema["kernel"].shape == (1, 32)
