"""Bad arguments raise at construction, bad trees at init, each with what was found."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import lorenza_optax
from lorenza_optax import adazo_sam, lorenza, lorenza_plus, methods, zo_sam_perturbation
from tests import problems


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 2.5}, TypeError, "rank must be an int, got float"),
        ({"rank": True}, TypeError, "rank must be an int, got bool"),
        ({"update_proj_gap": 0}, ValueError, "update_proj_gap must be at least 1"),
        ({"num_probes": 0}, ValueError, "num_probes must be at least 1"),
        ({"probe_batch_size": 0}, ValueError, "probe_batch_size must be at least 1"),
        ({"perturb_every": 0}, ValueError, "perturb_every must be at least 1"),
        ({"mu": 0.0}, ValueError, "mu must be above 0.0, got 0.0"),
        ({"mu": -1e-3}, ValueError, "mu must be above 0.0, got -0.001"),
        ({"rho": float("nan")}, ValueError, "rho must be finite"),
        ({"rho": "big"}, TypeError, "rho must be a float or a schedule, got str"),
        ({"scale": None}, TypeError, "scale must be a float or a schedule"),
        ({"proj_type": "up"}, ValueError, "proj_type must be one of 'std', 'reverse_std'"),
        ({"moment_transport": "carry"}, ValueError, "moment_transport must be one of 'keep'"),
        ({"ascent": "sam"}, ValueError, "ascent must be one of 'zo'"),
        ({"estimator": "exact"}, ValueError, "estimator must be one of 'auto'"),
        ({"subspace": "pca"}, ValueError, "one of 'randomized_svd', 'svd', got 'pca'"),
        ({"factor_dtype": "int8"}, ValueError, "factor_dtype must be None or one of"),
        ({"moment_dtype": "float16"}, ValueError, "moment_dtype must be None or one of float32"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"base_optimizer": optax.adam(1e-3)}, ValueError, "parameters would ascend"),
        (
            {"base_optimizer": optax.adam(optax.linear_schedule(0, 1e-3, 10))},
            ValueError,
            "parameters would ascend",
        ),
        ({"base_optimizer": optax.scale_by_adam}, TypeError, r"scale_by_adam\(...\)"),
        ({"gradient_transform": optax.zero_nans}, TypeError, r"gradient_transform.*zero_nans\("),
        ({"rank": jnp.asarray(4)}, TypeError, "static_args=lorenza_optax.STRUCTURAL_ARGS"),
        ({"mask": jnp.asarray(1.0)}, TypeError, "mask must not be an array.*STRUCTURAL_ARGS"),
    ],
)
@pytest.mark.parametrize("factory", [lorenza, lorenza_plus])
def test_bad_arguments(factory, kwargs, error, message):
    with pytest.raises(error, match=message):
        factory(1e-3, **{"rank": 4, **kwargs})


@pytest.mark.parametrize("factory", [zo_sam_perturbation, lambda **kw: adazo_sam(1e-3, **kw)])
def test_bad_arguments_of_the_full_space_methods(factory):
    for kwargs, message in (
        ({"mu": 0.0}, "mu must be above"),
        ({"num_probes": 0}, "num_probes"),
        ({"estimator": "x"}, "estimator"),
        ({"seed": -2}, "seed"),
    ):
        with pytest.raises(ValueError, match=message):
            factory(**kwargs)


def test_bad_arguments_of_the_gradient():
    with pytest.raises(ValueError, match="mu must be above"):
        lorenza_optax.perturbed_value_and_grad(lambda p: 0.0, mu=-1.0)
    with pytest.raises(ValueError, match="add_back must be one of 'fira', 'sumo'"):
        lorenza_plus(1e-3, rank=4, add_back="both")


def test_inject_hyperparams_without_static_args_says_so():
    with pytest.raises(TypeError, match=r"must be an int.*STRUCTURAL_ARGS"):
        optax.inject_hyperparams(lorenza)(1e-3, rank=4).init(problems.params())


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (optax.add_decayed_weights(0.1), "base_optimizer needs params.*weight_decay="),
        (optax.scale_by_trust_ratio(), "needs params.*reads neither params nor the loss"),
        (optax.scale_by_novograd(), "needs params.*reads neither params nor the loss"),
        (optax.contrib.scale_by_muon(), "dict by path.*structure error.*for Muon,.*methods.gum"),
    ],
    ids=["decay", "trust", "novograd", "muon"],
)
def test_a_base_optimizer_that_needs_params(inner, message):
    with pytest.raises(ValueError, match=message):
        lorenza(1e-3, rank=2, base_optimizer=inner).init({"a": jnp.ones((4, 6))})


@pytest.mark.parametrize(
    "inner",
    [
        optax.scale_by_lion(), optax.scale_by_rms(), optax.trace(0.9), optax.scale_by_amsgrad(),
        optax.scale_by_adan(), optax.scale_by_yogi(), optax.scale_by_sm3(), optax.identity(),
        optax.chain(optax.clip(1.0), optax.scale_by_adam()), optax.scale_by_adamax(),
    ],
    ids=lambda inner: inner.update.__qualname__.split(".")[0],
)  # fmt: skip
def test_any_scale_by_transformation_goes_inside(inner):
    params = {"a": 0.1 * jnp.ones((6, 8)), "bias": jnp.ones(8)}
    tx = lorenza(1e-2, rank=2, update_proj_gap=2, base_optimizer=inner)
    state = tx.init(params)
    before = problems.quadratic(params, jax.tree.map(jnp.zeros_like, params))
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
    assert problems.quadratic(params, jax.tree.map(jnp.zeros_like, params)) < before


def test_a_base_optimizer_that_needs_an_extra_argument_gets_it():
    params = {"a": jnp.ones((6, 8))}
    inner = optax.chain(optax.scale_by_adam(), optax.contrib.reduce_on_plateau())
    tx = lorenza(1e-2, rank=2, base_optimizer=inner)
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    assert jnp.linalg.norm(updates["a"]) > 0
    tx = lorenza(1e-2, rank=2, base_optimizer=optax.scale_by_polyak())
    tx.update(params, tx.init(params), params, value=1.0)
    with pytest.raises(TypeError, match="base_optimizer reads the loss.*'value'.*Pass that to upd"):
        tx.update(params, tx.init(params), params)


def test_rotate_refuses_states_that_it_does_not_know():
    params = {"a": jnp.ones((6, 8))}
    for inner, field in (
        (optax.scale_by_amsgrad(), "nu_max"),
        (optax.scale_by_belief(), "no mean of squared gradients"),
        (optax.scale_by_adamax(), "no mean of squared gradients"),
        (optax.scale_by_sm3(), "SM3"),
    ):
        tx = lorenza(1e-3, rank=2, base_optimizer=inner, moment_transport="rotate")
        with pytest.raises(ValueError, match=f"'rotate' knows.*{field}"):
            tx.init(params)
    for inner in (optax.scale_by_lion(), optax.scale_by_rms(), optax.trace(0.9)):
        tx = lorenza(
            1e-3, rank=2, update_proj_gap=1, base_optimizer=inner, moment_transport="rotate"
        )
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(params, state, params)
        assert int(state[0].last_refresh) == 1


def test_leaves_that_cannot_be_trained_are_named():
    with pytest.raises(TypeError, match="'table' has dtype int32"):
        lorenza(1e-3, rank=2).init({"a": jnp.ones((4, 6)), "table": jnp.zeros(3, jnp.int32)})
    masked = optax.masked(lorenza(1e-3, rank=2), {"a": True, "table": False})
    masked.init({"a": jnp.ones((4, 6)), "table": jnp.zeros(3, jnp.int32)})


def test_a_state_of_another_rank_or_tree_says_what_differs():
    params = {"a": jnp.ones((6, 8))}
    state = lorenza(1e-3, rank=2).init(params)
    with pytest.raises(ValueError, match=r"holds \(6, 2\) as factor q of leaf 'a'.*\(6, 3\)"):
        lorenza(1e-3, rank=3).update(params, state, params)
    with pytest.raises(ValueError, match="factor q of leaf 'a'.*need nothing"):
        lorenza(1e-3, rank=2).update({"b": params["a"]}, state, {"b": params["a"]})


@pytest.mark.parametrize("ascent", ["momentum", "signed_momentum"])
def test_an_ascent_along_moments_that_are_not_kept(ascent):
    optimizer = {"base_optimizer": optax.scale_by_rms()}
    with pytest.raises(ValueError, match=f"ascent='{ascent}' needs a first moment"):
        lorenza_optax.lorenza(1e-2, ascent=ascent, **optimizer)
    with pytest.raises(ValueError, match="probe_factors='momentum' needs a first moment"):
        lorenza_optax.lorenza(1e-2, probe_factors="momentum", **optimizer)
    params = {"w": jnp.ones((8, 6))}
    state = lorenza_optax.lorenza(1e-2, rank=2, rho=0.0, **optimizer).init(params)
    gradient = lorenza_optax.perturbed_value_and_grad(lambda p: jnp.sum(p["w"]), ascent=ascent)
    with pytest.raises(ValueError, match="keeps none under any of the names"):
        gradient(params, opt_state=state)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: methods.galore(1e-2, subspace="unit_gaussian"), ValueError, "subspace must be"),
        (lambda: methods.lotus(1e-2, threshold=lambda count: 0.1), TypeError, "a schedule cannot"),
        (lambda: methods.lotus(1e-2, threshold=-1.0), ValueError, "threshold must be at least"),
        (lambda: lorenza(1e-2, subspace="gaussian"), ValueError, "'randomized_svd', 'svd', got"),
        (lambda: lorenza_plus(1e-2, subspace="svds"), ValueError, "'randomized_svd', 'svd', got"),
        (lambda: methods.mezo(1e-2, variant="best"), ValueError, "variant must be one of"),
        (lambda: methods.zo_muon(1e-2, others_scale=-1.0), ValueError, "others_scale must be at"),
    ],
)
def test_bad_arguments_of_the_family(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "mapped",
    [
        lambda f: f,
        jax.jit,
        lambda f: jax.vmap(f, axis_name="i"),
        lambda f: jax.jit(jax.vmap(f, axis_name="i")),
    ],
)
def test_an_axis_that_nothing_is_mapped_over(mapped):
    params = {"a": jnp.ones((6, 8))}
    tx = lorenza(1e-2, rank=2, axis_name="i")
    state, loss = tx.init(params), lambda p, x: x * jnp.sum(p["a"])
    step = mapped(lambda x: tx.update(None, state, params, value_fn=loss, x=x)[0])
    with pytest.raises(ValueError, match="axis_name='i' names no axis.*leave axis_name out"):
        step(jnp.ones(2))


def test_gradients_that_are_not_of_the_parameters():
    params = {"kernel": jnp.ones((16, 12)), "bias": jnp.ones(12)}
    tx = lorenza(1e-3, rank=4)
    state = tx.init(params)
    for kernel, found in ((jnp.ones((12, 16)), r"\(12, 16\)"), (None, "nothing")):
        with pytest.raises(ValueError, match=rf"has {found} for leaf 'kernel', .*\(16, 12\)"):
            tx.update({"kernel": kernel, "bias": jnp.ones(12)}, state, params)
    with pytest.raises(ValueError, match="'more', where the parameters have nothing"):
        tx.update({**params, "more": jnp.ones(3)}, state, params)
    tx = methods.gradnormlorp(1e-3, rank=4)
    with pytest.raises(ValueError, match=r"has \(12, 16\) for leaf 'kernel'"):
        tx.update({"kernel": jnp.ones((12, 16)), "bias": jnp.ones(12)}, tx.init(params), params)
    layers, tx = [params] * 3, methods.owlore(1e-3, rank=4, num_layers=2)
    for others in (2 * [params], 4 * [params]):
        with pytest.raises(ValueError, match="for leaf '[23]/(kernel|bias)'"):
            tx.update(others, tx.init(layers), layers)


@pytest.mark.parametrize(
    "make",
    [
        lambda: zo_sam_perturbation(),
        lambda: lorenza_optax.methods.sam(),
        lambda: lorenza_optax.methods.asam(),
        lambda: lorenza_optax.momentum_sam(optax.sgd(1e-3)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_stages_name_leaves_that_have_no_ascent(make, dtype):
    with pytest.raises(TypeError, match=r"Leaf 'a/b' has dtype.*must be real floats"):
        make().init({"a": {"b": jnp.ones(3, dtype)}})


def test_stages_of_the_gradient_are_not_passed_by():
    """Clipping, turns and what looks outside need all of the gradient, which sums lack."""
    clip = optax.clip_by_global_norm(1e-6)
    with pytest.raises(ValueError, match="gradient_transform takes the full gradient.*'gradient'"):
        lorenza(1e-3, rank=4, refresh="sketch", gradient_transform=clip)
    params = {"kernel": jnp.ones((16, 12))}
    plain = lorenza(1e-3, rank=4, rho=0.0)
    value_and_grad = lorenza_optax.subspace_value_and_grad(
        lambda p: jnp.sum(p["kernel"] ** 2), rank=4, rho=0.0
    )
    for tx in (
        lorenza(1e-3, rank=4, gradient_transform=clip),
        lorenza(1e-3, rank=4, stagger=True),
        lorenza_plus(1e-3, rank=4),
    ):
        _, gradients, _ = value_and_grad(params, opt_state=plain.init(params))
        with pytest.raises(ValueError, match="needs the full gradient at every update"):
            tx.update(gradients, tx.init(params), params)


def test_a_perturbation_in_the_parameters_outlives_no_subspace():
    params = {"kernel": jnp.ones((16, 12))}
    tx = lorenza_optax.momentum_sam(lorenza(1e-3, rank=4))
    value_and_grad = lorenza_optax.subspace_value_and_grad(lambda p: 0.0, rank=4)
    with pytest.raises(ValueError, match="momentum_sam keeps its perturbation in the parameters"):
        value_and_grad(params, opt_state=tx.init(params))


def test_states_can_be_donated_after_an_eager_init():
    params = {"a": jnp.ones((12, 16)), "b": jnp.ones((12, 16))}
    for tx in (
        lorenza(1e-3, rank=2, refresh="sketch"),
        optax.inject_hyperparams(lorenza_optax.momentum_sam)(optax.adam(0.1), rho=0.05),
    ):
        leaves = jax.tree.leaves(tx.init(params))
        buffers = [leaf.unsafe_buffer_pointer() for leaf in leaves if isinstance(leaf, jax.Array)]
        assert len(set(buffers)) == len(buffers)


def test_matrices_that_the_granularity_does_not_divide_are_named():
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((24, 24))}
    with pytest.warns(UserWarning, match=r"granularity does not fit them: b \(vectors of 24"):
        lorenza_optax.methods.vlorp(1e-3, rank=2, granularity=16).init(params)


def test_complex_matrices_are_not_decomposed():
    with pytest.raises(TypeError, match="real float dtype, got complex64"):
        lorenza_optax.randomized_svd(jnp.ones((6, 6), jnp.complex64), 2, jax.random.key(0))


def test_one_huge_loss_does_not_end_mezo():
    params = {"kernel": jnp.ones((6, 5))}
    tx = lorenza_optax.methods.mezo(1e-3, variant="adam")
    state = tx.init(params)
    for factor in (1.0, 1e21, 1.0):
        loss = lambda p, f=factor: f * jnp.sum((p["kernel"] - 2) ** 2)  # noqa: E731
        updates, state = tx.update(None, state, params, value_fn=loss)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state))
    assert jnp.any(updates["kernel"] != 0)


@pytest.mark.parametrize("name", ["cosmos", "projfactor"])
def test_a_count_at_its_end_stays_there(name):
    params = {"kernel": jnp.ones((16, 12))}
    tx = getattr(lorenza_optax.methods, name)(1e-3, rank=2)
    last = jnp.iinfo(jnp.int32).max
    state = optax.tree.set(tx.init(params), count=jnp.asarray(last, jnp.int32))
    updates, _ = tx.update(params, state, params)
    assert bool(jnp.all(jnp.isfinite(updates["kernel"])))
