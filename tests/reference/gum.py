"""Reference GUM: Muon in a subspace, debiased by blocks that train on what lies outside of it."""

import numpy as np

from . import adam
from .newton_schulz import newton_schulz
from .subspace import align, compressed_side, svd_factors


def run(
    params,
    grad,
    *,
    steps,
    rank,
    gap,
    full,
    q,
    projected,
    learning_rate,
    beta=0.95,
    scale=1.0,
    proj_type="std",
    **betas,
):
    """Run `steps` updates and return one record per update; betas: Adam's, for the other leaves.

    full(t) -> the names that are full-rank in the period that begins at t (t mod gap = 0), each
    with probability q. A period begins with P from the SVD of G, and with R = 0.
    low: R <- beta R + P^T G / (1 - q), U = P NS(R);
    full: R <- beta R + (G - P P^T G) / q, U = NS(R);  W <- W - lr scale U.
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    projected = sorted(projected)
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    others = adam.init({k: x.shape for k, x in params.items() if k not in projected})
    p, momentum, chosen, history = {}, {}, set(), []
    for t in range(steps):
        gradient = grad(params, t)
        update, others = adam.direction(others, {k: gradient[k] for k in others["m"]}, **betas)
        chosen = set(full(t)) if t % gap == 0 else chosen
        for k in projected:
            g = gradient[k].T if right[k] else gradient[k]
            if t % gap == 0:
                new, _, rest = svd_factors(g, rank)
                p[k], momentum[k] = align(new, rest, p[k])[0] if t else new, 0.0
            low = p[k].T @ g
            new = (g - p[k] @ low) / q if k in chosen else low / (1 - q)
            momentum[k] = beta * momentum[k] + new
            u = newton_schulz(momentum[k])
            u = scale * (u if k in chosen else p[k] @ u)
            update[k] = u.T if right[k] else u
        params = {k: x - learning_rate * update[k] for k, x in params.items()}
        record = {"params": params, "p": dict(p), "momentum": dict(momentum), "full": chosen}
        history.append(record | {"update": update})
    return history
