"""Reference parts of a low-rank step: moment transport, norm-growth limiter, lift with residual.

Matrices are oriented: the compressed dimension comes first. P (dim, r) is the projector, the
low-rank gradient ghat = P^T g and the inner optimizer's answer N are (r, other).
"""

import numpy as np

from . import adam


def transport_moments(state, overlaps, transport, b1=0.9, b2=0.999):
    """Carry an Adam state across a refresh; overlaps[name] is C = P_new^T P_old, (r, r).

    keep: nothing.  reset: zero moments and a count from 0.
    rotate: m <- C m,  v_hat <- (C*C) max(0, v_hat - m_hat^2) + (C m_hat)^2, elementwise squares,
    hats the bias corrections with the old count: a variance about raw moments is negative.
    """
    if transport == "keep":
        return state
    if transport == "reset":
        return adam.init({name: m.shape for name, m in state["m"].items()})
    if transport != "rotate":
        raise ValueError(f"unknown transport {transport!r}")
    new = {"count": state["count"], "m": {}, "v": {}}
    debias_m, debias_v = 1 - b1 ** state["count"], 1 - b2 ** state["count"]
    for name, c in overlaps.items():
        m, v = state["m"][name], state["v"][name]
        new["m"][name] = c @ m
        m_hat, v_hat = m / debias_m, v / debias_v
        v_hat = c**2 @ np.maximum(0.0, v_hat - m_hat**2) + (c @ m_hat) ** 2
        new["v"][name] = debias_v * v_hat
    return new


def limit_growth(x, previous, factor):
    """(x shortened to norm factor * previous if longer, its norm); previous None or 0: no limit."""
    norm = np.linalg.norm(x)
    if previous and norm > factor * previous:
        return x * (factor * previous / norm), factor * previous
    return x, norm


def lift(p, g, g_low, n_low, residual, previous):
    """(full-space update, norm for the next call's limiter), with G_perp = g - P P^T g.

    None: P N.  fira: P N + S,  S[:, j] = phi_j G_perp[:, j],  phi_j = ||N_:j|| / ||ghat_:j||
    (0 where ||ghat_:j|| <= 1e-3 ||G_:j||), S limited to 1.01 of its previous norm.
    sumo: P O + G_perp with O = N limited to 1.1 of its previous norm.
    """
    if residual is None:
        return p @ n_low, previous
    outside = g - p @ g_low
    if residual == "fira":
        low_norm = np.linalg.norm(g_low, axis=0)
        held = low_norm > 1e-3 * np.linalg.norm(g, axis=0)
        safe = np.where(held, low_norm, 1.0)
        phi = np.where(held, np.linalg.norm(n_low, axis=0) / safe, 0.0)
        added, previous = limit_growth(phi * outside, previous, 1.01)
        return p @ n_low + added, previous
    if residual == "sumo":
        limited, previous = limit_growth(n_low, previous, 1.1)
        return p @ limited + outside, previous
    raise ValueError(f"unknown residual {residual!r}")
