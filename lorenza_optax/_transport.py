"""How the inner optimizer's state crosses a refresh of the subspace."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._linalg import matmul

__all__ = ["TRANSPORTS", "check_rotatable", "transport"]

TRANSPORTS = ("keep", "reset", "rotate")

FIRST_MOMENTS = ("mu", "trace", "ema")
SECOND_MOMENT = "nu"


def transport(kind: str, state: Any, initial: Any, overlaps: dict[str, jax.Array]) -> Any:
    r"""The inner state in the new subspace.

    With :math:`C = P_{new}^\top P_{old}`, "rotate" is LDAdam's rule: the first moment is
    carried as a vector, the second through its variance, because a plain rotation would turn
    it negative:

    .. math::
      m \leftarrow C m, \qquad
      v \leftarrow \max\big((C \circ C)(v - m^2) + (C m)^2,\; 0\big).

    Args:
      kind: "keep" (numbers stay at their index, as GaLore does), "reset" (as new, the count
        included) or "rotate".
      state: The inner state; moments are dicts by path of ([b,] r, l) arrays.
      initial: A freshly initialized inner state.
      overlaps: C by path, ([b,] r, r).

    References:
      Robert, Safaryan, Modoranu, Alistarh, `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024
    """
    if kind == "keep":
        return state
    if kind == "reset":
        return initial
    return _rotate(state, overlaps)


def _rotate(node: Any, overlaps: dict[str, jax.Array]) -> Any:
    if not isinstance(node, tuple):
        return node
    if not hasattr(node, "_fields"):
        return tuple(_rotate(child, overlaps) for child in node)
    fields = node._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    first = next((fields[name] for name in FIRST_MOMENTS if name in fields), None)
    new = {}
    for name, value in fields.items():
        if name in FIRST_MOMENTS:
            new[name] = {path: matmul(overlaps[path], m) for path, m in value.items()}
        elif name == SECOND_MOMENT:
            new[name] = {
                path: _rotate_second(overlaps[path], v, None if first is None else first[path])
                for path, v in value.items()
            }
        else:
            new[name] = _rotate(value, overlaps)
    return type(node)(**new)


def _rotate_second(c: jax.Array, v: jax.Array, m: jax.Array | None) -> jax.Array:
    if m is None:
        return matmul(c * c, v)
    return jnp.maximum(matmul(c * c, v - m * m) + matmul(c, m) ** 2, 0)


def check_rotatable(state: Any, paths: set[str]) -> None:
    """Raises for an inner state whose moments "rotate" does not know.

    Args:
      state: The inner state of the projected leaves (arrays or their shapes).
      paths: The projected paths.
    """
    if isinstance(state, optax.ScaleByBeliefState):
        _refuse("ScaleByBeliefState.nu, a variance about the first moment")
    if isinstance(state, tuple):
        named = hasattr(state, "_fields")
        names = state._fields if named else range(len(state))  # pyright: ignore[reportAttributeAccessIssue]
        for name, child in zip(names, state, strict=True):
            is_moments = isinstance(child, dict) and set(child) == paths
            if is_moments and name not in (*FIRST_MOMENTS, SECOND_MOMENT):
                _refuse(f"{type(state).__name__}.{name}")
            if not is_moments:
                check_rotatable(child, paths)
    elif jax.tree.leaves(state) and not hasattr(state, "dtype"):
        _refuse(f"a {type(state).__name__}")


def _refuse(what: str) -> None:
    raise ValueError(
        "moment_transport='rotate' knows Optax states with moments named"
        f" {', '.join(FIRST_MOMENTS)} and {SECOND_MOMENT}; the base_optimizer's state has {what}."
        " Use moment_transport='keep' or 'reset'."
    )
