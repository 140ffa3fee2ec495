"""Updates of projected leaves that are not multiplied out, and adding them in place."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._base.noise import Noise, plus_noise
from lorenza_optax._linalg.decompositions import FUSED_RANK, product
from lorenza_optax._plan.matrix_view import MatrixView

__all__ = ["LowRankUpdate", "RandomUpdate", "Unformed", "apply_updates"]

SMALL = 2**16  # numbers of a matrix that is not worth a loop

_ONLY = (
    "with factored_updates=True it can be scaled and added to its parameter only. A stage that"
    " needs the numbers themselves goes in front (gradient_transform=), or pass"
    " factored_updates=False."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Unformed(abc.ABC):
    """An update decay · W + U that is no array: it may be scaled, and added to its parameter.

    Attributes:
      decay: Coefficient of the leaf itself.
      dtype: The leaf's dtype.
    """

    decay: Any
    dtype: Any

    # Before jax.Array's own operators would be tried.
    __array_priority__ = 200

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The leaf's."""

    @abc.abstractmethod
    def _scaled(self, factor: jax.Array) -> dict[str, Any]:
        """The fields of factor · U."""

    @abc.abstractmethod
    def added_to(self, leaf: jax.Array) -> jax.Array:
        """W + decay · W + U, in the leaf's dtype and a part at a time."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"A {type(self).__name__} has no {name!r}: {_ONLY}")

    def __repr__(self) -> str:
        # JAX's own messages show it.
        return f"{type(self).__name__}(shape={self.shape}: {_ONLY})"

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(f"Not for a {type(self).__name__}: {_ONLY}")

    __add__ = __sub__ = __rsub__ = __pow__ = __abs__ = __array__ = _refuse

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __mul__(self, factor: Any) -> Any:
        if jnp.ndim(factor) != 0:
            return NotImplemented
        # In float32, whatever the leaf's dtype.
        factor = jnp.asarray(factor, jnp.promote_types(self.dtype, jnp.float32))
        return dataclasses.replace(self, decay=self.decay * factor, **self._scaled(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        return self * (1 / divisor)

    def __neg__(self) -> Any:
        return self * -1

    def with_decay(self, rate: Any) -> Any:
        """Adds rate · W."""
        return dataclasses.replace(self, decay=self.decay + rate)

    def __radd__(self, leaf: jax.Array) -> jax.Array:
        return self.added_to(leaf)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LowRankUpdate(Unformed):
    """An update decay · W + L R in place of an array: what ``factored_updates=True`` gives.

    It may be scaled, and :func:`apply_updates` adds it to its leaf; ``optax.apply_updates`` does
    too, by multiplying it out. It is no array: it must not cross the boundary of a ``jit``, and
    a stage of a chain that needs the numbers themselves raises.

    Attributes:
      decay: Coefficient of the leaf itself.
      dtype: The leaf's dtype.
      view: How the leaf is a matrix.
      left: L ([b,] m, r).
      right: R ([b,] r, n).
    """

    view: MatrixView
    left: jax.Array
    right: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    def _scaled(self, factor: jax.Array) -> dict[str, Any]:
        # Not the projector, which is the state's: that would be a copy of it.
        name = "right" if self.view.compressed == "left" else "left"
        part = getattr(self, name)
        return {name: part * factor.astype(part.dtype)}

    def added_to(self, leaf: jax.Array) -> jax.Array:
        return in_auto_mode(self._add, leaf, self.left, self.right, self.decay, like=leaf)

    def _add(self, leaf: jax.Array, left: jax.Array, right: jax.Array, decay: Any) -> jax.Array:
        wide = left.dtype

        def moved(matrix: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
            kept = matrix.astype(wide) * (1 + jnp.asarray(decay, wide))
            return (kept + product(left, right)).astype(matrix.dtype)

        view = self.view
        ordered = (*view.batch_axes, *view.row_axes, *view.column_axes)
        in_order = ordered == tuple(range(len(view.shape))) and view.granularity == 1
        small = not view.batch and view.m * view.n < SMALL
        if left.shape[-1] <= FUSED_RANK or small or not in_order:
            # Formed where it is added; or where matrices do not lie one after the other: no slice
            # can be updated in place.
            return view.leaf(moved(view.matrix(leaf), left, right))
        # XLA makes all the products L R of a program first, and then the sums: a copy of all
        # weights. What a loop makes has an end. On one device a stack is taken matrix by matrix; of
        # a mesh each may hold other matrices. There, and of a single one, every eighth row is
        # taken, because rows that lie together may all be on one device, too.
        in_turn = bool(view.batch) and jax.device_count() == 1
        axis, stack = 0, (*view.batch, view.m, view.n)
        if not in_turn:
            blocks, axis = math.gcd(view.m, 8), len(view.batch) + 1
            stack = (*view.batch, view.m // blocks, blocks, view.n)
            left = left.reshape(*stack[:-1], -1)

        def part(index: jax.Array, stack: jax.Array) -> jax.Array:
            def take(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False)

            new = moved(take(stack), take(left), take(right) if in_turn else right)
            return jax.lax.dynamic_update_index_in_dim(stack, new, index, axis)

        whole = jax.lax.fori_loop(0, stack[axis], part, leaf.reshape(stack))
        return whole.reshape(view.shape)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RandomUpdate(Unformed):
    """An update decay · W + Σ_j w_j z(key_j), drawn where it is added: as :class:`LowRankUpdate`.

    What zeroth-order methods give with ``factored_updates=True`` for leaves that move in full.

    Attributes:
      decay: Coefficient of the leaf itself.
      dtype: The leaf's dtype.
      leaf_shape: The leaf's shape.
      noise: Keys and weights w_j.
    """

    leaf_shape: tuple[int, ...]
    noise: Noise

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf_shape

    def _scaled(self, factor: jax.Array) -> dict[str, Any]:
        return {"noise": self.noise.scaled(factor)}

    def added_to(self, leaf: jax.Array) -> jax.Array:
        return plus_noise(leaf, self.noise, self.decay)


def apply_updates(params: Any, updates: Any) -> Any:
    """Adds updates to parameters like ``optax.apply_updates``, low-rank ones in place.

    With ``lorenza(..., factored_updates=True)`` the update of a projected leaf is a
    :class:`LowRankUpdate`. Here W + L R is formed matrix by matrix, straight into the buffer of W
    where that is donated: a scanned stack of layers needs no second copy of itself. What a
    zeroth-order method leaves as noise is drawn into it part by part.

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
        if isinstance(update, Unformed):
            return update.added_to(param)
        return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)

    return jax.tree.map(add, params, updates, is_leaf=lambda leaf: leaf is None)
