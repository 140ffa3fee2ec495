"""Reference LORENZA: low-rank Adam at a zeroth-order ascent point, and Lorenza+'s residuals.

Inside, every projected matrix is oriented so that the compressed dimension comes first: a
right-compressed gradient is transposed, which swaps the roles of Q and R. There P (dim, r) is the
projector, `rest` (r, other) the other factor, and the low-rank gradient P^T g is (r, other).
"""

import numpy as np

from . import adam
from .ascent import add, all_finite, perturbation
from .low_rank import lift, transport_moments
from .subspace import align, compressed_side, svd_factors


def run(
    params,
    loss,
    grad,
    *,
    steps,
    rank,
    gap,
    rho,
    mu,
    num_probes,
    probes,
    proj_type,
    transport,
    estimator,
    learning_rate,
    scale=1.0,
    weight_decay=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    projected,
    residual=None,
    perturb_every=1,
):
    """Run `steps` updates and return one record (dict) per update.

    params: dict name -> array; loss(params, t), grad(params, t); probes(t): dict name -> (q, r).
    eps_t = rho A/||A||, P_j = Q diag(u_j) R;  g = grad f(theta + eps_t);  N = Adam(ghat);
    theta <- theta - lr (scale * lifted N + wd theta), or theta - lr (Adam(g) + wd theta).
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    projected = sorted(projected)  # a set of strings has no fixed order, and sums depend on it
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}

    def turn(name, x):  # into the oriented view, and back again
        return x.T if right[name] else x

    factors = {}  # name -> (P, rest), oriented; empty while there is no subspace
    low = adam.init({k: (rank, params[k].shape[0 if right[k] else 1]) for k in projected})
    full = adam.init({k: x.shape for k, x in params.items() if k not in projected})
    limiter = dict.fromkeys(projected)
    refresh_due, history = False, []
    for t in range(steps):
        # 1. The ascent, from the subspace of earlier steps: this step's gradient is not known yet.
        epsilon, ascent_norm = {k: np.zeros_like(params[k]) for k in projected}, 0.0
        if factors and rho != 0 and t % perturb_every == 0:
            u = {k: np.asarray(x, np.float64) for k, x in probes(t).items()}
            directions = [
                {k: turn(k, p @ np.diag(u[k][j]) @ rest) for k, (p, rest) in factors.items()}
                for j in range(num_probes)
            ]
            epsilon, ascent_norm = perturbation(
                lambda x, t=t: loss(x, t),
                lambda x, t=t: grad(x, t),
                params,
                directions,
                rho=rho,
                mu=mu,
                estimator=estimator,
            )
        # 2. The one gradient of this step.
        point = add(params, epsilon)
        value, gradient = loss(point, t), grad(point, t)
        # 3. The refresh. A gradient that cannot be used leaves it due and skips the step.
        refresh_due = refresh_due or t % gap == 0
        skipped = not all_finite(gradient)
        update, energy = {k: np.zeros_like(x) for k, x in params.items()}, None
        g = {k: turn(k, gradient[k]) for k in projected}
        if refresh_due and not skipped:
            old, factors, refresh_due = factors, {}, False
            for k in projected:
                p, _, rest = svd_factors(g[k], rank)
                factors[k] = align(p, rest, old[k][0]) if old else (p, rest)
            if old:
                overlaps = {k: factors[k][0].T @ old[k][0] for k in projected}
                low = transport_moments(low, overlaps, transport, b1, b2)
        # 4. Project, Adam, lift, scale; the other leaves take Adam with a state of their own.
        if not skipped:
            g_low = {k: factors[k][0].T @ g[k] for k in projected}
            inside, whole = (sum(np.sum(x**2) for x in tree.values()) for tree in (g_low, g))
            energy = float(inside / whole) if whole > 0 else 0.0
            n_low, low = adam.direction(low, g_low, b1, b2, eps)
            others = {k: gradient[k] for k in params if k not in projected}
            directions, full = adam.direction(full, others, b1, b2, eps)
            update.update(directions)
            for k in projected:
                lifted, limiter[k] = lift(
                    factors[k][0], g[k], g_low[k], n_low[k], residual, limiter[k]
                )
                update[k] = scale * turn(k, lifted)
        # Weight decay is a later stage of the chain, so a skipped step decays too.
        params = {k: x - learning_rate * (update[k] + weight_decay * x) for k, x in params.items()}
        q = {k: rest.T if right[k] else p for k, (p, rest) in factors.items()}
        r = {k: p.T if right[k] else rest for k, (p, rest) in factors.items()}
        history.append(
            {
                "params": params,
                "q": q,
                "r": r,
                "epsilon": epsilon,
                "ascent_norm": ascent_norm,
                "gradient": gradient,
                "value": value,
                "captured_energy": energy,
                "inner": low,
                "skipped": skipped,
            }
        )
    return history
