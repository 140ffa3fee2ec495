"""Reference Flora: momentum in a resampled random subspace, with Adafactor's normalization."""

import numpy as np

from .subspace import compressed_side


def factored_rms(g, v, t, min_dim, decay_rate):
    """(g / sqrt(V), v), V = v, or from min_dim x min_dim on its rank-one row col^T / mean(row)."""
    b2 = 1 - (t + 1.0) ** -decay_rate
    v = b2 * v + (1 - b2) * (g**2 + 1e-30)  # whole in any case: means commute with averages
    if g.ndim == 2 and min(g.shape) >= min_dim:
        return g / np.sqrt(np.outer(v.mean(1), v.mean(0)) / v.mean()), v
    return g / np.sqrt(v), v


def run(
    params,
    grad,
    *,
    steps,
    rank,
    kappa,
    projector,
    projected,
    learning_rate,
    beta=0.9,
    decay_rate=0.8,
    min_dim_size_to_factor=128,
    normalize="after",
    proj_type="std",
):
    """Run `steps` updates; projector(name, t) -> P (k, rank) ~ N(0, 1/rank), when t mod kappa = 0.

    m <- P_new^T P_old m at a switch, m <- b m + (1 - b) P^T G, D = b P m + (1 - b) G (P = I where
    not projected), D normalized ("after") or G ("before": m holds normalized gradients);
    D <- D / max(1, RMS(D)),  W <- W - lr max(RMS(W), 1e-3) D.
    """
    params, b = {name: np.array(value, np.float64) for name, value in params.items()}, beta
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    p, m, v, history = {}, dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0), []
    for t in range(steps):
        gradient, update, rms = grad(params, t), {}, lambda x: np.sqrt(np.mean(x**2))
        for k, g in gradient.items():
            if normalize == "before":
                g, v[k] = factored_rms(g, v[k], t, min_dim_size_to_factor, decay_rate)
            if k in projected and t % kappa == 0:
                old, p[k] = p.get(k), np.asarray(projector(k, t), np.float64)
                m[k] = m[k] if old is None else p[k].T @ old @ m[k]
            turned = g.T if right.get(k) else g
            m[k] = b * m[k] + (1 - b) * (p[k].T @ turned if k in p else g)
            held = p[k] @ m[k] if k in p else m[k]
            d = b * (held.T if right.get(k) else held) + (1 - b) * g
            if normalize == "after":
                d, v[k] = factored_rms(d, v[k], t, min_dim_size_to_factor, decay_rate)
            update[k] = d / max(1.0, rms(d)) * max(rms(params[k]), 1e-3)
        params = {k: x - learning_rate * update[k] for k, x in params.items()}
        history.append({"params": params, "momentum": dict(m), "update": update, "v": dict(v)})
    return history
