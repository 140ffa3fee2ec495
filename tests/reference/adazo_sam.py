"""Reference AdaZo-SAM: Adam at a zeroth-order ascent point found by full-space Gaussian probes."""

import numpy as np

from . import adam
from .ascent import add, all_finite, perturbation


def run(
    params,
    loss,
    grad,
    *,
    steps,
    rho,
    mu,
    num_probes,
    probes,
    estimator,
    learning_rate,
    weight_decay=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    perturb_every=1,
):
    """Run `steps` updates and return one record (dict) per update.

    params: dict name -> array; loss(params, t), grad(params, t);
    probes(t): dict name -> (q, *shape), the directions P_j over all leaves.
    eps_t = rho A/||A||,  A = mean_j d_j P_j;  g = grad f(theta + eps_t);
    theta <- theta - lr (Adam(g) + wd theta).
    There is no subspace to wait for: already the first update is perturbed.
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    state, history = adam.init({name: x.shape for name, x in params.items()}), []
    for t in range(steps):
        epsilon, ascent_norm = {name: np.zeros_like(x) for name, x in params.items()}, 0.0
        if rho != 0 and t % perturb_every == 0:
            drawn = {name: np.asarray(x, np.float64) for name, x in probes(t).items()}
            directions = [{k: drawn[k][j] for k in params} for j in range(num_probes)]
            epsilon, ascent_norm = perturbation(
                lambda x, t=t: loss(x, t),
                lambda x, t=t: grad(x, t),
                params,
                directions,
                rho=rho,
                mu=mu,
                estimator=estimator,
            )
        point = add(params, epsilon)
        value, gradient = loss(point, t), grad(point, t)
        skipped = not all_finite(gradient)
        update = {name: np.zeros_like(x) for name, x in params.items()}
        if not skipped:
            update, state = adam.direction(state, gradient, b1, b2, eps)
        # Weight decay is a later stage of the chain, so a skipped step decays too.
        params = {k: x - learning_rate * (update[k] + weight_decay * x) for k, x in params.items()}
        history.append(
            {
                "params": params,
                "epsilon": epsilon,
                "ascent_norm": ascent_norm,
                "gradient": gradient,
                "value": value,
                "inner": state,
                "skipped": skipped,
            }
        )
    return history
