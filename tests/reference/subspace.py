"""Reference subspace: exact truncated SVD, its signs, and the side that is compressed."""

import numpy as np


def svd_factors(g, rank):
    """Exact truncated SVD `g ~ q diag(s) r_` of an (m, n) matrix.

    Returns q (m, rank) with orthonormal columns, s (rank,) descending and r_ (rank, n) with
    orthonormal rows. An SVD leaves the sign of each pair (q[:, i], r_[i]) open; here the entry of
    largest absolute value in each column of q is positive.
    """
    g = np.asarray(g, np.float64)
    if not 0 < rank <= min(g.shape):
        raise ValueError(f"rank {rank} does not fit a matrix of shape {g.shape}")
    q, s, r_ = np.linalg.svd(g, full_matrices=False)
    q, s, r_ = q[:, :rank], s[:rank], r_[:rank]
    largest = np.abs(q).argmax(axis=0)
    signs = np.where(q[largest, np.arange(rank)] < 0, -1.0, 1.0)
    return q * signs, s, signs[:, None] * r_


def align(q, r_, q_old):
    """Flip q[:, i] and r_[i] wherever (q^T q_old)_ii < 0, so that kept moments keep their sign."""
    signs = np.where(np.sum(q * q_old, axis=0) < 0, -1.0, 1.0)
    return q * signs, signs[:, None] * r_


def compressed_side(shape, proj_type):
    """The side of an (m, n) matrix that is compressed to the rank.

    "left": the low-rank gradient is q^T g, (r, n). "right": it is g r_^T, (m, r).
    "std" compresses the shorter dimension and "reverse_std" the longer one; of a square matrix
    both compress the rows. (Those are the inputs of y = x W. With "std" the published code
    multiplies squares from the right, which compresses the inputs, too, as PyTorch's layers hold W
    transposed; its "reverse_std" compresses the outputs, that of optax.contrib.galore the rows.)
    """
    if proj_type in ("left", "right"):
        return proj_type
    rows, columns = shape
    if proj_type == "std":
        return "right" if rows > columns else "left"
    if proj_type == "reverse_std":
        return "right" if rows < columns else "left"
    raise ValueError(f"unknown proj_type {proj_type!r}")
