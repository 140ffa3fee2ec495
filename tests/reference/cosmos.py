"""Reference COSMOS: Adam in a tracked eigenbasis, Newton-Schulz on the rest of the momentum."""

import numpy as np

from . import adam
from .newton_schulz import newton_schulz
from .subspace import align, compressed_side, svd_factors


def unit(x):
    return x / (np.linalg.norm(x) or 1.0)  # zero stays zero


def run(
    params,
    grad,
    *,
    steps,
    rank,
    projected,
    learning_rate,
    gamma=0.2,
    proj_type="std",
    b1=0.95,
    b2=0.95,
    eps=1e-8,
):
    """Run `steps` updates and return one record per update; the other leaves take Adam.

    M <- b1 M + (1 - b1) G;  first P from the SVD of G, S = (1 - b2) P^T G G^T P; later
    P <- QR(b2 P S + (1 - b2) G G^T P), S <- P^T (b2 P_old S P_old^T + (1 - b2) G G^T) P;
    V <- b2 V + (1 - b2)(P^T G)^2;  A = P [(P^T M / (1 - b1^t')) / sqrt((V + eps) / (1 - b2^t'))],
    B = sqrt(k) unit(NS(M - P P^T M)),  W <- W - lr sqrt(k) unit(A + gamma sqrt(l) B).
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    right = {k: compressed_side(params[k].shape, proj_type) == "right" for k in projected}
    full = adam.init({k: x.shape for k, x in params.items() if k not in projected})
    m, v, s, p, history = *(dict.fromkeys(projected, 0.0) for _ in range(4)), []
    for t in range(steps):
        gradient = grad(params, t)
        update, full = adam.direction(full, {k: gradient[k] for k in full["m"]}, b1, b2, eps)
        for k in projected:
            g = gradient[k].T if right[k] else gradient[k]
            m[k] = b1 * m[k] + (1 - b1) * g
            old, gram = p[k], (1 - b2) * g @ g.T
            p[k] = svd_factors(g, rank)[0]
            if t:
                new = np.linalg.qr(b2 * old @ s[k] + gram @ old)[0]
                p[k] = align(new, new.T, old)[0]
                gram = gram + b2 * old @ s[k] @ old.T
            s[k] = p[k].T @ gram @ p[k]
            v[k] = b2 * v[k] + (1 - b2) * (p[k].T @ g) ** 2
            low, root = p[k].T @ m[k], np.sqrt((v[k] + eps) / (1 - b2 ** (t + 1)))
            a = p[k] @ (low / (1 - b1 ** (t + 1)) / root)
            b = np.sqrt(len(g)) * unit(newton_schulz(unit(m[k] - p[k] @ low)))
            u = np.sqrt(len(g)) * unit(a + gamma * np.sqrt(g.shape[1]) * b)
            update[k] = u.T if right[k] else u
        params = {k: x - learning_rate * update[k] for k, x in params.items()}
        history.append({"params": params, "m": dict(m), "v": dict(v), "s": dict(s), "p": dict(p)})
    return history
