"""Reference GradNormLoRP: W = g v / ||v|| by output column; Adam on g, GaLore on v."""

import numpy as np

from . import adam
from .subspace import align, compressed_side, svd_factors


def split(gradient, v, g):
    """(dL/dv, dL/dg) from dL/dW, column by column: what changes ||v_:j|| does not change W."""
    norm = np.linalg.norm(v, axis=0)
    along = np.sum(gradient * v, axis=0) / norm
    return g / norm * (gradient - along * v / norm), along


def run(
    params,
    grad,
    *,
    steps,
    rank,
    gap,
    projected,
    learning_rate,
    scale=1.0,
    proj_type="std",
    **betas,
):
    """Run `steps` updates and return one record per update; betas: Adam's b1, b2 and eps.

    A kernel W is (inputs, outputs). Start: v = W, g_j = ||W_:j||. With P from the SVD of dL/dv
    every `gap` updates (moments are kept): v <- v - lr scale P Adam(P^T dL/dv), g and other leaves
    x <- x - lr Adam(dL/dx), W = g v / ||v||.
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    v = {k: params[k] for k in projected}
    g = {k: np.linalg.norm(params[k], axis=0) for k in projected}
    inner = adam.init({k: (rank, params[k].shape[0 if right[k] else 1]) for k in projected})
    full = adam.init({k: g[k].shape if k in projected else x.shape for k, x in params.items()})
    p, history = {}, []
    for t in range(steps):
        gradient, low = dict(grad(params, t)), {}
        for k in projected:
            dv, gradient[k] = split(gradient[k], v[k], g[k])
            dv = dv.T if right[k] else dv
            if t % gap == 0:
                new, _, rest = svd_factors(dv, rank)
                p[k] = align(new, rest, p[k])[0] if t else new
            low[k] = p[k].T @ dv
        n_low, inner = adam.direction(inner, low, **betas)
        update, full = adam.direction(full, gradient, **betas)
        params = {k: x - learning_rate * update[k] for k, x in params.items() if k not in g}
        for k in projected:
            lifted = (p[k] @ n_low[k]).T if right[k] else p[k] @ n_low[k]
            v[k] = v[k] - learning_rate * scale * lifted
            g[k] = g[k] - learning_rate * update[k]
            params[k] = g[k] * v[k] / np.linalg.norm(v[k], axis=0)
        history.append({"params": params, "v": dict(v), "g": dict(g), "p": dict(p)})
    return history
