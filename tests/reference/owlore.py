"""Reference OwLore: GaLore on a few layers at a time, sampled by their share of outliers."""

import numpy as np

from . import adam
from .subspace import align, compressed_side, svd_factors


def outlier_ratio(arrays, multiple):
    """Share of the entries of a layer's matrices that exceed `multiple` times their mean size."""
    sizes = np.concatenate([abs(x).ravel() for x in arrays])
    return np.mean(sizes > multiple * sizes.mean())


def probabilities(layers, multiple):
    """The layers' outlier ratios over their sum; uniform where no layer has an outlier."""
    ratios = np.array([outlier_ratio(arrays, multiple) for arrays in layers], np.float64)
    return ratios / ratios.sum() if ratios.any() else np.full(len(ratios), 1 / len(ratios))


def run(
    params,
    grad,
    *,
    steps,
    rank,
    gap,
    interval,
    active,
    projected,
    learning_rate,
    proj_type="std",
    **betas,
):
    """Layers active(t) train from t (t mod interval = 0) on, what is outside of layers always.

    Leaves "layers/i/..." start then with P of this G, new moments and count; P is renewed, moments
    kept, every `gap` updates. Projected: W <- W - lr P Adam(P^T G); others: Adam(betas).
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    state, p, layers, history = {}, {}, set(), []
    for t in range(steps):
        gradient, params = grad(params, t), dict(params)
        layers = set(active(t)) if t % interval == 0 else layers
        inside = {k for k in params if k.startswith("layers/") and int(k.split("/")[1]) in layers}
        outside = {k for k in params if not k.startswith("layers/")}
        for part, names, since in ("layers", inside, t % interval), ("rest", outside, t):
            g = {k: gradient[k].T if right.get(k) else gradient[k] for k in names}
            for k in names & right.keys():
                if since % gap == 0:
                    new, _, rest = svd_factors(g[k], rank)
                    p[k] = align(new, rest, p[k])[0] if since else new
                g[k] = p[k].T @ g[k]
            start = state[part] if since else adam.init({k: x.shape for k, x in g.items()})
            moved, state[part] = adam.direction(start, g, **betas)
            for k in names:
                u = p[k] @ moved[k] if k in right else moved[k]
                params[k] = params[k] - learning_rate * (u.T if right.get(k) else u)
        history.append({"params": params, "layers": layers, "p": dict(p), "inner": dict(state)})
    return history
