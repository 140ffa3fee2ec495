"""Flax loops as people write them: what a step says, refuses, hands on and leaves in the model."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lorenza_optax
from lorenza_optax import methods
from lorenza_optax.flax import TrainState, nnx_train_step

X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
GRADIENTS = {"update": {}, "perturbed": {"rho": 0.1}, "subspace": {"rho": 0.1, "rank": 2}}


def square(model, x):
    return jnp.mean(model(x) ** 2)


def lorenza(rho=0.1, **arguments):
    return lorenza_optax.lorenza(1e-2, rank=2, rho=rho, **arguments)


def make(tx, rngs=0):
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(rngs))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


# What a step says of a loss that is not finite.


@pytest.mark.parametrize(
    ("tx", "recovers"),
    [
        (optax.chain(methods.sam(0.05), optax.adamw(1e-2)), False),
        (optax.chain(lorenza_optax.zo_sam_perturbation(0.05), optax.adamw(1e-2)), False),
        (optax.chain(methods.sam(0.05), methods.galore(1e-2, rank=2)), True),
        (lorenza(), True),
    ],
    ids=["sam", "zo_sam", "sam and galore", "lorenza"],
)
def test_a_loss_that_is_not_finite_is_told_by_every_stage(tx, recovers):
    model, optimizer = make(tx)
    step = nnx.jit(nnx_train_step(square))
    values = [float(step(model, optimizer, X * (np.nan if i == 1 else 1))) for i in range(4)]
    assert [np.isfinite(v) for v in values] == [True, False, recovers, recovers]
    told = lorenza_optax.diagnostics(nnx.as_pure(optimizer.opt_state))
    [value, *_] = [scalar for name, scalar in told.items() if name.endswith("value")]
    assert np.isfinite(value) == recovers


# Objects of NNX among the arguments of a loss, and variables that it makes.


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_rngs_and_metrics_may_be_arguments(gradient):
    def loss(model, x, rngs, metric=None):
        kept = rngs.bernoulli(0.5, x.shape)
        value = jnp.mean(model(jnp.where(kept, x, 0.0)) ** 2)
        metric.update(values=jax.lax.stop_gradient(value))
        return value

    model, optimizer = make(lorenza())
    rngs, metric = nnx.Rngs(3), nnx.metrics.Average()
    first = float(loss(make(lorenza())[0], X, nnx.Rngs(3), nnx.metrics.Average()))
    step = nnx.jit(nnx_train_step(loss, gradient=gradient, **GRADIENTS[gradient]))
    for done in range(1, 4):
        step(model, optimizer, X, rngs, metric=metric)
        assert int(rngs.default.count[...]) == done  # all points of a step draw the same
        assert int(metric.count[...]) == done
        if done == 1 and gradient != "subspace":  # there is no subspace yet to perturb in
            assert float(metric.total[...]) == pytest.approx(first, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_model_that_sows_keeps_variables(gradient):
    class Sowing(nnx.Linear):
        def __call__(self, x):
            y = super().__call__(x)
            self.sow(nnx.Intermediate, "seen", y, reduce_fn=lambda _, new: new)
            return y

    model = Sowing(6, 5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lorenza(), wrt=nnx.Param)
    step = nnx.jit(nnx_train_step(square, gradient=gradient, **GRADIENTS[gradient]))
    losses = [float(step(model, optimizer, X)) for _ in range(3)]
    assert losses[2] < losses[0]
    assert isinstance(model.seen, nnx.Intermediate)
    assert model.seen[...].shape == (4, 5)


# What the optimizer would not do as one expects.


@pytest.mark.parametrize("wrap", [
    lambda tx: optax.MultiSteps(tx, 2),
    lambda tx: optax.masked(tx, {"kernel": True, "bias": False}),
])  # fmt: skip
def test_wrappers_are_refused_before_optax_meets_none(wrap):
    params = {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)}
    state = TrainState.create(apply_fn=None, params=params, tx=wrap(lorenza()))
    with pytest.raises(ValueError, match="perturbed_value_and_grad"):
        state.apply_gradients(value_fn=lambda p: jnp.sum(p["kernel"] ** 2))
    model, optimizer = make(optax.MultiSteps(lorenza(), 2))
    with pytest.raises(ValueError, match="MultiSteps.*perturbed_value_and_grad"):
        nnx_train_step(square)(model, optimizer, X)


def test_stages_in_front_are_warned_of():
    model, optimizer = make(optax.chain(optax.clip_by_global_norm(1e-6), lorenza()))
    with pytest.warns(UserWarning, match="in front of it do not see"):
        nnx_train_step(square)(model, optimizer, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nnx_train_step(square, gradient="perturbed", rho=0.1)(model, optimizer, X)
        for tx in (
            optax.chain(lorenza(), optax.scale(0.5)),
            optax.chain(methods.sam(0.05), optax.clip_by_global_norm(1.0), optax.sgd(1e-2)),
        ):
            nnx_train_step(square)(*make(tx), X)


def test_an_argument_that_is_a_field_too_reaches_the_loss():
    class State(TrainState):
        dropout_key: jax.Array | None = None

    def loss(params, x, dropout_key=None):
        scale = 1.0 if dropout_key is None else jax.random.uniform(dropout_key)
        return scale * jnp.mean((x @ params["kernel"]) ** 2)

    params, key = {"kernel": jnp.ones((6, 5))}, jax.random.key(3)
    state = State.create(apply_fn=None, params=params, tx=lorenza(rho=0.0))
    new = state.apply_gradients(value_fn=loss, x=X, dropout_key=key)
    told = float(lorenza_optax.diagnostics(new.opt_state)["value"])
    assert told == pytest.approx(float(loss(params, X, key)), rel=1e-6)
    assert new.dropout_key is key
