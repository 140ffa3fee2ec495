"""lorenza_optax in a Flax linen `TrainState`, whose `apply_gradients` takes gradients only.

`perturbed_value_and_grad` stands where `jax.value_and_grad` stood: it finds the ascent point from
the state that `lorenza` keeps and returns the gradient there. That gradient can be treated like
any other, here clipped, before `lorenza` projects it.

    python examples/linen_train_state.py
"""

import argparse
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import lorenza_optax

CONTEXT, BATCH = 16, 256

# The two halves must agree on the ascent, so its arguments are written once.
ASCENT = {"rho": 0.05, "mu": 1e-3, "num_probes": 1}


class NextByte(nn.Module):
    """Predicts a byte from the CONTEXT bytes before it."""

    width: int = 32
    hidden: int = 256

    @nn.compact
    def __call__(self, context):
        x = nn.Embed(256, self.width)(context)
        x = x.reshape(len(context), CONTEXT * self.width)
        x = nn.gelu(nn.Dense(self.hidden)(x))
        x = x + nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x)))
        return nn.Dense(256)(nn.LayerNorm()(x))


def create_state(seed):
    model = NextByte()
    variables = model.init(jax.random.key(seed), jnp.zeros((1, CONTEXT), jnp.int32))
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        lorenza_optax.lorenza(5e-3, rank=32, update_proj_gap=50, seed=seed, **ASCENT),
    )
    return TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)


@jax.jit
def train_step(state, batch):
    def loss(params, batch):
        logits = state.apply_fn({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1]).mean()

    value_and_grad = lorenza_optax.perturbed_value_and_grad(loss, **ASCENT)
    value, grads = value_and_grad(state.params, batch, opt_state=state.opt_state)
    return state.apply_gradients(grads=grads), value


def main(steps=300, seed=0):
    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(seed)
    state = create_state(seed)
    losses = []
    for step in range(steps):
        starts = rng.integers(0, len(text) - CONTEXT, size=(BATCH, 1))
        batch = text[starts + np.arange(CONTEXT + 1)].astype(np.int32)
        state, value = train_step(state, batch)
        losses.append(float(value))
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
