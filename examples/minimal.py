"""The shortest use of lorenza_optax: plain functions, and a loss handed to `update`.

A two-layer network learns to predict the next byte of a Python source file from 16 others.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import optax

import lorenza_optax

CONTEXT, WIDTH, HIDDEN, BATCH = 16, 32, 256, 256


def init(key):
    keys = jax.random.split(key, 3)
    return {
        "embedding": jax.random.normal(keys[0], (256, WIDTH)),
        "hidden": jax.random.normal(keys[1], (CONTEXT * WIDTH, HIDDEN)) / (CONTEXT * WIDTH) ** 0.5,
        "out": jax.random.normal(keys[2], (HIDDEN, 256)) / HIDDEN**0.5,
    }


def loss(params, batch):
    x = params["embedding"][batch[:, :-1]].reshape(len(batch), -1)
    logits = jax.nn.gelu(x @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1]).mean()


tx = lorenza_optax.lorenza(learning_rate=5e-3, rank=32, update_proj_gap=50, rho=0.05)


@jax.jit
def train_step(params, opt_state, batch):
    # The gradient is taken inside, at the perturbed point: there is none to hand in.
    updates, opt_state = tx.update(None, opt_state, params, value_fn=loss, batch=batch)
    return optax.apply_updates(params, updates), opt_state, optax.tree.get(opt_state, "value")


def main(steps=301):
    text = jnp.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), dtype=jnp.uint8)
    params = init(jax.random.key(0))
    opt_state = tx.init(params)
    losses = []
    for step in range(steps):
        starts = jax.random.randint(jax.random.key(step), (BATCH, 1), 0, len(text) - CONTEXT)
        batch = text[starts + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
        params, opt_state, value = train_step(params, opt_state, batch)
        losses.append(float(value))
        if step % 50 == 0:
            print(f"step {step:4d}  loss {value:.3f}")
    return losses


if __name__ == "__main__":
    main()
