"""Reference MeZO (ZO-SGD) and its variants; the forward gradient is estimator="jvp"."""

import numpy as np

from . import adam
from .ascent import add, slope


def run(
    params,
    loss,
    *,
    steps,
    learning_rate,
    mu,
    num_probes,
    direction,
    estimator="central",
    variant="sgd",
    grad=None,
    momentum=0.9,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
):
    """Run `steps` updates and return one record (dict) per update.

    loss(params, t) -> float; grad(params, t) only for "jvp"; direction(t): list of q trees z_j.
    g = mean_j d_j z_j over all leaves. sgd: theta - lr g;  sign: theta - lr sign(g);
    momentum: m <- beta m + g, theta - lr m;  adam: theta - lr Adam(g);
    conservative: of theta, theta - lr g, theta + lr g the first with the smallest loss.
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(x) for name, x in params.items()}
    state, history = adam.init({name: x.shape for name, x in params.items()}), []
    for t in range(steps):
        f, df = (lambda x, t=t: loss(x, t)), (lambda x, t=t: grad(x, t))
        drawn = direction(t)[:num_probes]
        slopes = [slope(f, df, params, z, mu, estimator) for z in drawn]
        g = {k: sum(d * z[k] for d, z in zip(slopes, drawn, strict=True)) / num_probes for k in m}
        update, candidate_losses = g, None
        if variant == "sign":
            update = {k: np.sign(x) for k, x in g.items()}
        elif variant == "momentum":
            update = m = {k: momentum * m[k] + x for k, x in g.items()}
        elif variant == "adam":
            update, state = adam.direction(state, g, b1, b2, eps)
        elif variant == "conservative":
            factors = (0.0, 1.0, -1.0)
            candidate_losses = [f(add(params, g, -learning_rate * sign)) for sign in factors]
            update = {k: factors[np.argmin(candidate_losses)] * x for k, x in g.items()}
        elif variant != "sgd":
            raise ValueError(f"unknown variant {variant!r}")
        params = add(params, update, -learning_rate)
        record = {"params": params, "slopes": slopes, "gradient": g, "update": update}
        history.append(record | {"candidate_losses": candidate_losses, "inner": state})
    return history
