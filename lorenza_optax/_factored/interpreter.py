"""Evaluates a traced loss with factored weights: equation by equation, into its control flow.

Not quax, whose array-ish values could carry the same rules: with them it makes the same program
(quax 0.4.6: equal FLOPs and temporary memory, traced in 0.97 to 1.18 times the time), but it forms
the weights at every `remat`, raises for any `custom_vjp` in the loss, and for a `custom_jvp`
function of a weight its derivatives are wrong.

The equations of a jitted function join those around it, so shardings that it asks for its own
arguments are left out, and one called in each layer is compiled for each layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from lorenza_optax._base.noise import Noisy, is_stack
from lorenza_optax._factored.rules import RULES
from lorenza_optax._factored.weight import Factored, materialize

__all__ = ["Materialized", "evaluate"]


class Materialized(dict[str, str]):
    """Paths of the leaves whose sum had to be formed, with the primitive that asked for it.

    Attributes:
      rounded: Those of them whose weight had been cast to less than 32 bits before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded: set[str] = set()


def evaluate(closed: Any, args: Sequence[Any], seen: Materialized) -> list[Any]:
    """The outputs of a closed jaxpr whose arguments may be :class:`Factored` or :class:`Noisy`.

    Equations that no factored weight reaches are evaluated as they are; what is done with the
    others is said by ``RULES`` and, for those that contain a jaxpr, by the functions below. A noisy
    weight is formed by the first equation that uses it, after the one before.

    Args:
      closed: The traced function.
      args: Arrays and weights, one for each of its inputs.
      seen: Is told of leaves that had to be materialized.
    """
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if hasattr(atom, "val") else values[atom]  # noqa: E731
    last = _last_array(args)
    for eqn in _live(jaxpr):
        inputs = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name not in ENTERED:
            inputs = [x.formed(last) if isinstance(x, Noisy) else x for x in inputs]
        with eqn.ctx.manager:
            outputs = _equation(eqn, inputs, seen)
        values.update(zip(eqn.outvars, outputs, strict=True))
        last = last if (found := _last_array(outputs)) is None else found
    return [read(atom) for atom in jaxpr.outvars]


def _live(jaxpr: Any) -> list[Any]:
    """The equations that an output or an effect needs: a dead one must not materialize."""
    needed = {atom for atom in jaxpr.outvars if not hasattr(atom, "val")}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or needed.intersection(eqn.outvars):
            live.append(eqn)
            needed.update(atom for atom in eqn.invars if not hasattr(atom, "val"))
    return live[::-1]


def _last_array(values: Sequence[Any]) -> Any:
    """The last of some values that is computed, and no weight; None if none is."""
    is_array = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return next((x for x in reversed(values) if is_array(x) and x.size), None)


def _bind(eqn: Any, *arrays: Any) -> Any:
    """The equation itself, on arrays."""
    return eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(eqn.params))


def _equation(eqn: Any, inputs: list[Any], seen: Materialized) -> list[Any]:
    name = eqn.primitive.name

    bind = functools.partial(_bind, eqn)
    outputs: Any = NotImplemented
    if any(isinstance(value, (Factored, Noisy)) for value in inputs):
        if name in CONTROL_FLOW:
            return CONTROL_FLOW[name](eqn, inputs, seen)
        if name in RULES:
            outputs = RULES[name](bind, eqn.params, *inputs)
        weights = [i for i, value in enumerate(inputs) if isinstance(value, Factored)]
        if outputs is NotImplemented and name in RULES and len(weights) > 1:
            # Of two weights the larger one may stay.
            smallest = min(weights, key=lambda i: inputs[i].base.size)
            inputs = list(inputs)
            inputs[smallest] = _plain(inputs[smallest], seen, name)
            outputs = RULES[name](bind, eqn.params, *inputs)
    if outputs is NotImplemented:
        outputs = bind(*(_plain(value, seen, name) for value in inputs))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _plain(value: Any, seen: Materialized, name: str) -> Any:
    if isinstance(value, Noisy):
        return value.formed()
    if not isinstance(value, Factored):
        return value
    seen.setdefault(value.path, name)
    if jnp.finfo(value.base.dtype).bits < 32:
        seen.rounded.add(value.path)
    return materialize(value)


def _closed(jaxpr: Any) -> Any:
    return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, ())


def _call(eqn: Any, inputs: list[Any], seen: Materialized) -> list[Any]:
    """A function that was jit-compiled: its equations join those around it."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return evaluate(_closed(inner), inputs, seen)


def _checkpoint(eqn: Any, inputs: list[Any], seen: Materialized) -> list[Any]:
    inner = _closed(eqn.params["jaxpr"])
    again = jax.checkpoint(
        lambda *args: evaluate(inner, args, seen),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return list(again(*inputs))


def _cond(eqn: Any, inputs: list[Any], seen: Materialized) -> list[Any]:
    index, *operands = inputs
    if eqn.params.get("branches_platforms"):  # of lax.platform_dependent: not all can be lowered
        return list(_bind(eqn, *(_plain(value, seen, "platform_dependent") for value in inputs)))

    def branch(closed: Any) -> Callable[[], list[Any]]:
        return lambda: [_plain(out, seen, "cond") for out in evaluate(closed, operands, seen)]

    # Operands are closed over, like anything else of the trace.
    return jax.lax.switch(index, [branch(_closed(inner)) for inner in eqn.params["branches"]])


def _fixed(values: list[Any], body: Any, offset: int, seen: Materialized, name: str) -> list[bool]:
    """Which carried weights a loop hands on unchanged; any other is materialized in ``values``."""
    fixed = []
    for i, value in enumerate(values):
        same = body.jaxpr.outvars[i] is body.jaxpr.invars[offset + i]
        fixed.append(isinstance(value, (Factored, Noisy)) and same)
        if not fixed[i]:
            values[i] = _plain(value, seen, name)
    return fixed


def _merge(fixed: list[bool], constant: list[Any], carry: Sequence[Any]) -> list[Any]:
    rest = iter(carry)
    return [value if same else next(rest) for same, value in zip(fixed, constant, strict=True)]


def _scan(eqn: Any, inputs: list[Any], seen: Materialized) -> list[Any]:
    params, body = eqn.params, _closed(eqn.params["jaxpr"])
    # A slice has an axis less than its stack: so much is the same in all versions of JAX.
    same_shape = lambda pair: pair[0].aval.shape == pair[1].aval.shape  # noqa: E731
    last = sum(map(same_shape, zip(eqn.invars, body.jaxpr.invars, strict=True)))
    first = last - sum(map(same_shape, zip(eqn.outvars, body.jaxpr.outvars, strict=True)))
    consts, init, xs = inputs[:first], inputs[first:last], inputs[last:]
    fixed = _fixed(init, body, first, seen, "scan")
    xs = [value if _has_layers(value) else _plain(value, seen, "scan") for value in xs]
    sliced = [(x.base, jnp.arange(len(x.base))) if isinstance(x, Noisy) else x for x in xs]

    def layer(whole: Any, own: Any) -> Any:
        if isinstance(whole, Noisy):
            base, index = own
            return dataclasses.replace(whole, base=base, noise=whole.noise.of_part(index))
        return own.like(own.base, own.labels[1:]) if isinstance(own, Factored) else own

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        slices = [layer(x, own) for x, own in zip(xs, slices, strict=True)]
        args = [*consts, *_merge(fixed, init, carry), *slices]
        outputs = evaluate(body, args, seen)
        new = [out for out, same in zip(outputs, fixed, strict=False) if not same]
        ys = [out.formed() if isinstance(out, Noisy) else out for out in outputs[len(init) :]]
        return [_plain(out, seen, "scan") for out in new], ys

    start = [value for value, same in zip(init, fixed, strict=True) if not same]
    carry, ys = jax.lax.scan(
        step, start, sliced, length=params["length"], reverse=params["reverse"],
        unroll=params["unroll"],
    )  # fmt: skip
    ys = [y.like(y.base, "b" + y.labels) if isinstance(y, Factored) else y for y in ys]
    return [*_merge(fixed, init, carry), *ys]


def _has_layers(value: Any) -> bool:
    """Whether a slice of a value along its first axis is one of the same kind; an array's is."""
    if isinstance(value, Noisy):
        return is_stack(value.base.shape)
    return not isinstance(value, Factored) or value.labels[0] == "b"


def _while(eqn: Any, inputs: list[Any], seen: Materialized) -> list[Any]:
    params = eqn.params
    test, body = _closed(params["cond_jaxpr"]), _closed(params["body_jaxpr"])
    first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    test_consts, body_consts, init = inputs[:first], inputs[first:last], inputs[last:]
    fixed = _fixed(init, body, len(body_consts), seen, "while")

    def go_on(carry: list[Any]) -> Any:
        return evaluate(test, [*test_consts, *_merge(fixed, init, carry)], seen)[0]

    def step(carry: list[Any]) -> list[Any]:
        outputs = evaluate(body, [*body_consts, *_merge(fixed, init, carry)], seen)
        new = [out for out, same in zip(outputs, fixed, strict=True) if not same]
        return [_plain(out, seen, "while") for out in new]

    start = [value for value, same in zip(init, fixed, strict=True) if not same]
    return _merge(fixed, init, jax.lax.while_loop(go_on, step, start))


def _custom_jvp(eqn: Any, inputs: list[Any], seen: Materialized) -> list[Any]:
    """Keeps the user's rule: it is traced, and evaluated on factored primals and tangents."""
    leaves, treedef = jax.tree.flatten(inputs)
    inner = _closed(eqn.params["call_jaxpr"])

    original = functools.partial(_bind, eqn)

    def run(closed: Any, args: Sequence[Any]) -> list[Any]:
        outputs = evaluate(closed, args, seen)
        return [_plain(out, seen, "custom_jvp_call") for out in outputs]

    @jax.custom_jvp
    def function(*leaves: Any) -> list[Any]:
        return run(inner, jax.tree.unflatten(treedef, leaves))

    @function.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        points = jax.tree.unflatten(treedef, primals)
        moves = jax.tree.unflatten(treedef, tangents)
        real = [jnp.issubdtype(jnp.result_type(atom.aval), jnp.inexact) for atom in eqn.invars]

        def jvp(points: list[Any], moves: list[Any]) -> Any:
            def of_real(*arrays: Any) -> Any:
                rest = iter(arrays)
                return original(
                    *(next(rest) if r else p for r, p in zip(real, points, strict=True))
                )

            at = [p for r, p in zip(real, points, strict=True) if r]
            return jax.jvp(of_real, at, moves)

        shapes = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars]
        along = [s for r, s in zip(real, shapes, strict=True) if r]
        traced = jax.make_jaxpr(jvp)(shapes, along)
        moved = [
            _tangent(p, t) if isinstance(p, Factored) else t
            for p, t, r in zip(points, moves, real, strict=True)
            if r
        ]
        outputs = run(traced, [*points, *moved])
        return outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]

    return list(function(*leaves))


def _tangent(value: Factored, move: Factored) -> Factored:
    """dW + Σ (dL Rᵀ + L dRᵀ), scaled ones with d of the scale, too."""
    terms = []
    for term, change in zip(value.terms, move.terms, strict=True):
        # Tangents lie as what they are tangents of.
        parts = ("left", "right") if term.scale is None else ("left", "right", "scale")
        for part in parts:
            terms.append(term._replace(**{part: getattr(change, part)}, vanishes=False))
    return Factored(value.path, value.labels, move.base, tuple(terms))


CONTROL_FLOW: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _call),
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _checkpoint),
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "scan": _scan,
    "while": _while,
}
# What a noisy weight goes into as it is: none of these computes anything itself.
ENTERED = CONTROL_FLOW.keys() - {"custom_jvp_call"}
