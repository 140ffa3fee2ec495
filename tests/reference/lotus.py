"""Reference Lotus: GaLore whose subspace is renewed when the gradient's direction stands still."""

import numpy as np

from . import adam
from .subspace import align, compressed_side, svd_factors


def unit(x):
    return x / (np.linalg.norm(x) or 1.0)  # zero stays zero


def run(
    params,
    grad,
    *,
    steps,
    rank,
    eta,
    gamma,
    projected,
    learning_rate,
    scale=1.0,
    proj_type="std",
    **betas,
):
    """Run `steps` updates and return one record per update; betas: Adam's b1, b2 and eps.

    Each matrix by itself: at a switch P from the SVD of G (moments are kept), d0 = unit(P^T G) and
    age = 1; else age += 1, and every eta-th of them tests ||unit(P^T G) - d0|| / age < gamma with
    the old P, and switches at this very gradient if it holds. The first update switches.
    W <- W - lr scale P Adam(P^T G).
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    inner = adam.init({k: (rank, params[k].shape[0 if right[k] else 1]) for k in projected})
    full = adam.init({k: x.shape for k, x in params.items() if k not in projected})
    p, start, age, history = {}, {}, {}, []
    for t in range(steps):
        gradient, low, switched, displacement = grad(params, t), {}, {}, {}
        for k in projected:
            g = gradient[k].T if right[k] else gradient[k]
            age[k] = age.get(k, 0) + 1
            displacement[k] = np.inf  # where there is no test
            if t and age[k] % eta == 0:
                displacement[k] = np.linalg.norm(unit(p[k].T @ g) - start[k]) / age[k]
            switched[k] = t == 0 or bool(displacement[k] < gamma)
            if switched[k]:
                new, _, rest = svd_factors(g, rank)
                p[k] = align(new, rest, p[k])[0] if t else new
                start[k], age[k] = unit(p[k].T @ g), 1
            low[k] = p[k].T @ g
        n_low, inner = adam.direction(inner, low, **betas)
        update, full = adam.direction(full, {k: gradient[k] for k in full["m"]}, **betas)
        for k in projected:
            update[k] = scale * (p[k] @ n_low[k]).T if right[k] else scale * p[k] @ n_low[k]
        params = {k: x - learning_rate * update[k] for k, x in params.items()}
        record = {"params": params, "p": dict(p), "switched": switched, "age": dict(age)}
        history.append(record | {"displacement": displacement, "inner": inner})
    return history
