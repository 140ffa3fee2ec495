"""Reference APOLLO: the raw gradient, scaled by what Adam would do to it in a random subspace."""

import numpy as np

from . import adam
from .low_rank import limit_growth
from .subspace import compressed_side


def run(
    params,
    grad,
    *,
    steps,
    rank,
    gap,
    projector,
    projected,
    learning_rate,
    scale=1.0,
    scale_type="channel",
    proj_type="std",
    growth_limit=1.01,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
):
    """Run `steps` updates and return one record (dict) per update.

    projector(name, t) -> P (k, rank), P ~ N(0, 1/rank), drawn when t mod gap = 0; moments are kept.
    low = P^T G,  N = Adam(low);  channel: s_j = ||N_:j|| / ||low_:j||;  tensor: s = ||N|| / ||low||
    (0 for a zero norm);  U = s G, limited to 1.01 of its previous norm;  W <- W - lr scale U.
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    projected = sorted(projected)
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    inner = adam.init({k: (rank, params[k].shape[0 if right[k] else 1]) for k in projected})
    full = adam.init({k: x.shape for k, x in params.items() if k not in projected})
    p, norms, history = {}, dict.fromkeys(projected), []
    axis = {"channel": 0, "tensor": None}[scale_type]
    for t in range(steps):
        gradient = grad(params, t)
        g = {k: gradient[k].T if right[k] else gradient[k] for k in projected}
        if t % gap == 0:
            p = {k: np.asarray(projector(k, t), np.float64) for k in projected}
        low = {k: p[k].T @ g[k] for k in projected}
        n_low, inner = adam.direction(inner, low, b1, b2, eps)
        update, full = adam.direction(full, {k: gradient[k] for k in full["m"]}, b1, b2, eps)
        factor = {}
        for k in projected:
            norm, low_norm = (np.sqrt(np.sum(x[k] ** 2, axis)) for x in (n_low, low))
            factor[k] = np.where(low_norm > 0, norm / np.where(low_norm > 0, low_norm, 1.0), 0.0)
            u, norms[k] = limit_growth(factor[k] * g[k], norms[k], growth_limit)
            update[k] = scale * (u.T if right[k] else u)
        params = {k: x - learning_rate * update[k] for k, x in params.items()}
        history.append({"params": params, "factor": factor, "norms": dict(norms), "inner": inner})
    return history
