"""Reference GaLore: Adam on P^T G with P from an SVD every `gap` updates; Fira adds the rest."""

import numpy as np

from . import adam
from .low_rank import lift
from .subspace import align, compressed_side, svd_factors


def run(
    params,
    grad,
    *,
    steps,
    rank,
    gap,
    learning_rate,
    projected,
    proj_type="std",
    scale=1.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_before_correction=False,
    residual=None,
    projector=None,
):
    """Run `steps` updates and return one record (dict) per update.

    theta - lr scale P Adam(P^T G), moments kept at a refresh; residual "fira" as low_rank.lift.
    eps_before_correction: m / (sqrt(v) + eps) times sqrt(1 - b2^k) / (1 - b1^k), as galore-torch.
    projector(name, t) -> P (k, r), if given, stands for the SVD and has its signs: those of
    singular vectors are open, kept moments depend on them, and LAPACK's may turn at a refresh.
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    projected, p, limiter, history = sorted(projected), {}, dict.fromkeys(projected), []
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    shapes = {k: (rank, params[k].shape[0 if right[k] else 1]) for k in projected}
    state = adam.init({k: shapes.get(k, x.shape) for k, x in params.items()})
    for t in range(steps):
        gradient = grad(params, t)
        g = {k: gradient[k].T if right[k] else gradient[k] for k in projected}
        if t % gap == 0 and projector:
            p = {k: np.asarray(projector(k, t), np.float64) for k in projected}
        elif t % gap == 0:
            new = {k: svd_factors(g[k], rank) for k in projected}
            p = {k: align(q, r, p[k])[0] if p else q for k, (q, _, r) in new.items()}
        low = gradient | {k: p[k].T @ g[k] for k in projected}
        # sqrt(v) + eps and sqrt(v_hat) + eps / sqrt(1 - b2^k) are the same up to the correction.
        correction = np.sqrt(1 - b2 ** (t + 1)) if eps_before_correction else 1.0
        update, state = adam.direction(state, low, b1, b2, eps / correction)
        for k in projected:
            lifted, limiter[k] = lift(p[k], g[k], low[k], update[k], residual, limiter[k])
            update[k] = scale * (lifted.T if right[k] else lifted)
        params = {k: x - learning_rate * update[k] for k, x in params.items()}
        history.append({"params": params, "projector": p, "low": low, "inner": state})
    return history
