"""How the inner optimizer's state crosses a refresh of the subspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorenza_optax._inner.inner import FIRST_MOMENTS, SECOND_MOMENT
from lorenza_optax._linalg.decompositions import matmul
from lorenza_optax._linalg.stacks import overwritten
from lorenza_optax._plan.plan import Stack

__all__ = ["TRANSPORTS", "check_rotatable", "transport"]

Arrays = dict[str, jax.Array]
Corrections = tuple[Any, ...]

TRANSPORTS = ("keep", "reset", "rotate")


def transport(
    kind: str,
    state: Any,
    initial: Any,
    overlaps: dict[str, jax.Array],
    decays: tuple[Any, Any] | None,
    active: jax.typing.ArrayLike = True,
    stacks: Sequence[Stack] = (),
) -> Any:
    r"""The inner state in the new subspace.

    With :math:`C = P_{new}^\top P_{old}`, "rotate" is LDAdam's rule but for the clipping: the first
    moment is carried as a vector, the second through its variance, because a plain rotation would
    turn it negative:

    .. math::
      m \leftarrow C m, \qquad
      \hat v \leftarrow (C \circ C) \max(\hat v - \hat m^2, 0) + (C \hat m)^2 .

    The hats are bias corrections: without them v is far below m² for hundreds of steps. It is
    the variance that is clipped, where LDAdam's code takes the sum's absolute value. Clipping the
    sum would leave a v of 0 below an m that is not: with and without the corrections that gave
    steps more than 20 times as long at a refresh (a (24, 32) leaf, r = 4, T = 20). Where the
    decays are not known the rule acts on the moments as they are: safe, and at first too cautious.

    Args:
      kind: "keep" (numbers stay at their index, as GaLore does), "reset" (as new, the count
        included) or "rotate".
      state: The inner state; moments are dicts by path of ([b,] r, l) arrays.
      initial: A freshly initialized inner state.
      overlaps: C by path, ([b,] r, r).
      decays: (β₁, β₂) where the state is known to be Adam's.
      active: Whether there is a new subspace; if not, the state stays as it is.
      stacks: Those of the plan: what they say to take in turn is overwritten matrix by matrix.

    References:
      Robert, Safaryan, Modoranu, Alistarh, `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024
    """
    if kind == "keep":
        return state
    if kind == "reset":
        return jax.lax.cond(active, lambda: initial, lambda: state)
    batches = {paths[0]: batches for paths, batches, in_turn in stacks if in_turn}
    together = {path: c for path, c in overlaps.items() if path not in batches}

    def at_once(path: str, moments: Arrays, corrections: Corrections) -> Arrays:
        return _rotated(moments, together[path], corrections)

    def by_matrix(path: str, moments: Arrays, corrections: Corrections) -> Arrays:
        old = {name: [moment] for name, moment in moments.items()}
        rotated = overwritten(
            lambda moments, overlap: _rotated(moments, overlap, corrections),
            old, overlaps[path], batches[path], active, in_turn=True,
        )  # fmt: skip
        return {name: moment for name, [moment] in rotated.items()}

    if together:
        state = jax.lax.cond(
            active, lambda: _rotate(state, at_once, tuple(together), decays), lambda: state
        )
    return _rotate(state, by_matrix, tuple(batches), decays) if batches else state


def _rotate(
    node: Any, rotate: Callable[..., Arrays], paths: tuple[str, ...], decays: tuple[Any, Any] | None
) -> Any:
    """The state with the moments of some leaves rotated, those of one field each with the other."""
    if not isinstance(node, tuple):
        return node
    if not hasattr(node, "_fields"):
        return tuple(_rotate(child, rotate, paths, decays) for child in node)
    fields = node._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    corrections = (1.0, 1.0)
    if decays is not None:
        # Before the first update both moments are 0, and so is 1 - β⁰.
        corrections = tuple(1 - beta ** jnp.maximum(fields["count"], 1) for beta in decays)
    moments = {n: tree for n, tree in fields.items() if n in (*FIRST_MOMENTS, SECOND_MOMENT)}
    new = {
        name: dict(tree) if name in moments else _rotate(tree, rotate, paths, None)
        for name, tree in fields.items()
    }
    for path in paths:
        own = {name: tree[path] for name, tree in moments.items() if path in tree}
        for name, moment in (rotate(path, own, corrections) if own else {}).items():
            new[name][path] = moment
    return type(node)(**new)


def _rotated(moments: Arrays, c: jax.Array, corrections: Corrections) -> Arrays:
    first = next((moments[name] for name in FIRST_MOMENTS if name in moments), None)

    def second(v: jax.Array) -> jax.Array:
        if first is None:
            return matmul(c * c, v)
        m_hat, v_hat = first / corrections[0], v / corrections[1]
        rotated = matmul(c * c, jnp.maximum(v_hat - m_hat * m_hat, 0)) + matmul(c, m_hat) ** 2
        return (rotated * corrections[1]).astype(v.dtype)

    return {
        name: second(moment) if name == SECOND_MOMENT else matmul(c, moment)
        for name, moment in moments.items()
    }


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
