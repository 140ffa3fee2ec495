"""Trees whose leaves lie in another order than their sorted paths: "10" sorts before "2".

What jax transforms as a dict by path comes back sorted. So lists of more than ten layers, fields of
NamedTuples and keys like "mlp-2" tell whether leaves are ever matched by place.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lorenza_optax
from lorenza_optax import methods
from lorenza_optax.flax import nnx_train_step
from tests import problems
from tests.test_family import BACKPROP, ZEROTH_ORDER

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.filterwarnings("ignore:.*not projected"),
]


class Block(NamedTuple):
    w_out: Any
    w_in: Any
    bias: Any


def _matrix(seed, shape=(8, 8)):
    return jnp.asarray(0.6 * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _blocks(make, *shapes):
    return make(*(_matrix(10 + i, shape) for i, shape in enumerate(shapes)))


# (params, the matrices in the order in which the loss applies them)
TREES = {
    "list": ({"layers": [_matrix(i) for i in range(11)]}, lambda p: p["layers"]),
    "NamedTuple": (_blocks(Block, (8, 6), (6, 8), (8,)), lambda p: (p.w_out, p.w_in)),
    "same shapes": (_blocks(Block, (8, 8), (8, 8), (8,)), lambda p: (p.w_out, p.w_in)),
    "OrderedDict": (OrderedDict(w=_matrix(1), a=_matrix(2)), lambda p: (p["w"], p["a"])),
    "hyphen": (
        {"mlp": {"w": _matrix(1)}, "mlp-2": {"w": _matrix(2)}},
        lambda p: (p["mlp"]["w"], p["mlp-2"]["w"]),
    ),
}
X = _matrix(99, (5, 8))


def _loss(name):
    matrices = TREES[name][1]

    def loss(params, x):
        for w in matrices(params):
            x = jnp.tanh(x @ w)
        vectors = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 1]
        return jnp.mean(x**2) + sum(jnp.sum(leaf**2) for leaf in vectors)

    return loss


FACTORIES = {name: (getattr(methods, name), kwargs) for name, kwargs in BACKPROP.items()} | {
    "lorenza": (lorenza_optax.lorenza, {"rank": 3, "rho": 0.0}),
    "lorenza sketched": (lorenza_optax.lorenza, {"rank": 3, "rho": 0.0, "refresh": "sketch"}),
    "lorenza staggered": (lorenza_optax.lorenza, {"rank": 3, "rho": 0.0, "stagger": True}),
    "lorenza_plus": (lorenza_optax.lorenza_plus, {"rank": 3, "rho": 0.0}),
    "adazo_sam": (lorenza_optax.adazo_sam, {"rho": 0.0}),
}


def _make(name):
    factory, kwargs = FACTORIES[name]
    return factory(1e-2, **kwargs)


@pytest.mark.parametrize("tree", TREES)
def test_value_and_gradient_are_jaxs(tree):
    params, loss = TREES[tree][0], _loss(tree)
    expected = jax.value_and_grad(loss)(params, X)
    state = _make("lorenza").init(params)
    found = lorenza_optax.perturbed_value_and_grad(loss, rho=0.0)(params, X, opt_state=state)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)
    for sam in (methods.sam, methods.asam):
        tx = optax.chain(sam(rho=0.0), optax.identity())
        updates, _ = tx.update(None, tx.init(params), params, value_fn=loss, x=X)
        chex.assert_trees_all_close(updates, expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tree", ["list", "NamedTuple"])
def test_sam_goes_up_the_gradient(tree):
    params, loss = TREES[tree][0], _loss(tree)
    gradient = jax.grad(loss)(params, X)
    scale = 0.1 / optax.tree.norm(gradient)
    point = jax.tree.map(lambda p, g: p + scale * g, params, gradient)
    tx = methods.sam(rho=0.1)
    found, _ = tx.update(None, tx.init(params), params, value_fn=loss, x=X)
    chex.assert_trees_all_close(found, jax.grad(loss)(point, X), rtol=1e-4, atol=1e-6)


QUICK = ("galore", "owlore", "lorenza", "lorenza_plus", "adazo_sam")


@pytest.mark.parametrize("name", problems.few(FACTORIES, ("owlore", "lorenza", "adazo_sam")))
def test_the_loss_does_as_its_gradient(name):
    tree = "list" if name == "owlore" else "NamedTuple"  # owlore wants layers
    params, loss, tx = TREES[tree][0], _loss(tree), _make(name)
    given, own = tx.init(params), tx.init(params)
    for _ in range(2):
        by_gradient, given = tx.update(jax.grad(loss)(params, X), given, params)
        by_loss, own = tx.update(None, own, params, value_fn=loss, x=X)
        if name != "lorenza sketched":  # which decomposes a sketch where it has the loss
            chex.assert_trees_all_close(by_loss, by_gradient, rtol=1e-3, atol=1e-5)
        params = optax.apply_updates(params, by_loss)
    assert loss(params, X) < loss(TREES[tree][0], X)


@pytest.mark.parametrize("name", problems.few(FACTORIES, QUICK))
def test_gradients_may_lie_in_another_order(name):
    """As of a loss that was written on a plain dict of the same leaves."""
    params = OrderedDict(z=_matrix(1), layers=[{"k": _matrix(i)} for i in (2, 3, 4)], a=_matrix(5))
    gradients = jax.tree.map(lambda p: p + 1, params)
    tx = _make(name)
    expected, _ = tx.update(gradients, tx.init(params), params)
    found, _ = tx.update(dict(gradients), tx.init(params), params)
    chex.assert_trees_all_close(found, dict(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [n if n == "mezo" else problems.slow(n) for n in ZEROTH_ORDER])
def test_forward_passes_alone(name):
    params, loss = TREES["NamedTuple"][0], _loss("NamedTuple")
    tx = getattr(methods, name)(1e-6, **ZEROTH_ORDER[name])
    updates, state = tx.update(None, tx.init(params), params, value_fn=loss, x=X)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    np.testing.assert_allclose(optax.tree.get(state, "value"), loss(params, X), rtol=1e-3)


def test_nnx_with_many_layers():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(12)])

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    model = Deep(nnx.Rngs(0))
    expected = loss(model, X)
    optimizer = nnx.Optimizer(model, _make("lorenza"), wrt=nnx.Param)
    step = nnx_train_step(loss)
    np.testing.assert_allclose(step(model, optimizer, X), expected, rtol=1e-5)
