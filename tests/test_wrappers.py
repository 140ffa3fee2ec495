"""Every way to a gradient inside every wrapper: it works, perturbed, or says what to use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec as P

import lorenza_optax
from lorenza_optax import momentum_sam_eval_params
from tests import problems

SHAPES = {"a": (12, 20), "b": (24, 10), "bias": (20,)}
STRUCTURE = {"rank": 4, "update_proj_gap": 3}
RHO = 0.1
PARAMS, TARGET = (problems.params(seed, shapes=SHAPES) for seed in (0, 1))
loss = problems.quadratic


def _lorenza(rho=RHO):
    return lorenza_optax.lorenza(1e-2, rho=rho, **STRUCTURE)


def _momentum(rho=RHO):
    return lorenza_optax.momentum_sam(_lorenza(0.0), rho=rho)


# Of each way: the optimizer, and (value at the evaluated point, updates, state) from
# (tx, params, state).
def _in_update(tx, params, state, target=TARGET, grads=None, **extra):
    updates, state = tx.update(grads, state, params, value_fn=loss, target=target, **extra)
    return optax.tree.get(state, "value", filtering=_of_an_ascent), updates, state


def _perturbed(tx, params, state, target=TARGET, axis_name=None, **extra):
    value_and_grad = lorenza_optax.perturbed_value_and_grad(loss, rho=RHO, axis_name=axis_name)
    value, grads = value_and_grad(params, target, opt_state=state)
    updates, state = tx.update(grads, state, params, **extra)
    return value, updates, state


def _subspace(tx, params, state, target=TARGET, axis_name=None, **extra):
    arguments = {"rho": RHO, "axis_name": axis_name, **STRUCTURE}
    value_and_grad = lorenza_optax.subspace_value_and_grad(loss, **arguments)
    value, grads, state = value_and_grad(params, target, opt_state=state)
    updates, state = tx.update(grads, state, params, **extra)
    return value, updates, state


def _held(tx, params, state, target=TARGET, **extra):
    value, grads = jax.value_and_grad(loss)(params, target)
    if "axis" in extra:
        grads = jax.lax.pmean(grads, extra.pop("axis"))
    updates, state = tx.update(grads, state, params, **extra)
    return value, updates, state


def _of_an_ascent(path, _):
    return any(getattr(key, "tuple_name", "").endswith("AscentState") for key in path)


WAYS = {
    "value_fn": (_lorenza, _in_update),
    "perturbed_value_and_grad": (_lorenza, _perturbed),
    "subspace_value_and_grad": (_lorenza, _subspace),
    "momentum_sam": (_momentum, _held),
}

EVERYWHERE = dict.fromkeys(WAYS)
USE_OUTER = "perturbed_value_and_grad"
WRAPPERS = {
    "named_chain": (lambda tx: optax.named_chain(("x", tx)), EVERYWHERE),
    "inject_hyperparams": (
        lambda tx: optax.inject_hyperparams(lambda step: optax.chain(tx, optax.scale(step)))(1.0),
        EVERYWHERE,
    ),
    "masked": (
        lambda tx: optax.chain(
            optax.masked(tx, {"a": True, "b": False, "bias": True}),
            optax.masked(optax.sgd(1e-2), {"a": False, "b": True, "bias": False}),
        ),
        {**EVERYWHERE, "value_fn": USE_OUTER, "subspace_value_and_grad": USE_OUTER},
    ),
    "partition": (
        lambda tx: optax.partition(
            {"x": tx, "y": optax.sgd(1e-2)}, {"a": "x", "b": "x", "bias": "y"}
        ),
        {**EVERYWHERE, "value_fn": USE_OUTER, "subspace_value_and_grad": USE_OUTER},
    ),
    "apply_if_finite": (
        lambda tx: optax.apply_if_finite(tx, 2),
        {**EVERYWHERE, "value_fn": USE_OUTER, "subspace_value_and_grad": USE_OUTER},
    ),
    "MultiSteps": (
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        {**EVERYWHERE, "value_fn": USE_OUTER, "subspace_value_and_grad": USE_OUTER},
    ),
    "mechanize": (
        lambda tx: optax.contrib.mechanize(tx, s_init=1e-2),
        {
            "value_fn": USE_OUTER,
            "perturbed_value_and_grad": None,
            "subspace_value_and_grad": USE_OUTER,
            "momentum_sam": r"momentum_sam\(optax.mechanize",
        },
    ),
    "schedule_free": (
        lambda tx: optax.contrib.schedule_free(tx, learning_rate=1e-2),
        {**EVERYWHERE, "momentum_sam": r"momentum_sam\(optax.schedule_free"},
    ),
    "reduce_on_plateau": (
        lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(patience=3)),
        {**EVERYWHERE, "momentum_sam": "-"},
    ),
    "momentum_sam outside": (
        lambda tx: lorenza_optax.momentum_sam(
            optax.contrib.schedule_free(tx, learning_rate=1e-2), rho=RHO
        ),
        {
            "value_fn": "leave it out, or use lorenza",
            "perturbed_value_and_grad": None,
            "subspace_value_and_grad": "momentum_sam keeps its perturbation in the parameters",
            "momentum_sam": "-",
        },
    ),
}
CELLS = [
    problems.slow(way, wrapper)
    if way == "subspace_value_and_grad" and wrapper not in ("masked", "MultiSteps")
    else (way, wrapper)
    for way in WAYS
    for wrapper in WRAPPERS
]


def _wrapped(way, wrapper, rho=RHO):
    make, step = WAYS[way]
    wrap, outcome = WRAPPERS[wrapper]
    return (lambda: wrap(make(rho))), step, outcome[way]


def _extra(wrapper):
    return {"value": 1.0} if wrapper == "reduce_on_plateau" else {}


@pytest.mark.parametrize(("way", "wrapper"), CELLS)
def test_each_way_in_each_wrapper(way, wrapper):
    make, step, outcome = _wrapped(way, wrapper)
    if outcome == "-":
        pytest.skip("momentum_sam goes outermost, as its documentation says")
    if outcome is not None:
        # Optax itself refuses None in some of these.
        grads = {"grads": PARAMS} if way == "value_fn" else {}
        with pytest.raises(ValueError, match=outcome):
            step(make(), PARAMS, make().init(PARAMS), **grads, **_extra(wrapper))
        return
    tx = make()
    params, state = PARAMS, tx.init(PARAMS)
    run = jax.jit(functools.partial(step, tx, **_extra(wrapper)))
    before, perturbed = loss(PARAMS, TARGET), []
    for _ in range(8):
        unperturbed = loss(params, TARGET)
        if way == "momentum_sam":
            unperturbed = loss(momentum_sam_eval_params(state, params), TARGET)
        value, updates, state = run(params, state)
        perturbed.append(abs(float(value - unperturbed)) > 1e-4)
        params = optax.apply_updates(params, updates)
    # The first has no subspace yet, or no moment; MultiSteps' second neither.
    assert all(perturbed[3:]), perturbed
    assert loss(params, TARGET) < before
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, state)))


PROGRAMS = [
    pytest.param(way, program, marks=pytest.mark.slow if way in less else ())
    for program, less in {
        "scan and donation": ("perturbed_value_and_grad", "subspace_value_and_grad"),
        "export": ("perturbed_value_and_grad", "subspace_value_and_grad", "momentum_sam"),
        # test_conformance.py has value_fn.
        "shard_map": ("value_fn", "perturbed_value_and_grad", "momentum_sam"),
    }.items()
    for way in WAYS
]


@pytest.mark.parametrize(("way", "program"), PROGRAMS)
def test_each_way_in_each_program(way, program):
    make, step = WAYS[way]
    tx = make()
    steps = 5

    def once(params, state, **extra):
        value, updates, state = step(tx, params, state, **extra)
        return optax.apply_updates(params, updates), state, value

    def train(run, params, state):
        values = []
        for _ in range(steps):
            params, state, value = run(params, state)
            values.append(value)
        return params, state, jnp.stack(values)

    copy = lambda: jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))  # noqa: E731
    expected, _, values = train(jax.jit(once), *copy())
    if program == "scan and donation":

        def body(carry, _):
            params, state, value = once(*carry)
            return (params, state), value

        scanned = jax.jit(lambda c: jax.lax.scan(body, c, length=steps), donate_argnums=0)
        (found, _), got = scanned(copy())
    elif program == "export":
        found, _, got = train(jax.export.export(jax.jit(once))(*copy()).call, *copy())
    else:
        found, _, got = _sharded(way, steps)
    np.testing.assert_allclose(got, values, rtol=2e-3)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-3)


def _sharded(way, steps):
    """The same with the target's difference from the parameters spread over eight devices."""
    make, step = WAYS[way]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    # The mean over devices of quadratics round these targets has the gradient of the one round
    # their mean, and the values differ by a constant.
    noise = {k: problems.params(seed=3, shapes={"n": (8, *s)})["n"] for k, s in SHAPES.items()}
    noise = {k: 0.1 * (n - n.mean(axis=0)) for k, n in noise.items()}
    targets = {k: TARGET[k] + noise[k] for k in SHAPES}
    constant = sum(0.5 * float(jnp.sum(n * n)) / 8 for n in noise.values())
    if way == "value_fn":
        tx, extra = lorenza_optax.lorenza(1e-2, rho=RHO, axis_name="x", **STRUCTURE), {}
    else:
        tx = make()
        extra = {"axis": "x"} if way == "momentum_sam" else {"axis_name": "x"}

    def once(params, state, targets):
        target = jax.tree.map(lambda t: t[0], targets)
        value, updates, state = step(tx, params, state, target=target, **extra)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(value, "x")

    once = jax.jit(
        jax.shard_map(once, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=P(), check_vma=False)
    )
    params, state, values = PARAMS, tx.init(PARAMS), []
    for _ in range(steps):
        params, state, value = once(params, state, targets)
        values.append(value - constant)
    return params, state, jnp.stack(values)
