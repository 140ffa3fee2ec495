"""Updates of projected leaves that are not multiplied out, and adding them in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._linalg import matmul
from lorenza_optax._matrix_view import MatrixView
from lorenza_optax._mesh import in_auto_mode

__all__ = ["LowRankUpdate", "apply_updates"]

_ONLY = (
    "with factored_updates=True it can be scaled and added to its parameter only. A stage that"
    " needs the numbers themselves goes in front (gradient_transform=), or pass"
    " factored_updates=False."
)


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """An update decay · W + L R in place of an array: what ``factored_updates=True`` gives.

    It may be scaled, and :func:`apply_updates` adds it to its leaf; ``optax.apply_updates`` does
    too, by multiplying it out. It is no array: it must not cross the boundary of a ``jit``, and
    a stage of a chain that needs the numbers themselves raises.

    Attributes:
      view: How the leaf is a matrix.
      left: L ([b,] m, r).
      right: R ([b,] r, n).
      decay: Coefficient of the leaf itself.
      dtype: The leaf's dtype.
    """

    view: MatrixView
    left: jax.Array
    right: jax.Array
    decay: Any
    dtype: Any

    # Before jax.Array's own operators would be tried.
    __array_priority__ = 200

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"A LowRankUpdate has no {name!r}: {_ONLY}")

    def __repr__(self) -> str:
        # JAX's own messages show it.
        return f"LowRankUpdate(shape={self.shape}: {_ONLY})"

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(f"Not for a LowRankUpdate: {_ONLY}")

    __add__ = __sub__ = __rsub__ = __pow__ = __abs__ = __array__ = _refuse

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def ndim(self) -> int:
        return len(self.view.shape)

    def __mul__(self, factor: Any) -> LowRankUpdate:
        if jnp.ndim(factor) != 0:
            return NotImplemented
        # The shorter factor is scaled; in float32, whatever the leaf's dtype.
        factor = jnp.asarray(factor, self.left.dtype)
        left, right = self.left, self.right
        if left.size < right.size:
            left = left * factor
        else:
            right = right * factor
        return dataclasses.replace(self, left=left, right=right, decay=self.decay * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> LowRankUpdate:
        return self * (1 / divisor)

    def __neg__(self) -> LowRankUpdate:
        return self * -1

    def with_decay(self, rate: Any) -> LowRankUpdate:
        """Adds rate · W."""
        return dataclasses.replace(self, decay=self.decay + rate)

    def added_to(self, leaf: jax.Array) -> jax.Array:
        """W + decay · W + L R, a matrix of a stack at a time, in the leaf's dtype."""
        return in_auto_mode(self._add, leaf, self.left, self.right, self.decay, like=leaf)

    __radd__ = added_to

    def _add(self, leaf: jax.Array, left: jax.Array, right: jax.Array, decay: Any) -> jax.Array:
        wide = left.dtype

        def moved(matrix: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
            kept = matrix.astype(wide) * (1 + jnp.asarray(decay, wide))
            return (kept + matmul(left, right)).astype(matrix.dtype)

        view = self.view
        ordered = (*view.batch_axes, *view.row_axes, *view.column_axes)
        if not view.batch or ordered != tuple(range(len(view.shape))):
            # Layers do not lie one after the other: no slice can be updated in place.
            return view.leaf(moved(view.matrix(leaf), left, right))

        def layer(index: jax.Array, stack: jax.Array) -> jax.Array:
            take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)  # noqa: E731
            new = moved(take(stack), take(left), take(right))
            return jax.lax.dynamic_update_index_in_dim(stack, new, index, 0)

        stack = leaf.reshape(*view.batch, view.m, view.n)
        return jax.lax.fori_loop(0, view.batch[0], layer, stack).reshape(view.shape)


def apply_updates(params: Any, updates: Any) -> Any:
    """Adds updates to parameters like ``optax.apply_updates``, low-rank ones in place.

    With ``lorenza(..., factored_updates=True)`` the update of a projected leaf is a
    :class:`LowRankUpdate`. Here W + L R is formed matrix by matrix, straight into the buffer of W
    where that is donated: a scanned stack of layers needs no second copy of itself.

    Args:
      params: The parameters.
      updates: What ``update`` returned, in the same ``jit``.

    Returns:
      The new parameters, in the dtypes of ``params``.

    Raises:
      ValueError: If the trees do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, lorenza_optax
      >>> tx = lorenza_optax.lorenza(1e-2, rank=4, rho=0.0, factored_updates=True)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> @jax.jit
      ... def step(params, state, gradient):
      ...     updates, state = tx.update(gradient, state, params)
      ...     return lorenza_optax.apply_updates(params, updates), state
      >>> params, state = step(params, tx.init(params), {"kernel": jnp.ones((16, 8))})
      >>> print(params["kernel"].shape)
      (16, 8)
    """

    def add(param: Any, update: Any) -> Any:
        if param is None:
            return None
        if isinstance(update, LowRankUpdate):
            return update.added_to(param)
        return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)

    return jax.tree.map(add, params, updates, is_leaf=lambda leaf: leaf is None)
