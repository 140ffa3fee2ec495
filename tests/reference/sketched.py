"""Reference LORENZA with refreshes from sketches, and the ascents beside the published one.

Matrices are oriented as in lorenza.py: P (dim, r) is the projector, K (r, other) the rows that
the sketch starts from, and the low-rank gradient P^T g is (r, other).
"""

import numpy as np

from . import adam
from .ascent import add
from .low_rank import transport_moments
from .subspace import compressed_side


def run(
    params, grad, *, projectors, noise, steps, gap, rho, ascent, learning_rate, stores_rows,
    transport="keep", warm_up=3,
):  # fmt: skip
    """Run `steps` updates and return one record (dict) per update.

    projectors: the random P of the start by name, oriented; noise(t): Gaussian rows (r + p, any
    length), cut to size, of which the first p are Omega's extra columns and the others stand in
    for rows that are still zero. At a refresh (the first `warm_up` updates and multiples of gap):

        Y = g Omega, P <- leading left singular vectors of Y, K <- right singular vectors of P^T g,

    after the step in the old subspace. Where `stores_rows` is False the first moment is K.
    ascent: "none"; "subspace": eps = rho A/||A||, A = (P P^T grad, grad of the other leaves) at
    theta; "momentum": A = (P m, m of the other leaves).
    """
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    names = sorted(projectors)
    right = {k: compressed_side(params[k].shape, "std") == "right" for k in names}
    p = {k: np.array(projectors[k], np.float64) for k in names}
    rank = p[names[0]].shape[1]

    def turn(name, x):
        return x.T if right[name] else x

    rows = {k: np.zeros((rank, params[k].shape[0 if right[k] else 1])) for k in names}
    low = adam.init({k: x.shape for k, x in rows.items()})
    full = adam.init({k: x.shape for k, x in params.items() if k not in names})
    refreshed, history = False, []
    for t in range(steps):
        move = {k: np.zeros_like(x) for k, x in params.items()}
        if ascent != "none" and refreshed:
            if ascent == "subspace":
                g = grad(params, t)
                move = {k: turn(k, p[k] @ p[k].T @ turn(k, g[k])) if k in p else g[k] for k in g}
            else:
                move = {k: turn(k, p[k] @ low["m"][k]) if k in p else full["m"][k] for k in params}
            norm = np.sqrt(sum(np.sum(x**2) for x in move.values()))
            move = {k: x * (rho / norm if norm > 0 else 0.0) for k, x in move.items()}
        g = grad(add(params, move), t)
        oriented = {k: turn(k, g[k]) for k in names}
        g_low = {k: p[k].T @ oriented[k] for k in names}
        before = {k: (rows if stores_rows else low["m"])[k] for k in names}
        n_low, low = adam.direction(low, g_low)
        n_full, full = adam.direction(full, {k: g[k] for k in params if k not in p})
        update = {k: turn(k, p[k] @ n_low[k]) if k in p else n_full[k] for k in params}
        params = {k: x - learning_rate * update[k] for k, x in params.items()}
        share = None
        if t < warm_up or t % gap == 0:
            old, energy = p, 0.0
            p, overlaps = {}, {}
            for k in names:
                size, length = oriented[k].shape
                extra = min(8, size - rank)
                fresh = noise(t)[:, :length] / np.sqrt(length)
                norms = np.linalg.norm(before[k], axis=1, keepdims=True)
                known = np.where(norms > 0, before[k] / np.where(norms > 0, norms, 1),
                                 fresh[8 : 8 + rank])  # fmt: skip
                y = oriented[k] @ np.concatenate([known, fresh[:extra]]).T
                energy += np.sum(y[:, rank:] ** 2) * length / extra
                p[k] = np.linalg.svd(y, full_matrices=False)[0][:, :rank]
                rows[k] = np.linalg.svd(g_low[k], full_matrices=False)[2]
                signs = np.where(np.sum(p[k] * old[k], axis=0) < 0, -1.0, 1.0)
                p[k], rows[k] = p[k] * signs, signs[:, None] * rows[k]
                overlaps[k] = p[k].T @ old[k]
            kind = "rotate" if t < warm_up and transport == "keep" else transport
            low = transport_moments(low, overlaps, kind)
            share = min(1.0, sum(np.sum(x**2) for x in g_low.values()) / energy)
            refreshed = True
        history.append({"params": params, "p": p, "captured_energy": share})
    return history
