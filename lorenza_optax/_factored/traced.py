"""The user's loss as a traced program: its equations, and the weights that it has to form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from lorenza_optax._base.noise import Noisy
from lorenza_optax._factored.interpreter import Materialized, evaluate
from lorenza_optax._factored.weight import Factored, factored, materialize
from lorenza_optax._plan.matrix_view import MatrixView

__all__ = ["casts", "equations", "formed", "trace", "weight_at"]

Arrays = Mapping[str, jax.Array]


def weight_at(path: str, leaf: jax.Array, view: MatrixView | None, terms: Any) -> Any:
    """A leaf plus products, kept factored; the leaf itself where there are none."""
    if view is None or not terms:
        return leaf
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    turned = view.compressed == "right"

    def cast(part: jax.Array, is_scaled: bool) -> jax.Array:
        return part if is_scaled else part.astype(wide)  # what is scaled is cast where it is used

    terms = [
        (cast(left, turned and u is not None), cast(right, not turned and u is not None), zero,
         None if u is None else u.astype(wide))
        for left, right, zero, u in terms
    ]  # fmt: skip
    return factored(path, leaf, view, terms)


def trace(loss: Callable[[Arrays], Any], leaves: Arrays) -> tuple[Any, Callable[[Any], Any]]:
    """The traced loss, and what puts its outputs together again."""
    static: dict[str, Any] = {}

    def flat(*values: jax.Array) -> list[Any]:
        outputs, treedef = jax.tree.flatten(loss(dict(zip(leaves, values, strict=True))))
        is_array = [isinstance(out, jax.core.Tracer) for out in outputs]
        # What does not depend on the trace (constants, or no arrays at all) is handed on as it is.
        static["rest"] = [None if a else out for a, out in zip(is_array, outputs, strict=True)]
        static["is_array"], static["treedef"] = is_array, treedef
        return [out for a, out in zip(is_array, outputs, strict=True) if a]

    traced = jax.make_jaxpr(flat)(*leaves.values())

    def rebuild(outputs: list[Any]) -> Any:
        arrays = iter([plain(output) for output in outputs])
        pairs = zip(static["is_array"], static["rest"], strict=True)
        return static["treedef"].unflatten([next(arrays) if a else rest for a, rest in pairs])

    def plain(output: Any) -> Any:
        if isinstance(output, Noisy):
            return output.formed()
        return materialize(output) if isinstance(output, Factored) else output

    return traced, rebuild


def casts(traced: Any) -> bool:
    """Whether a program casts anything to less than 32 bits."""
    return any(
        jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        for eqn in equations(traced.jaxpr)
        if (dtype := eqn.params.get("new_dtype")) is not None
    )


def formed(traced: Any, leaves: Arrays, views: Mapping[str, MatrixView]) -> Materialized:
    """The leaves whose sum the program needs, found by evaluating it without numbers."""
    found = Materialized()
    zeros = {path: (jnp.zeros((*v.batch, v.m, 1)), jnp.zeros((*v.batch, 1, v.n)))
             for path, v in views.items()}  # fmt: skip
    weights = [
        weight_at(
            path, leaf, views.get(path), [(*zeros[path], False, None)] if path in zeros else []
        )
        for path, leaf in leaves.items()
    ]
    jax.eval_shape(lambda args: _discard(evaluate(traced, args, found), found), weights)
    return found


def _discard(outputs: list[Any], found: Materialized) -> None:
    """Nothing, but a note of weights that are returned and must not be rounded."""
    for value in outputs:
        if isinstance(value, Factored) and value.narrow:
            found.setdefault(value.path, "output")


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those in its control flow included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
