"""How the inner optimizer's state crosses a refresh of the subspace."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._inner import FIRST_MOMENTS, SECOND_MOMENT
from lorenza_optax._linalg import matmul

__all__ = ["TRANSPORTS", "check_rotatable", "transport"]

TRANSPORTS = ("keep", "reset", "rotate")


def transport(
    kind: str,
    state: Any,
    initial: Any,
    overlaps: dict[str, jax.Array],
    decays: tuple[Any, Any] | None,
) -> Any:
    r"""The inner state in the new subspace.

    With :math:`C = P_{new}^\top P_{old}`, "rotate" is LDAdam's rule: the first moment is
    carried as a vector, the second through its variance, because a plain rotation would turn
    it negative:

    .. math::
      m \leftarrow C m, \qquad
      \hat v \leftarrow (C \circ C) \max(\hat v - \hat m^2, 0) + (C \hat m)^2 .

    The hats are bias corrections: without them v is far below m² for hundreds of steps. It is
    the variance that is clipped and not the sum, which would leave a v of 0 below an m that is
    not: with and without the corrections that gave steps more than 20 times as long at a
    refresh (a (24, 32) leaf, r = 4, T = 20). Where the decays are not known the rule acts on
    the moments as they are: safe, and at first too cautious.

    Args:
      kind: "keep" (numbers stay at their index, as GaLore does), "reset" (as new, the count
        included) or "rotate".
      state: The inner state; moments are dicts by path of ([b,] r, l) arrays.
      initial: A freshly initialized inner state.
      overlaps: C by path, ([b,] r, r).
      decays: (β₁, β₂) where the state is known to be Adam's.

    References:
      Robert, Safaryan, Modoranu, Alistarh, `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024
    """
    if kind == "keep":
        return state
    if kind == "reset":
        return initial
    return _rotate(state, overlaps, decays)


def _rotate(node: Any, overlaps: dict[str, jax.Array], decays: tuple[Any, Any] | None) -> Any:
    if not isinstance(node, tuple):
        return node
    if not hasattr(node, "_fields"):
        return tuple(_rotate(child, overlaps, decays) for child in node)
    fields = node._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    first = next((fields[name] for name in FIRST_MOMENTS if name in fields), {})
    corrections = (1.0, 1.0)
    if decays is not None:
        # Before the first update both moments are 0, and so is 1 - β⁰.
        corrections = tuple(1 - beta ** jnp.maximum(fields["count"], 1) for beta in decays)
    new = {}
    for name, value in fields.items():
        if name in FIRST_MOMENTS:
            new[name] = {path: matmul(overlaps[path], m) for path, m in value.items()}
        elif name == SECOND_MOMENT:
            new[name] = {
                path: _rotate_second(overlaps[path], v, first.get(path), corrections)
                for path, v in value.items()
            }
        else:
            new[name] = _rotate(value, overlaps, None)
    return type(node)(**new)


def _rotate_second(
    c: jax.Array, v: jax.Array, m: jax.Array | None, corrections: tuple[Any, ...]
) -> jax.Array:
    if m is None:
        return matmul(c * c, v)
    m_hat, v_hat = m / corrections[0], v / corrections[1]
    rotated = matmul(c * c, jnp.maximum(v_hat - m_hat * m_hat, 0)) + matmul(c, m_hat) ** 2
    return (rotated * corrections[1]).astype(v.dtype)


def check_rotatable(inner: Any, state: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises for an inner state whose moments "rotate" does not know.

    Args:
      inner: The inner transformation.
      state: Its state for the projected leaves.
      shapes: The shape of each low-rank gradient by path.
    """
    _check_fields(state, shapes)
    if "nu" in getattr(state, "_fields", ()) and not _is_quadratic(inner):
        _refuse(f"{type(state).__name__}.nu, which is no mean of squared gradients")


def _check_fields(state: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    if isinstance(state, tuple):
        named = hasattr(state, "_fields")
        names = state._fields if named else range(len(state))  # pyright: ignore[reportAttributeAccessIssue]
        for name, child in zip(names, state, strict=True):
            moments = isinstance(child, dict) and set(child) == set(shapes)
            if moments and jax.tree.leaves(child):
                known = name in (*FIRST_MOMENTS, SECOND_MOMENT)
                if not known or any(
                    getattr(child[path], "shape", None) != shapes[path] for path in shapes
                ):
                    _refuse(f"{type(state).__name__}.{name}")
            else:
                _check_fields(child, shapes)
    elif isinstance(state, (dict, list)) and jax.tree.leaves(state):
        _refuse(f"a {type(state).__name__}")


def _is_quadratic(inner: Any) -> bool:
    """Whether ``nu`` grows with the square of the gradient, and does so at once.

    That of ``scale_by_adamax`` is a maximum, that of ``scale_by_belief`` a variance.
    """
    with jax.ensure_compile_time_eval():
        nus = []
        for size in (1.0, 2.0):
            gradient = {"x": size * jnp.ones((2, 2))}
            state = inner.update(gradient, inner.init(gradient), None)[1]
            again = inner.update(gradient, state, None)[1]
            nus.append((float(state.nu["x"][0, 0]), float(again.nu["x"][0, 0])))
    (once, twice), (of_double, _) = nus
    is_mean = abs(twice - (1 - (1 - once) ** 2)) < 1e-2 * twice  # 1 - β₂², from 1 - β₂
    return is_mean and abs(of_double / once - 4) < 1e-2


def _refuse(what: str) -> None:
    raise ValueError(
        "moment_transport='rotate' knows Optax states with moments named"
        f" {', '.join(FIRST_MOMENTS)} and {SECOND_MOMENT}; the base_optimizer's state has {what}."
        " Use moment_transport='keep' or 'reset'."
    )
