"""Both ways to the gradient at the ascent point, in and out of Optax's wrappers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorenza_optax
from lorenza_optax import lorenza, perturbed_value_and_grad, subspace_value_and_grad
from tests import problems

NUMBERS = problems.DIMENSION_NUMBERS
ASCENT = {"rho": 0.1, "num_probes": 2, "weight_dimension_numbers": NUMBERS}


@pytest.mark.parametrize(
    "dtype", [jnp.float32, problems.slow(jnp.bfloat16)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(
    "make",
    problems.few(
        ("lorenza", "lorenza_plus", "adazo_sam", "zo_sam_perturbation"), ("lorenza", "adazo_sam")
    ),
)
def test_both_ways_are_the_same(make, dtype):
    ascent = {"rho": 0.1, "num_probes": 2}
    if make.startswith("lorenza"):
        ascent = ASCENT
        more = {"refresh": "gradient"} if make == "lorenza" else {}
        tx = getattr(lorenza_optax, make)(1e-2, rank=3, update_proj_gap=2, **more, **ascent)
    elif make == "adazo_sam":
        tx = lorenza_optax.adazo_sam(1e-2, **ascent)
    else:
        tx = optax.chain(lorenza_optax.zo_sam_perturbation(**ascent), optax.sgd(1e-2))
    value_and_grad = perturbed_value_and_grad(problems.loss, **ascent)
    shapes = {name: problems.SHAPES[name] for name in ("wide", "attention", "bias")}
    if make.startswith("lorenza"):
        shapes = problems.SHAPES
    params = problems.params(dtype=dtype, shapes=shapes)
    opt_state = tx.init(params)

    # In one program, of which equal parts are computed once; the older emitters fuse them apart.
    @functools.partial(jax.jit, compiler_options=problems.OWN_EMITTERS)
    def both(params, opt_state, batch):
        first = tx.update(None, opt_state, params, value_fn=problems.loss, batch=batch)
        value, grads = value_and_grad(params, batch, opt_state=opt_state)
        return first, tx.update(grads, opt_state, params), value

    for t in range(3):
        first, second, value = both(params, opt_state, problems.batch(t, shapes=shapes))
        if make == "lorenza":  # its gradient in update is (x Q)ᵀ ∂y, and not Qᵀ (xᵀ ∂y)
            tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
            chex.assert_trees_all_close(first[0], second[0], rtol=tolerance, atol=tolerance * 1e-2)
        else:
            chex.assert_trees_all_equal(first[0], second[0])
        params, opt_state = optax.apply_updates(params, first[0]), first[1]
        np.testing.assert_array_equal(value, opt_state[0].ascent.value)
    assert bool(opt_state[0].ascent.perturbed)


def test_a_loss_may_name_its_arguments_as_it_likes():
    params = {"kernel": jnp.ones((16, 8))}
    state, still = lorenza(1e-2, rank=2, rho=0.0).init(params), {"rho": 0.0}
    loss = lambda p, *, has_aux, value_fn: has_aux * value_fn * jnp.sum(p["kernel"])  # noqa: E731
    for of in (
        perturbed_value_and_grad(loss, **still),
        subspace_value_and_grad(loss, rank=2, **still),
    ):
        assert of(params, opt_state=state, has_aux=2.0, value_fn=3.0)[0] == 768


def test_has_aux_and_arguments():
    def loss(params, scale, *, offset):
        value = problems.quadratic(params, jax.tree.map(jnp.zeros_like, params))
        return scale * value + offset, {"at": params["a"]}

    params = {"a": jnp.ones((8, 9))}
    tx = lorenza(1e-2, rank=2)
    _, state = tx.update(params, tx.init(params), params)
    (value, aux), grads = perturbed_value_and_grad(loss, has_aux=True, rho=0.5)(
        params, 2.0, offset=1.0, opt_state=state
    )
    np.testing.assert_allclose(jnp.linalg.norm(aux["at"] - params["a"]), 0.5, rtol=1e-5)
    chex.assert_trees_all_close(grads["a"], 2 * aux["at"], rtol=1e-5)
    np.testing.assert_allclose(value, jnp.sum(aux["at"] ** 2) + 1.0, rtol=1e-5)


def _masked(make):
    mask = {name: name != "tall" for name in problems.SHAPES}
    return optax.masked(make(), mask), {"tall"}


def _partition(make):
    labels = {name: "bias" if name in ("bias", "tall") else "lorenza" for name in problems.SHAPES}
    return optax.partition({"lorenza": make(), "bias": optax.sgd(0.1)}, labels), {"tall"}


WRAPPERS = {
    "chain": lambda make: (optax.chain(optax.clip_by_global_norm(1.0), make()), set()),
    "named_chain": lambda make: (optax.named_chain(("lorenza", make())), set()),
    "masked": _masked,
    "partition": _partition,
    "MultiSteps": lambda make: (
        optax.MultiSteps(make(), every_k_schedule=2).gradient_transformation(), set(),
    ),
    "apply_if_finite": lambda make: (optax.apply_if_finite(make(), 3), set()),
}  # fmt: skip


# test_wrappers.py has them all, with less to show
@pytest.mark.parametrize("wrapper", problems.few(WRAPPERS, ("chain", "MultiSteps")))
def test_state_is_found_in_wrappers(wrapper):
    tx, hidden = WRAPPERS[wrapper](lambda: lorenza(1e-2, rank=3, update_proj_gap=3, **ASCENT))
    params = problems.params()
    state = tx.init(params)

    def aux_loss(params, batch):
        return problems.loss(params, batch), params

    gradient = perturbed_value_and_grad(aux_loss, has_aux=True, **ASCENT)

    @jax.jit
    def step(params, state, batch):
        (_, point), grads = gradient(params, batch, opt_state=state)
        updates, state = tx.update(grads, state, params)
        epsilon = jax.tree.map(lambda a, b: a - b, point, params)
        return optax.apply_updates(params, updates), state, epsilon

    start = problems.loss(params, problems.batch())
    for t in range(6):
        params, state, epsilon = step(params, state, problems.batch())
        norm = optax.tree.norm(epsilon)
        if t >= 2:
            np.testing.assert_allclose(norm, 0.1, rtol=1e-4)
            for name, leaf in epsilon.items():
                assert np.all(leaf == 0) == (name in hidden or name == "bias"), name
    assert problems.loss(params, problems.batch()) < start


@pytest.mark.parametrize("make", ["lorenza", "adazo_sam", "zo_sam_perturbation"])
@pytest.mark.parametrize("wrapper", ["masked", "partition", "MultiSteps", "apply_if_finite"])
def test_value_fn_inside_a_wrapper_names_the_other_way(wrapper, make):
    factories = {
        "lorenza": lambda: lorenza(1e-2, rank=3, **ASCENT),
        "adazo_sam": lambda: lorenza_optax.adazo_sam(1e-2),
        "zo_sam_perturbation": lorenza_optax.zo_sam_perturbation,
    }
    tx, _ = WRAPPERS[wrapper](factories[make])
    params = problems.params()
    state = tx.init(params)
    with pytest.raises(ValueError, match=f"optax.{wrapper}.*perturbed_value_and_grad"):
        jax.jit(
            lambda g, s, p: tx.update(g, s, p, value_fn=problems.loss, batch=problems.batch())
        )(params, state, params)  # fmt: skip


def test_subspaces_that_are_not_kept_cannot_be_perturbed_in():
    tx = lorenza_optax.methods.apollo(1e-2, rank=2)
    params = {"w": jnp.ones((6, 8))}
    loss = lambda params: jnp.sum(params["w"] ** 2)  # noqa: E731
    with pytest.raises(ValueError, match="draws its subspaces anew"):
        perturbed_value_and_grad(loss)(params, opt_state=tx.init(params))
    plain = perturbed_value_and_grad(loss, rho=0.0)(params, opt_state=tx.init(params))[1]
    chex.assert_trees_all_close(plain, jax.grad(loss)(params))
    state = lorenza_optax.methods.galore(1e-2, rank=2).init(params)
    with pytest.raises(
        ValueError, match="never perturbs by itself.*ascent='subspace'.*methods.sam"
    ):
        perturbed_value_and_grad(loss)(params, opt_state=state)


@pytest.mark.slow
def test_several_states_share_one_norm():
    labels = {name: "tall" if name == "tall" else "rest" for name in problems.SHAPES}
    tx = optax.partition(
        {
            "tall": lorenza(1e-2, rank=2, seed=1, **ASCENT),
            "rest": lorenza(1e-2, rank=3, seed=2, **ASCENT),
        },
        labels,
    )
    params = problems.params()
    grads = jax.grad(problems.loss)(params, problems.batch())
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    loss = lambda p, b: (problems.loss(p, b), p)  # noqa: E731
    gradient = perturbed_value_and_grad(loss, has_aux=True, **ASCENT)
    (_, point), _ = jax.jit(lambda p: gradient(p, problems.batch(), opt_state=state))(params)
    epsilon = jax.tree.map(lambda a, b: a - b, point, params)
    np.testing.assert_allclose(optax.tree.norm(epsilon), 0.1, rtol=1e-4)
    assert all(np.any(epsilon[name] != 0) for name in problems.SHAPES if name != "bias")


def test_a_state_that_projects_nothing_does_not_stop_the_others():
    labels = {name: "bias" if name == "bias" else "rest" for name in problems.SHAPES}
    tx = optax.partition(
        {"rest": lorenza(1e-2, rank=3, **ASCENT), "bias": lorenza(1e-2, rank=3)}, labels
    )
    params = problems.params()
    with pytest.warns(UserWarning, match="No leaf is projected"):
        state = tx.init(params)
    grads = jax.grad(problems.loss)(params, problems.batch())
    _, state = jax.jit(tx.update)(grads, state, params)
    loss = lambda p, b: (problems.loss(p, b), p)  # noqa: E731
    gradient = perturbed_value_and_grad(loss, has_aux=True, **ASCENT)
    (_, point), _ = jax.jit(lambda p: gradient(p, problems.batch(), opt_state=state))(params)
    epsilon = jax.tree.map(lambda a, b: a - b, point, params)
    np.testing.assert_allclose(optax.tree.norm(epsilon), 0.1, rtol=1e-4)


def test_opt_state_without_lorenza_or_of_other_parameters():
    params = problems.params()
    gradient = perturbed_value_and_grad(problems.loss, **ASCENT)
    with pytest.raises(ValueError, match="holds no state of lorenza"):
        gradient(params, problems.batch(), opt_state=optax.adam(1e-3).init(params))
    state = lorenza(1e-2, rank=3, **ASCENT).init(params)
    fewer = {"wide": params["wide"]}
    with pytest.raises(ValueError, match=r"projects a leaf 'attention' that params do not have"):
        perturbed_value_and_grad(problems.loss)(fewer, problems.batch(), opt_state=state)
    with pytest.raises(ValueError, match=r"leaf 'attention'.*pass the weight_dimension_numbers"):
        perturbed_value_and_grad(problems.loss)(params, problems.batch(), opt_state=state)
    without = lorenza(1e-2, rank=3, rho=0.0, weight_dimension_numbers=NUMBERS).init(params)
    with pytest.raises(ValueError, match="rho=0"):
        gradient(params, problems.batch(), opt_state=without)
    both = (state, lorenza_optax.adazo_sam(1e-2).init(params))
    with pytest.raises(ValueError, match="both a state with an ascent in the full space"):
        gradient(params, problems.batch(), opt_state=both)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda p: p["a"][0], TypeError, "real scalar, got b?float(32|16) of shape"),
        (lambda p: jnp.argmax(p["a"]), TypeError, "real scalar, got int32"),
        (lambda p: (jnp.sum(p["a"]), 1), TypeError, "got a tuple.*has_aux=True"),
        (lambda p: None, TypeError, "got NoneType"),
    ],
)
@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_value_fn_must_return_a_scalar(loss, error, message, rho, dtype):
    params = {"a": jnp.ones((6, 8), dtype)}
    tx = lorenza(1e-2, rank=2, rho=rho)
    with pytest.raises(error, match=message):
        tx.update(None, tx.init(params), params, value_fn=loss)
    outside = perturbed_value_and_grad, functools.partial(subspace_value_and_grad, rank=2)
    message = message.replace("got a tuple.*", "got a tuple: pass ")
    for value_and_grad in outside if rho else ():
        with pytest.raises(error, match=message):
            value_and_grad(loss, rho=rho)(params, opt_state=tx.init(params))


def test_missing_arguments():
    params = {"a": jnp.ones((6, 8))}
    for tx in (lorenza(1e-2, rank=2), lorenza_optax.zo_sam_perturbation()):
        state = tx.init(params)
        with pytest.raises(ValueError, match=r"neither gradients nor value_fn=\. Call update\("):
            tx.update(None, state, params)
        with pytest.raises(ValueError, match="needs params"):
            tx.update(None, state, value_fn=lambda p: 0.0)
    tx = lorenza_optax.methods.mezo(1e-2)
    with pytest.raises(ValueError, match="estimates the gradient from values.*value_fn=loss"):
        tx.update(None, tx.init(params), params)


def test_value_fn_gets_the_arguments_that_it_names_and_no_others():
    params = {"a": jnp.ones((6, 8))}
    tx = optax.chain(lorenza(1e-2, rank=2), optax.scale(1.0))

    def loss(params, x, *, y=1.0, **rest):
        assert not rest
        return x * y * jnp.sum(params["a"] ** 2)

    _, state = tx.update(None, tx.init(params), params, value_fn=loss, x=2.0, y=0.5, unknown=3)
    np.testing.assert_allclose(state[0][0].ascent.value, 48.0)


def test_gradient_transform_acts_before_projection():
    shapes = {name: problems.SHAPES[name] for name in ("wide", "bias")}
    params, batch = problems.params(shapes=shapes), problems.batch(shapes=shapes)
    kwargs = {"rank": 3, "rho": 0.0, "base_optimizer": optax.identity()}
    tx = lorenza_optax.scale_by_lorenza(
        gradient_transform=optax.clip_by_global_norm(1e-3), **kwargs
    )
    updates, _ = tx.update(None, tx.init(params), params, value_fn=problems.loss, batch=batch)
    clipped, _ = optax.clip_by_global_norm(1e-3).update(
        jax.grad(problems.loss)(params, batch), optax.EmptyState()
    )
    plain = lorenza_optax.scale_by_lorenza(**kwargs)
    expected, _ = plain.update(clipped, plain.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-9)
    assert optax.tree.norm(updates) <= 1e-3
    # A stateful one keeps its state, and a gradient that is not finite does not spoil it.
    tx = lorenza_optax.scale_by_lorenza(gradient_transform=optax.trace(0.9), **kwargs)
    state = tx.init(params)
    _, state = tx.update(clipped, state, params)
    bad = jax.tree.map(lambda g: g * jnp.nan, clipped)
    _, after = tx.update(bad, state, params)
    chex.assert_trees_all_equal(after.gradient_transform, state.gradient_transform)
    assert np.any(after.gradient_transform.trace["wide"] != 0)
    # One that repairs the gradient may.
    tx = lorenza_optax.scale_by_lorenza(gradient_transform=optax.zero_nans(), **kwargs)
    _, state = tx.update(bad, tx.init(params), params)
    assert int(state.skipped) == 0


@settings(max_examples=5, deadline=None)
@given(
    depth=st.integers(0, 2),
    sizes=st.lists(st.tuples(st.integers(4, 7), st.integers(4, 7)), min_size=1, max_size=2),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_any_tree(depth, sizes, dtype):
    tree = [jnp.ones(size, dtype) for size in sizes]
    for level in range(depth):
        tree = {"level": tree} if level % 2 else (tree, jnp.ones(3, dtype))
    target = jax.tree.map(lambda p: 0.5 * jnp.ones(p.shape), tree)
    tx = lorenza(1e-1, rank=2, update_proj_gap=2)
    step = jax.jit(lambda p, s: tx.update(None, s, p, value_fn=problems.quadratic, target=target))
    state = tx.init(tree)
    for _ in range(2):
        updates, new = step(tree, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
        state = new
    assert bool(state[0].ascent.perturbed)
