"""Reference Adam: the direction only, without learning rate and without sign flip."""

import numpy as np


def init(shapes):
    """Zero state for leaves of the given shapes (dict name -> shape), sharing one step count."""
    return {
        "count": 0,
        "m": {name: np.zeros(shape) for name, shape in shapes.items()},
        "v": {name: np.zeros(shape) for name, shape in shapes.items()},
    }


def direction(state, grads, b1=0.9, b2=0.999, eps=1e-8):
    """One Adam step: (directions, new state); the arguments are left as they are.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  and with k the number of steps so far
    direction = m_hat / (sqrt(v_hat) + eps),  m_hat = m / (1 - b1^k),  v_hat = v / (1 - b2^k).
    """
    count = state["count"] + 1
    m = {name: b1 * state["m"][name] + (1 - b1) * g for name, g in grads.items()}
    v = {name: b2 * state["v"][name] + (1 - b2) * g**2 for name, g in grads.items()}
    directions = {
        name: (m[name] / (1 - b1**count)) / (np.sqrt(v[name] / (1 - b2**count)) + eps)
        for name in grads
    }
    return directions, {"count": count, "m": m, "v": v}
