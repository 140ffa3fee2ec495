"""Losses at W + L R without the sum: the same numbers, and no array of the sum's size."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import lorenza_optax
from lorenza_optax import WeightDimensionNumbers
from lorenza_optax._ascent.ascent import AscentConfig
from lorenza_optax._ascent.gradient import low_rank_gradient
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._factored.landscape import (
    Displacement,
    Rows,
    Subspaces,
    landscape,
    multiplied,
)
from lorenza_optax._plan.matrix_view import matrix_view
from tests import problems

D, LAYERS, RANK = 12, 3, 2
STACK = WeightDimensionNumbers(1, 2)


def _normal(seed, *shape):
    return jnp.asarray(0.5 * np.random.default_rng(seed).standard_normal(shape))


X = _normal(1, 5, 7, D)


@jax.custom_jvp
def _dense(x, w):
    return jnp.sin(x @ w)


@_dense.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = x @ w
    return jnp.sin(y), 2 * jnp.cos(y) * (dx @ w + x @ dw)  # a rule of its own, twice the true one


@jax.custom_vjp
def _reversed(x, w):
    return x @ w


def _reversed_backward(saved, g):
    x, w = saved
    return g @ w.T, jnp.einsum("abi,abj->ij", x, g)


_reversed.defvjp(lambda x, w: (x @ w, (x, w)), _reversed_backward)


def _scan(params):
    def block(x, w):
        return jax.nn.silu(x @ w), w  # a stack that is handed on

    y, stack = jax.lax.scan(jax.checkpoint(block), X, params["w"])
    return y @ stack[1]


def _loop(params):
    def body(i, carry):
        w, y = carry  # a weight that a loop carries unchanged
        return w, jnp.tanh(y @ jax.lax.dynamic_index_in_dim(w, i, keepdims=False))

    y = jax.lax.fori_loop(0, LAYERS, body, (params["w"], X))[1]
    return jax.lax.cond(
        y.sum() > 0, lambda y: y @ params["w"][0], lambda y: y @ params["w"][1].T, y
    )


def _while(params):
    def step(carry):
        i, y = carry
        return i + 1, jnp.tanh(y @ params["w"])

    return jax.lax.while_loop(lambda carry: carry[0] < 2, step, (0, X))[1]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(3)(x))
        return nn.Dense(D)(nn.relu(nn.Dense(2 * D)(x)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.gelu(nn.Dense(D, dtype=jnp.float32)(x)), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer)
        scanned = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True},
                          length=LAYERS)  # fmt: skip
        return scanned(name="layers")(x, None)[0]


def _linen(module):
    params = module.init(jax.random.key(0), X)["params"]
    return params, lambda p: module.apply({"params": p}, X)


def _nnx():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x):
            return nnx.silu(self.linear(x))

    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=LAYERS)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def create(rngs):
                return Block(rngs)

            self.blocks = create(rngs)
            self.out = nnx.LinearGeneral(D, (3, 4), rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x, block):
                return nnx.remat(lambda block, x: block(x))(block, x)

            return self.out(forward(x, self.blocks))

    graph, params = nnx.split(Model(nnx.Rngs(0)))
    return params, lambda p: nnx.merge(graph, p)(X)


W, WS = {"w": _normal(0, D, D)}, {"w": _normal(0, LAYERS, D, D)}
HEADS = {"w": _normal(0, D, 3, 4), "o": _normal(2, 3, 4, D)}
HEAD_NUMBERS = {"w": WeightDimensionNumbers(0, (1, 2)), "o": WeightDimensionNumbers((0, 1), 2)}
TABLE = jnp.arange(35).reshape(5, 7) % D
FAR = TABLE.at[0, 0].set(D + 3)  # beyond the table

# name -> (params, function of them, dimension numbers by path)
CASES = {
    "dense": (W, lambda p: jnp.tanh(X @ p["w"]) @ p["w"].T, {"w": None}),
    "scan and remat": (WS, _scan, {"w": STACK}),
    "loop and cond": (WS, _loop, {"w": STACK}),
    "einsum": (
        HEADS,
        lambda p: jnp.einsum("bthd,hde->bte", jnp.einsum("bti,ihd->bthd", X, p["w"]), p["o"]),
        HEAD_NUMBERS,
    ),
    "reshape": (W, lambda p: jnp.einsum("bti,ihd->bthd", X, p["w"].reshape(D, 3, 4)), {"w": None}),
    "merged": (HEADS, lambda p: X @ p["w"].reshape(D, D) @ p["o"].reshape(D, D), HEAD_NUMBERS),
    "tied embedding": (W, lambda p: jnp.tanh(p["w"][TABLE]) @ p["w"].T, {"w": None}),
    "scaled": (W, lambda p: X @ (3.0 * p["w"] / 2) - X @ (-p["w"] + 1.0), {"w": None}),
    "two weights": (WS, lambda p: X @ (p["w"][0] + p["w"][1]), {"w": STACK}),
    "split": (W, lambda p: jnp.concatenate([X @ a for a in jnp.split(p["w"], 3, 1)]), {"w": None}),
    "vmap": (WS, lambda p: jax.vmap(lambda w: X @ w)(p["w"]), {"w": STACK}),
    "inner gradient": (W, lambda p: jax.grad(lambda x: jnp.sum(jnp.sin(x @ p["w"])))(X),
                       {"w": None}),
    "jit": (W, lambda p: jax.jit(lambda w, x: jax.nn.relu(x @ w))(p["w"], X), {"w": None}),
    "filled": (W, lambda p: jnp.take(p["w"], FAR, axis=0, mode="fill", fill_value=5.0),
               {"w": None}),
    "clamped slice": (
        W, lambda p: X[..., :4] @ jax.lax.dynamic_slice(p["w"], (-2 * D - 2, 1), (4, 5)),
        {"w": None},
    ),
    "named": (W, lambda p: X @ checkpoint_name(p["w"], "kernel"), {"w": None}),
    "precision of each": (
        W, lambda p: jax.lax.dot_general(p["w"], X, (((0,), (2,)), ((), ())),
                                         ("highest", "default")), {"w": None},
    ),
    "custom_jvp": (W, lambda p: _dense(X, p["w"]), {"w": None}),
    "bfloat16 compute": (
        W,
        lambda p: (X.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32),
        {"w": None},
    ),
    "linen attention": (*_linen(Attention()), {
        **{f"MultiHeadDotProductAttention_0/{name}/kernel": WeightDimensionNumbers(0, (1, 2))
           for name in ("query", "key", "value")},
        "MultiHeadDotProductAttention_0/out/kernel": WeightDimensionNumbers((0, 1), 2),
        "Dense_0/kernel": None, "Dense_1/kernel": None,
    }),
    "linen scan": (*_linen(Stacked()), {"layers/Dense_0/kernel": STACK}),
    "nnx scan": (*_nnx(), {"blocks/linear/kernel": STACK,
                           "out/kernel": WeightDimensionNumbers(0, (1, 2))}),
}  # fmt: skip
# These need the weight itself.
FORMED = {
    "custom_vjp": (W, lambda p: _reversed(X, p["w"]), {"w": None}),
    "square": (W, lambda p: jnp.sum(X @ p["w"]) + jnp.sum(p["w"] ** 2), {"w": None}),
    "norm": (W, lambda p: jnp.mean(X @ p["w"]) * jnp.linalg.norm(p["w"]), {"w": None}),
    "weight normalization": (
        W, lambda p: X @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)), {"w": None}
    ),
    "gram": (W, lambda p: p["w"].T @ p["w"], {"w": None}),
    "quantized": (W, lambda p: X @ p["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32),
                  {"w": None}),
    "platform": (
        W, lambda p: jax.lax.platform_dependent(p["w"], cpu=lambda w: X @ w, default=lambda w: X),
        {"w": None},
    ),
    "rows": (W, lambda p: jax.lax.scan(lambda c, w: (c + w.sum(), w), 0.0, p["w"])[0], {"w": None}),
    "concatenate": (
        WS, lambda p: X @ jnp.concatenate([p["w"][0], p["w"][1]], axis=1), {"w": STACK}
    ),
}  # fmt: skip


def _setup(case, keep_factored, dtype=jnp.float32, proj_type="std"):
    params, function, numbers = case
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    leaves = leaves_by_path(params)
    views = {path: matrix_view(leaves[path].shape, n, proj_type) for path, n in numbers.items()}
    projectors, moves = {}, {}
    for seed, (path, view) in enumerate(views.items()):
        projectors[path] = _normal(10 + seed, *view.batch, view.compressed_size, RANK)
        moves[path] = 0.3 * _normal(20 + seed, *view.batch, RANK, view.free)

    def loss(params):
        return jnp.mean(jnp.sin(function(params).astype(jnp.float32)))

    subspaces = Subspaces(views, projectors)
    return landscape(loss, params, subspaces, keep_factored=keep_factored), moves, subspaces


def _numbers(near, moves):
    """The value at a move, its gradient there and at none, and slopes of several at none."""

    def at(low, vanishes=False):
        return near.at(Displacement(low, {}), vanishes=vanishes)

    zero = jax.tree.map(jnp.zeros_like, moves)
    value, gradient = jax.jit(jax.value_and_grad(at))(moves)
    still = jax.jit(jax.grad(lambda low: at(low, vanishes=True)))(zero)

    def slope(factor):
        move = jax.tree.map(lambda m: factor * m, moves)
        return jax.jvp(lambda low: at(low, vanishes=True), (zero,), (move,))[1]

    slopes = None
    if near.seen.get("w") != "custom_vjp_call":  # it has no forward mode
        slopes = jax.jit(jax.vmap(slope))(jnp.array([1.0, -2.0]))
    return value, gradient, still, slopes


@pytest.mark.parametrize("name", [*CASES, *FORMED])
def test_numbers_are_those_of_plain_evaluation(name):
    case = {**CASES, **FORMED}[name]
    near, moves, _ = _setup(case, keep_factored=True)
    tolerance = 2e-2 if "bfloat16" in name else 2e-5
    ours = _numbers(near, moves)
    near_plain, _, _ = _setup(case, keep_factored=False)
    near_plain.seen.update(near.seen)
    theirs = _numbers(near_plain, moves)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = float(jnp.max(jnp.abs(b))) + 1e-6
        np.testing.assert_allclose(a, b, atol=tolerance * scale)
    assert bool(near.seen) == (name in FORMED), near.seen


COMMON = ("scan and remat", "loop and cond", "merged", "tied embedding", "scaled", "square")


@pytest.mark.parametrize(
    "name", [*COMMON, *map(problems.slow, sorted({*CASES, *FORMED} - {*COMMON}))]
)
def test_rows_that_are_not_multiplied_out_are_what_they_stand_for(name):
    """Values, slopes of several and gradients by what is added to them, from either side."""
    for proj_type in ("left", "right"):
        near, moves, subspaces = _setup({**CASES, **FORMED}[name], True, proj_type=proj_type)
        rows = {
            path: Rows(_normal(30, *move.shape[:-1]).astype(jnp.float32), move.astype(jnp.bfloat16))
            for path, move in moves.items()
        }
        arrays = {path: multiplied(low) for path, low in rows.items()}

        def numbers(low, near=near, subspaces=subspaces):
            move = Displacement(low, {})

            def slope(factor):
                along = lambda step: near.at(move.scaled(factor * step), vanishes=True)  # noqa: E731
                return jax.jvp(along, (jnp.zeros(()),), (jnp.ones(()),))[1]

            slopes = None
            if name != "custom_vjp":  # it has no forward mode
                slopes = jax.vmap(slope)(jnp.array([1.0, -2.0]))
            return slopes, low_rank_gradient(near, subspaces, move, AscentConfig())

        tolerance = 2e-2 if "bfloat16" in name else 2e-5
        theirs = jax.jit(numbers)(arrays)
        for a, b in zip(
            jax.tree.leaves(jax.jit(numbers)(rows)), jax.tree.leaves(theirs), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=tolerance * (float(jnp.max(jnp.abs(b))) + 1e-6))


def test_rows_are_multiplied_layer_by_layer():
    """In a scan over layers no array of all of them is made."""
    near, moves, _ = _setup(CASES["scan and remat"], True)
    shape = moves["w"].shape
    rows = {"w": Rows(jnp.ones(shape[:-1]), moves["w"].astype(jnp.float32))}

    def made(low_of):
        program = jax.make_jaxpr(lambda rows: near.at(Displacement(low_of(rows), {})))(rows)
        return {e.primitive.name for e in program.eqns if e.outvars[0].aval.shape == shape}

    assert "mul" in made(lambda rows: {"w": multiplied(rows["w"])})
    assert "mul" not in made(lambda rows: rows)


def _products(jaxpr):
    """The sizes of all products in a program, those in its control flow included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.size
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("name", [*CASES, "concatenate"])
def test_no_product_has_the_size_of_a_weight(name):
    """Neither L R nor a full gradient: but in the case that is known to form the sum."""
    near, moves, _ = _setup({**CASES, **FORMED}[name], keep_factored=True)
    sizes = {near.leaves[path].size for path in moves}
    sizes |= {near.leaves[path].size // LAYERS for path, move in moves.items() if move.ndim == 3}
    gradient = jax.make_jaxpr(jax.grad(lambda low: near.at(Displacement(low, {}))))(moves)
    assert bool(sizes.intersection(_products(gradient.jaxpr))) == (name in FORMED)


def test_bfloat16_weights_keep_their_dtype_and_their_displacement():
    """A scan's carry keeps its dtype, and ε is not rounded away."""
    near, moves, _ = _setup(CASES["scan and remat"], keep_factored=True, dtype=jnp.bfloat16)
    assert near.leaves["w"].dtype == jnp.bfloat16
    exact, _, _ = _setup(CASES["scan and remat"], keep_factored=False)
    for size in (1.0, 1e-3):
        small = Displacement(jax.tree.map(lambda m, size=size: size * m, moves), {})
        none = Displacement({}, {})
        ours = near.at(small) - near.at(none)
        theirs = exact.at(small) - exact.at(none)
        if size == 1.0:
            np.testing.assert_allclose(ours, theirs, rtol=0.1, atol=5e-3)
    # What needs the sum itself, rows of it, and what is returned, are evaluated in float32.
    returned = (W, lambda p: p["w"], {"w": None})
    for case in (FORMED["square"], FORMED["gram"], CASES["tied embedding"], returned):
        near, moves, _ = _setup(case, keep_factored=True, dtype=jnp.bfloat16)
        assert near.leaves["w"].dtype == jnp.float32


def test_a_while_loop_has_no_backward_pass_but_values():
    near, moves, _ = _setup((W, _while, {"w": None}), keep_factored=True)
    plain, _, _ = _setup((W, _while, {"w": None}), keep_factored=False)
    move = Displacement(moves, {})
    np.testing.assert_allclose(near.at(move), plain.at(move), rtol=1e-4)
    assert not near.seen


def test_a_leaf_that_cannot_stay_factored_is_named_once():
    near, moves, _ = _setup(FORMED["custom_vjp"], keep_factored=True)
    near.at(Displacement(moves, {}))
    with pytest.warns(UserWarning, match=r"'w' \(custom_vjp_call\)") as caught:
        near.warn()
    assert len(caught) == 1


def test_auxiliary_output_may_hold_anything():
    params = {"w": _normal(0, D, D)}
    view = matrix_view((D, D))
    near = landscape(
        lambda p: (jnp.sum(X @ p["w"]), {"name": "aux", "w": p["w"], "n": 3}),
        params,
        Subspaces({"w": view}, {"w": _normal(1, D, RANK)}),
        has_aux=True,
    )
    value, aux = near.at(Displacement({"w": _normal(2, RANK, D)}, {}))
    np.testing.assert_allclose(jnp.sum(X @ aux["w"]), value, rtol=1e-5)
    assert aux["name"] == "aux"
    assert type(aux["n"]) is int


@pytest.mark.parametrize("estimator", ["jvp", "central"])
def test_one_probe_asks_for_no_batching(estimator):
    """Losses may have parts that cannot be vmapped, and branches of which one is meant to run."""
    params, calls = {"w": _normal(0, D, D)}, []

    def loss(params):
        y = X[0] @ params["w"]
        groups = jax.lax.ragged_dot(y, params["w"][None], jnp.array([7]))
        on = lambda: (jax.debug.callback(lambda: calls.append(1)), y)[1]  # noqa: E731
        return jnp.mean(jax.lax.cond(jnp.sum(y) ** 2 >= 0, on, lambda: 0 * y) * groups)

    tx = lorenza_optax.lorenza(1e-2, rank=RANK, estimator=estimator)
    update = jax.jit(lambda state: tx.update(None, state, params, value_fn=loss)[1])
    state = update(tx.init(params))
    jax.effects_barrier()
    calls.clear()
    state = update(state)
    jax.effects_barrier()
    assert bool(state[0].ascent.perturbed)
    assert len(calls) == (2 if estimator == "jvp" else 3)


def test_products_in_eight_bits_lose_no_perturbation():
    """Activations and weights are quantized; L and R are not, which would overflow."""
    params = {"w": _normal(0, D, D), "v": _normal(1, D, D)}
    eight = jnp.float8_e4m3fn

    def loss(params):
        x = (X * (448 / jnp.max(jnp.abs(X)))).astype(eight)
        y = jax.lax.dot(x[0], params["w"].astype(eight), preferred_element_type=jnp.float32)
        return jnp.mean(jnp.tanh(y / 448) @ params["v"])

    norms = []
    for factored in (True, False):
        tx = lorenza_optax.lorenza(1e-2, rank=RANK, factored=factored)
        update = jax.jit(lambda state, tx=tx: tx.update(None, state, params, value_fn=loss)[1])
        state = tx.init(params)
        for _ in range(2):
            state = update(state)
        norms.append(state[0].ascent.ascent_norm)
    assert norms[0] > 0
    np.testing.assert_allclose(*norms, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*perturbed weight itself")
def test_an_explicit_mesh_whose_axes_are_made_auto_inside_the_loss():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(_normal(0, D, D), jax.NamedSharding(mesh, jax.P("x")))}

        def loss(params):
            inside = jax.sharding.auto_axes(lambda w: X[0] @ w, out_sharding=jax.P())
            return jnp.mean(jnp.sin(inside(params["w"])))

        values = []
        for factored in (True, False):
            tx = lorenza_optax.lorenza(1e-2, rank=RANK, factored=factored, ascent="subspace")
            step = jax.jit(lambda s, tx=tx: tx.update(None, s, params, value_fn=loss)[1])
            state = step(step(tx.init(params)))
            values.append(state[0].ascent.value)
        np.testing.assert_allclose(*values, rtol=1e-5)
