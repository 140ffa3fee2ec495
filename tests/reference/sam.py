"""Reference SAM and ASAM: the gradient at the worst point near by, then SGD or Adam."""

import numpy as np

from . import adam
from .ascent import add, global_norm


def ascent(params, gradient, rho, adaptive=False, eta=0.01):
    """The perturbation of all leaves together; zero where the gradient is zero.

    SAM: epsilon = rho g / ||g||.  ASAM: epsilon = rho T^2 g / ||T g||, T = |w| + eta, elementwise
    and for biases too.
    """
    scales = {k: np.abs(x) + eta if adaptive else np.ones_like(x) for k, x in params.items()}
    scaled = {k: scales[k] * g for k, g in gradient.items()}
    norm = global_norm(scaled)
    if norm == 0:
        return {k: np.zeros_like(x) for k, x in params.items()}
    return {k: rho * scales[k] * x / norm for k, x in scaled.items()}


def run(
    params,
    grad,
    *,
    steps,
    learning_rate,
    rho,
    adaptive=False,
    eta=0.01,
    inner="sgd",
    b1=0.9,
    b2=0.999,
    eps=1e-8,
):
    """Run `steps` updates and return one record (dict) per update.

    epsilon from grad f(theta), g = grad f(theta + epsilon), both on batch t; theta - lr g ("sgd")
    or theta - lr Adam(g) ("adam").
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    state, history = adam.init({name: x.shape for name, x in params.items()}), []
    for t in range(steps):
        epsilon = ascent(params, grad(params, t), rho, adaptive, eta)
        update = gradient = grad(add(params, epsilon), t)
        if inner == "adam":
            update, state = adam.direction(state, gradient, b1, b2, eps)
        elif inner != "sgd":
            raise ValueError(f"unknown inner {inner!r}")
        params = add(params, update, -learning_rate)
        record = {"params": params, "epsilon": epsilon, "gradient": gradient, "inner": state}
        history.append(record)
    return history
