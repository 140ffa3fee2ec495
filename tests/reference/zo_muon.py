"""Reference ZO-Muon: zeroth order along P Psi, orthogonalized in the subspace of P."""

import numpy as np

from .ascent import slope
from .newton_schulz import newton_schulz
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
    estimator="forward",
    other_learning_rate=None,
    grad=None,
):
    """Run `steps` updates and return one record (dict) per update.

    projector(name, t) -> P (k, r), orthonormal columns, asked for where t % gap == 0;
    coordinates(t): list of q dicts, Psi_j (r, l) for projected leaves and z_j for the others.
    ghat = mean_j d_j Psi_j, theta - lr P NS(ghat);  others theta - lr mean_j d_j z_j, with
    `other_learning_rate` if given.
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    projected, kept, history = sorted(projected), {}, []
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    other_rate = learning_rate if other_learning_rate is None else other_learning_rate
    rates = {k: learning_rate if k in right else other_rate for k in params}

    def lift(tree):  # from coordinates to parameters
        lifted = {k: kept[k] @ tree[k] for k in projected}
        return tree | {k: x.T if right[k] else x for k, x in lifted.items()}

    for t in range(steps):
        if t % gap == 0:
            kept = {k: np.asarray(projector(k, t), np.float64) for k in projected}
        f, df = (lambda x, t=t: loss(x, t)), (lambda x, t=t: grad(x, t))
        drawn = coordinates(t)[:num_probes]
        slopes = [slope(f, df, params, lift(psi), mu, estimator) for psi in drawn]
        low = {k: sum(d * p[k] for d, p in zip(slopes, drawn, strict=True)) for k in params}
        low = {k: x / num_probes for k, x in low.items()}
        orthogonal = {k: newton_schulz(low[k]) for k in projected}
        update = lift(low | orthogonal)
        params = {k: x - rates[k] * update[k] for k, x in params.items()}
        record = {"params": params, "slopes": slopes, "low": low, "projector": kept}
        history.append(record | {"orthogonal": orthogonal})
    return history
