"""Reference LOZO and LOZO-M: zeroth order along P N with a Gaussian factor P kept for a while."""

import numpy as np

from .ascent import add, slope
from .subspace import compressed_side


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
    projector,
    coordinates,
    proj_type="std",
    estimator="central",
    divide_by_rank=False,
    momentum=None,
    grad=None,
):
    """Run `steps` updates and return one record (dict) per update.

    projector(name, t) -> P (k, r), N(0, 1), asked for where t % gap == 0; coordinates(t): list of q
    dicts, N_j (r, l) for projected leaves and z_j, shaped like the leaf, for the others.
    ghat = mean_j d_j N_j (over r if divide_by_rank), g = mean_j d_j z_j.  LOZO (momentum None):
    theta - lr P ghat.  LOZO-M: M <- (P_new^T P_old / k) M at each switch but the first, then
    M <- beta M + (1 - beta) ghat, theta - lr P M;  others m <- beta m + (1 - beta) g.
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    projected, kept, m, history = sorted(projected), {}, {}, []
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}

    def lift(tree):  # from coordinates to parameters
        lifted = {k: kept[k] @ tree[k] for k in projected}
        return tree | {k: x.T if right[k] else x for k, x in lifted.items()}

    for t in range(steps):
        if t % gap == 0:
            old, kept = kept, {k: np.asarray(projector(k, t), np.float64) for k in projected}
            if m:
                m = m | {k: kept[k].T @ old[k] / len(kept[k]) @ m[k] for k in projected}
        f, df = (lambda x, t=t: loss(x, t)), (lambda x, t=t: grad(x, t))
        drawn = coordinates(t)[:num_probes]
        slopes = [slope(f, df, params, lift(n), mu, estimator) for n in drawn]
        low = {k: sum(d * n[k] for d, n in zip(slopes, drawn, strict=True)) for k in params}
        low = {k: x / num_probes for k, x in low.items()}
        if divide_by_rank:
            low |= {k: low[k] / kept[k].shape[1] for k in projected}
        if momentum is not None:
            m = {k: momentum * m.get(k, 0.0) + (1 - momentum) * x for k, x in low.items()}
        params = add(params, lift(low if momentum is None else m), -learning_rate)
        record = {"params": params, "slopes": slopes, "low": low, "momentum": m, "projector": kept}
        history.append(record)
    return history
