"""LORENZA inside trainers that know nothing of it, unmodified.

tunix brings some sixty packages, so it has an extra of its own: pip install -e '.[trainers]'.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lorenza_optax
from lorenza_optax import momentum_sam_eval_params

INPUTS, OUTPUTS = 16, 12


def _data(size=64):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((size, INPUTS)).astype(np.float32)
    return x, np.sin(x @ rng.standard_normal((INPUTS, OUTPUTS))).astype(np.float32)


def _optimizer():
    low_rank = lorenza_optax.lorenza(1e-2, rank=4, update_proj_gap=5)
    return lorenza_optax.momentum_sam(low_rank, rho=0.1)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(OUTPUTS)(jnp.tanh(linen.Dense(24)(x)))


@pytest.mark.slow
def test_numpyros_stochastic_variational_inference():
    numpyro = pytest.importorskip("numpyro")
    modules = pytest.importorskip("numpyro.contrib.module")
    x, y = _data()

    def model(x, y):
        predicted = modules.flax_module("net", LinenNet(), input_shape=(INPUTS,))(x)
        noise = numpyro.distributions.Normal(predicted, 1.0).to_event(1)
        numpyro.sample("y", noise, obs=y)

    svi = numpyro.infer.SVI(model, lambda x, y: None, _optimizer(), numpyro.infer.Trace_ELBO())
    result = svi.run(jax.random.key(0), 60, x, y, progress_bar=False)
    assert result.losses[-1] < result.losses[0] - 100
    _, (params, opt_state) = result.state.optim_state
    _assert_perturbed(params, opt_state)
    clean = svi.evaluate(result.state._replace(optim_state=(
        60, (momentum_sam_eval_params(opt_state, params), opt_state))), x, y)  # fmt: skip
    assert clean < result.losses[0] - 100


def _assert_perturbed(params, opt_state):
    """The trainer holds a point that lies rho from the one it is to be judged at."""
    clean = momentum_sam_eval_params(opt_state, params)
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, params, clean))
    np.testing.assert_allclose(distance, 0.1, rtol=1e-3)
    (state,) = (
        node for node in jax.tree.leaves(opt_state, is_leaf=_is_low_rank) if _is_low_rank(node)
    )
    assert state.q or state.r
    assert int(state.last_refresh) >= 5


def _is_low_rank(node):
    return isinstance(node, lorenza_optax.LowRankState)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(INPUTS, 24, rngs=rngs)
        self.outer = nnx.Linear(24, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        return self.outer(jnp.tanh(self.inner(x)))


def _tunix(folder, steps, accumulation=None):
    trainers = pytest.importorskip("tunix.sft.peft_trainer")
    import orbax.checkpoint as ocp

    x, y = _data()
    batches = [{"x": jnp.asarray(x), "y": jnp.asarray(y)}] * (steps * (accumulation or 1))
    config = trainers.TrainingConfig(
        eval_every_n_steps=1000,
        max_steps=steps,
        gradient_accumulation_steps=accumulation,
        checkpoint_root_directory=folder and str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1),
    )
    model = NnxNet(nnx.Rngs(0))
    loss = lambda model, x, y: jnp.mean((model(x) - y) ** 2)  # noqa: E731
    trainer = trainers.PeftTrainer(model, _optimizer(), config).with_loss_fn(loss)
    before = loss(model, x, y)
    trainer.train(batches)
    trainer.close()
    return trainer, before, functools.partial(loss, x=x, y=y)


@pytest.mark.parametrize("accumulation", [None, 2])
def test_tunixs_trainer(accumulation):
    trainer, before, loss = _tunix(None, 12, accumulation)
    assert loss(trainer.model) < before
    params = nnx.as_pure(nnx.state(trainer.model, nnx.Param))
    _assert_perturbed(params, nnx.as_pure(trainer.optimizer.opt_state))


def test_tunixs_trainer_resumes_from_its_checkpoint(tmp_path):
    whole, _, loss = _tunix(tmp_path / "whole", 10)
    _tunix(tmp_path / "parts", 6)
    resumed, before, _ = _tunix(tmp_path / "parts", 10)
    assert before < loss(NnxNet(nnx.Rngs(0)))  # it did not begin anew
    states = [nnx.as_pure(nnx.state(t.model, nnx.Param)) for t in (whole, resumed)]
    for one, two in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
