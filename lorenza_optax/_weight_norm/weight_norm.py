"""Weight normalization: a matrix as g v / ‖v‖ column by column, with neither g nor v kept.

Of W = g v / ‖v‖ all but the length of v and the sign of g can be read off W: the norm of its
column is |g|, and its direction that of v or of -v. So a *signed length* is kept, one number a
column: ‖v‖ with the sign of g.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Columns", "columns", "initial_lengths", "moved", "slopes"]


class Columns(NamedTuple):
    """The parts of a matrix W ([b,] m, n).

    Attributes:
      direction: v / ‖v‖ ([b,] m, n); zero in columns that have none.
      length: ‖v‖ ([b,] 1, n), above 0.
      magnitude: g ([b,] 1, n).
    """

    direction: jax.Array
    length: jax.Array
    magnitude: jax.Array


def _norm(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.norm(matrix, axis=-2, keepdims=True)


def initial_lengths(w: jax.Array) -> jax.Array:
    """The signed lengths ([b,] n) of v = W; 1 in a column of zeros.

    Of Flax's default initialization 1 is about the norm of any column.
    """
    norm = _norm(w)
    return jnp.where(norm > 0, norm, 1).squeeze(-2)


def columns(w: jax.Array, signed: jax.Array, gradient: jax.Array) -> Columns:
    """W, its signed lengths ([b,] n) and its gradient, in which the loss rises, to its parts.

    A column of zeros has g = 0, and v is taken along the steepest way down, -∇W: what g does
    next is then a step along the gradient. If that is zero too, the column has no direction.
    """
    signed = signed[..., None, :]
    norm = _norm(w)
    is_zero = norm == 0
    along = jnp.where(is_zero, -gradient, jnp.where(signed < 0, -w, w))
    size = jnp.where(is_zero, _norm(gradient), norm)
    direction = along / jnp.where(size > 0, size, 1)
    return Columns(direction, jnp.abs(signed), jnp.where(signed < 0, -norm, norm))


def slopes(parts: Columns, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The gradients with respect to v ([b,] m, n) and to g ([b,] n).

    .. math::
      \nabla_g = \nabla_W^\top \frac{v}{\lVert v \rVert}, \quad
      \nabla_v = \frac{g}{\lVert v \rVert}
      \Big(\nabla_W - \nabla_g \frac{v}{\lVert v \rVert}\Big) .
    """
    direction, length, magnitude = parts
    along = jnp.sum(gradient * direction, axis=-2, keepdims=True)
    return magnitude / length * (gradient - along * direction), along.squeeze(-2)


def moved(parts: Columns, u: jax.Array, n: jax.Array, rate: Any) -> tuple[jax.Array, jax.Array]:
    r"""The update D of W by which v becomes v - γ u and g becomes g - γ n, and new lengths.

    With :math:`W' = (g - \gamma n) v' / \lVert v' \rVert` it is :math:`D = (W - W') / \gamma`,
    written out so that nothing is divided by γ: it is exact for a small γ, and has its limit
    at 0.

    Args:
      parts: Those of W.
      u: The direction of v's step ([b,] m, n).
      n: That of g's ([b,] n).
      rate: γ.

    Returns:
      D ([b,] m, n), zero in columns without a direction, and the signed lengths ([b,] n).
    """
    direction, length, magnitude = parts
    n = n[..., None, :]
    new_length = _norm(length * direction - rate * u)
    # v' may vanish, with a direction that is open: v then stays as long as it was.
    new_length = jnp.where(new_length > 0, new_length, length)
    new_magnitude = magnitude - rate * n
    along = jnp.sum(direction * u, axis=-2, keepdims=True)
    squares = jnp.sum(u * u, axis=-2, keepdims=True)
    # (‖v'‖ - ‖v‖) / γ, from the difference of the squares.
    growth = (rate * squares - 2 * length * along) / (new_length + length)
    update = (magnitude * growth + length * n) * direction + new_magnitude * u
    has_direction = jnp.any(direction != 0, axis=-2, keepdims=True)
    signed = jnp.where(new_magnitude < 0, -new_length, new_length)
    return (
        jnp.where(has_direction, update / new_length, 0),
        jnp.where(has_direction, signed, length).squeeze(-2),
    )
