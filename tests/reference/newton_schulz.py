"""Reference Newton-Schulz iteration: the polar factor of a matrix, roughly, as Muon uses it."""

import numpy as np

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x, steps=5):
    """Singular values of X / ||X||_F pushed towards 1; a zero matrix stays zero.

    X <- a X + (b X X^T + c (X X^T)^2) X, `steps` times, on the side with fewer rows. The
    coefficients trade accuracy for speed: values end between about 0.7 and 1.2, not at 1.
    """
    x = np.asarray(x, np.float64)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, steps).T
    norm = np.linalg.norm(x)
    if norm == 0:
        return x
    x = x / norm
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
