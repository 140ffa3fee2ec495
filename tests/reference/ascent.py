"""Reference zeroth-order ascent, shared by LORENZA and AdaZo-SAM. Trees are flat dicts."""

import numpy as np


def add(params, change, factor=1.0):
    """params + factor * change; leaves that `change` does not name stay as they are."""
    return {
        name: value + factor * change[name] if name in change else value
        for name, value in params.items()
    }


def global_norm(tree):
    """Frobenius norm over all leaves together."""
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in tree.values()))


def all_finite(tree):
    """Whether no leaf holds an infinity or a NaN."""
    return all(np.isfinite(leaf).all() for leaf in tree.values())


def slope(loss, grad, params, direction, mu, estimator):
    """Derivative d of the loss along P = `direction`.

    central: [f(theta + mu P) - f(theta - mu P)] / (2 mu);  forward: [f(theta + mu P) - f(theta)]
    / mu;  jvp: <grad f(theta), P>, exactly.
    """
    if estimator == "central":
        ahead, behind = add(params, direction, mu), add(params, direction, -mu)
        return (loss(ahead) - loss(behind)) / (2 * mu)
    if estimator == "forward":
        return (loss(add(params, direction, mu)) - loss(params)) / mu
    if estimator == "jvp":
        gradient = grad(params)
        return sum(np.sum(gradient[name] * leaf) for name, leaf in direction.items())
    raise ValueError(f"unknown estimator {estimator!r}")


def perturbation(loss, grad, params, directions, *, rho, mu, estimator):
    """(epsilon, ||A||) with A = mean_j d_j P_j and epsilon = rho A / ||A||.

    `directions` is a list of q trees P_j. Positive rho ascends. Where A is 0 or not finite there
    is no direction to go in: epsilon is 0 and the norm is reported as 0.
    """
    zero = {name: np.zeros_like(leaf) for name, leaf in directions[0].items()}
    with np.errstate(over="ignore", invalid="ignore"):
        ascent = zero
        for direction in directions:
            d = slope(loss, grad, params, direction, mu, estimator)
            ascent = add(ascent, direction, d / len(directions))
        norm = global_norm(ascent)
    if not np.isfinite(norm) or norm == 0:
        return zero, 0.0
    return {name: rho * leaf / norm for name, leaf in ascent.items()}, float(norm)
