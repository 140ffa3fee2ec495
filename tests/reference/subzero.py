"""Reference SubZero: zeroth order along U Z V^T with orthonormal U and V kept for a while."""

import numpy as np

from .ascent import add, slope


def run(
    params,
    loss,
    *,
    steps,
    learning_rate,
    mu,
    num_probes,
    gap,
    projected,
    factors,
    coordinates,
    estimator="central",
    normalize=True,
    grad=None,
):
    """Run `steps` updates and return one record (dict) per update.

    factors(name, t) -> U (m, r), V (n, r), orthonormal columns, asked for where t % gap == 0;
    coordinates(t): list of q dicts, Z_j (r, r) for projected leaves and z_j for the others.
    Direction P_j = s U Z_j V^T with s = sqrt(m n) / r if normalize, else 1, and z_j elsewhere;
    theta - lr mean_j d_j P_j. Neither side is the compressed one: nothing is transposed here.
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    kept, history = {}, []

    def lift(tree):  # from coordinates to parameters
        lifted = dict(tree)
        for k, (u, v) in kept.items():
            s = np.sqrt(params[k].size) / u.shape[1] if normalize else 1.0
            lifted[k] = s * u @ tree[k] @ v.T
        return lifted

    for t in range(steps):
        if t % gap == 0:
            kept = {k: [np.asarray(x, np.float64) for x in factors(k, t)] for k in projected}
        f, df = (lambda x, t=t: loss(x, t)), (lambda x, t=t: grad(x, t))
        drawn = coordinates(t)[:num_probes]
        slopes = [slope(f, df, params, lift(z), mu, estimator) for z in drawn]
        low = {k: sum(d * z[k] for d, z in zip(slopes, drawn, strict=True)) for k in params}
        low = {k: x / num_probes for k, x in low.items()}
        params = add(params, lift(low), -learning_rate)
        history.append({"params": params, "slopes": slopes, "low": low, "factors": kept})
    return history
