"""Reference OwLore: GaLore on a few layers at a time, sampled by their share of outliers."""

import numpy as np

from . import adam
from .subspace import align, compressed_side, svd_factors


def outlier_ratio(arrays, multiple):
    """Share of the entries of a layer's matrices that exceed `multiple` times their mean size."""
    outliers = sum(np.sum(np.abs(x) > multiple * np.mean(np.abs(x))) for x in arrays)
    return outliers / sum(x.size for x in arrays)


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
    scale=1.0,
    proj_type="std",
    **betas,
):
    """Run `steps` updates and return one record per update; betas: Adam's b1, b2 and eps.

    active(t) -> the layers that train from t (t mod interval = 0) on. Their leaves, "layers/i/...",
    start from new moments, a new count and P of this gradient; P is renewed every `gap` updates
    (outside of layers counted from 0). Projected: W <- W - lr scale P Adam(P^T G); else Adam.
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    shapes = {k: x.shape[::-1] if right.get(k) else x.shape for k, x in params.items()}
    shapes = {k: (rank, s[1]) if k in projected else s for k, s in shapes.items()}
    inner, p, layers, history = {}, {}, set(), []
    for t in range(steps):
        gradient, update = grad(params, t), {k: np.zeros_like(x) for k, x in params.items()}
        layers = set(active(t)) if t % interval == 0 else layers
        inside = {k for k in params if k.startswith("layers/") and int(k.split("/")[1]) in layers}
        outside = {k for k in params if not k.startswith("layers/")}
        for names, since in (inside, t % interval), (outside, t):
            state = (
                inner.get(names is inside) if since else adam.init({k: shapes[k] for k in names})
            )
            g = {k: gradient[k].T if right.get(k) else gradient[k] for k in names}
            for k in names & set(projected):
                if since % gap == 0:
                    new, _, rest = svd_factors(g[k], rank)
                    p[k] = align(new, rest, p[k])[0] if since else new
                g[k] = p[k].T @ g[k]
            moved, inner[names is inside] = adam.direction(state, g, **betas)
            for k in names:
                u = scale * p[k] @ moved[k] if k in p else moved[k]
                update[k] = u.T if right.get(k) else u
        params = {k: x - learning_rate * update[k] for k, x in params.items()}
        history.append({"params": params, "layers": layers, "p": {k: p[k] for k in p}})
    return history
