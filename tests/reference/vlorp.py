"""Reference VLoRP: ProjFactor on a random projection of the gradient reshaped by a granularity."""

import numpy as np

from . import adam
from .subspace import compressed_side


def run(
    params,
    grad,
    *,
    steps,
    rank,
    gap,
    granularity,
    projector,
    projected,
    learning_rate,
    proj_type="std",
    transport="keep",
    eps_in_root=False,
    b1=0.9,
    b2=0.999,
    eps=1e-6,
):
    """Run `steps` updates; projector(name, t) -> P (k/c, rank) ~ N(0, 1/rank), if t mod gap = 0.

    fine(G) (k/c, l c): G^T reshaped row-major to (l c, k/c), transposed.  low = P^T fine(G),
    m <- b1 m + (1 - b1) low, kept at a resampling ("reset": 0, "rotate": P_new^T P_old m);
    O = coarse(P low), row <- b2 row + (1 - b2) sum_j O_ij^2, col alike, V = row col^T / sum(row);
    W <- W - lr sqrt(1 - b2^t')/(1 - b1^t') coarse(P m) / (sqrt(V) + eps),
    t' = t + 1; eps_in_root: / sqrt(V + eps).
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    full = adam.init({k: x.shape for k, x in params.items() if k not in projected})
    p, m, row, col = {}, *(dict.fromkeys(projected, 0.0) for _ in range(3))
    history = []
    for t in range(steps):
        gradient = grad(params, t)
        update, full = adam.direction(full, {k: gradient[k] for k in full["m"]}, b1, b2, eps)
        for k in projected:
            g = gradient[k].T if right[k] else gradient[k]
            if t % gap == 0:
                old, p[k] = p.get(k), np.asarray(projector(k, t), np.float64)
                assert p[k].shape == (g.shape[0] // granularity, rank)
                if t and transport != "keep":
                    m[k] = {"reset": 0.0, "rotate": p[k].T @ old @ m[k]}[transport]
            low = p[k].T @ g.T.reshape(-1, len(p[k])).T
            m[k] = b1 * m[k] + (1 - b1) * low
            o, lifted = ((p[k] @ x).T.reshape(g.T.shape).T for x in (low, m[k]))
            row[k] = b2 * row[k] + (1 - b2) * np.sum(o**2, 1)
            col[k] = b2 * col[k] + (1 - b2) * np.sum(o**2, 0)
            v = np.outer(row[k], col[k]) / (np.sum(row[k]) or 1.0)
            u = lifted / (np.sqrt(v + eps) if eps_in_root else np.sqrt(v) + eps)
            u = u * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
            update[k] = u.T if right[k] else u
        params = {k: x - learning_rate * update[k] for k, x in params.items()}
        history.append({"params": params, "m": dict(m), "row": dict(row), "col": dict(col)})
    return history
