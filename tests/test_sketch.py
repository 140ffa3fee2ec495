"""Refreshes from sketches, gradients in the subspaces, and ascents beside the published one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorenza_optax
from lorenza_optax._ascent.gradient import SKETCH, step_key
from lorenza_optax._plan.matrix_view import matrix_view
from lorenza_optax._subspace.sketch import OVERSAMPLING
from tests import problems
from tests.reference import sketched

RANK, GAP, STEPS = 3, 4, 10
NUMBERS = problems.DIMENSION_NUMBERS
VIEWS = {k: matrix_view(problems.SHAPES[k], d) for k, d in NUMBERS.items() if d}


def _by_matrix(tree):
    """The arrays of a state by the names that references use."""
    flat = {k: np.asarray(x) for k, x in tree.items() if k != "stacked"}
    return flat | {f"stacked/{i}": np.asarray(x) for i, x in enumerate(tree["stacked"])}


def _projectors(state):
    return _by_matrix({k: v.projector(state.q.get(k), state.r.get(k)) for k, v in VIEWS.items()})


@pytest.mark.parametrize(
    ("ascent", "transport", "base"),
    [
        ("none", "keep", None),
        problems.slow("none", "rotate", None),
        problems.slow("none", "reset", None),
        ("subspace", "keep", None),
        problems.slow("momentum", "keep", None),
    ],
)
def test_agrees_with_the_reference(ascent, transport, base):
    with jax.enable_x64(True):
        tx = lorenza_optax.lorenza(
            1e-2, RANK, GAP, rho=0.1, ascent=ascent, moment_transport=transport, seed=4,
            base_optimizer=base, refresh="sketch", weight_dimension_numbers=NUMBERS,
        )  # fmt: skip
        params = problems.params(dtype=np.float64)
        state = tx.init(params)
        longest = max(view.free for view in VIEWS.values())

        def noise(t):
            key = step_key(state[0].ascent.seed, jnp.asarray(t), SKETCH)
            return np.asarray(jax.random.normal(key, (RANK + OVERSAMPLING, longest)))

        gradient = jax.jit(jax.grad(problems.loss))

        def grad(point, t):
            batch = problems.batch(t, np.float64)
            return problems.matrices(gradient(problems.leaves(point), batch))

        expected = sketched.run(
            problems.matrices(params), grad, projectors=_projectors(state[0]), noise=noise,
            steps=STEPS, gap=GAP, rho=0.1, ascent=ascent, learning_rate=1e-2, stores_rows=False,
            transport=transport,
        )  # fmt: skip

        @jax.jit
        def step(params, state, batch):
            updates, state = tx.update(None, state, params, value_fn=problems.loss, batch=batch)
            return optax.apply_updates(params, updates), state

        for t, record in enumerate(expected):
            params, state = step(params, state, problems.batch(t, np.float64))
            chex.assert_trees_all_close(
                problems.matrices(params), record["params"], rtol=1e-7, atol=1e-7
            )
            for name, p in _projectors(state[0]).items():
                theirs = record["p"][name]
                np.testing.assert_allclose(p @ p.T, theirs @ theirs.T, atol=1e-6)
            if record["captured_energy"] is not None:
                np.testing.assert_allclose(
                    state[0].captured_energy, record["captured_energy"], rtol=1e-5
                )
        assert int(state[0].last_refresh) == 8


def test_subspaces_come_close_to_the_best_ones():
    """From sketches through the old factors, on gradients whose subspace stays."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 40)))[0] for n in (40, 120))
    target = (u * np.arange(1, 41.0) ** -0.5) @ v.T
    params = {"kernel": jnp.zeros((40, 120))}

    def loss(params):
        return -jnp.sum(params["kernel"] * target)

    for kwargs in ({"rho": 0.0}, {"rho": 1e-3}, {"rho": 1e-3, "probe_rank": 2}):
        tx = lorenza_optax.scale_by_lorenza(rank=8, update_proj_gap=1, refresh="sketch", **kwargs)
        state = tx.init(params)
        step = jax.jit(lambda s, tx=tx: tx.update(None, s, params, value_fn=loss)[1])
        for _ in range(8):
            state = step(state)
        q = np.asarray(state.q["kernel"])
        best = np.sum(np.linalg.svd(target)[1][:8] ** 2)
        assert np.sum((q.T @ target) ** 2) > 0.97 * best
        np.testing.assert_allclose(q.T @ q, np.eye(8), atol=1e-5)


def test_nothing_as_large_as_a_projected_leaf_is_computed_between_refreshes():
    """No value of the whole traced step has the shape of a gradient but the weights themselves."""
    params = {"a": jnp.ones((64, 96)), "b": jnp.ones((96, 64))}
    x = jnp.ones((8, 64))

    def loss(params):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)

    def large(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval for v in eqn.outvars if getattr(v.aval, "size", 0) >= 64 * 96)
            for value in eqn.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(inner, "eqns"):
                        yield from large(inner)
                    elif hasattr(inner, "jaxpr"):
                        yield from large(inner.jaxpr)

    for kwargs in ({}, {"ascent": "subspace"}, {"ascent": "momentum"}, {"rho": 0.0}):
        tx = lorenza_optax.scale_by_lorenza(
            rank=4, refresh="sketch", factored_updates=True, **kwargs
        )
        state = tx.init(params)

        def new_state(state, tx=tx):
            return tx.update(None, state, params, value_fn=loss)[1]

        assert not list(large(jax.make_jaxpr(new_state)(state).jaxpr)), kwargs
    tx = lorenza_optax.scale_by_lorenza(
        rank=4, refresh="sketch", factored=False
    )  # the test can fail
    state = tx.init(params)
    traced = jax.make_jaxpr(lambda s: tx.update(None, s, params, value_fn=loss)[1])(state)
    assert list(large(traced.jaxpr))


@pytest.mark.parametrize(
    "ascent", ["subspace", *map(problems.slow, ("zo", "momentum", "signed_momentum"))]
)
def test_factored_and_plain_evaluation_agree(ascent):
    """In float64, where round-off cannot grow in Adam's denominators."""
    results = []
    with jax.enable_x64(True):
        for factored in (True, False):
            tx = lorenza_optax.lorenza(
                1e-2, RANK, GAP, rho=0.1, ascent=ascent, factored=factored, num_probes=2,
                refresh="sketch", weight_dimension_numbers=NUMBERS,
            )  # fmt: skip
            params = problems.params(dtype=np.float64)
            state = tx.init(params)

            @jax.jit
            def step(params, state, batch, tx=tx):
                updates, state = tx.update(None, state, params, value_fn=problems.loss, batch=batch)
                return optax.apply_updates(params, updates), state

            for t in range(5):
                params, state = step(params, state, problems.batch(t, np.float64))
            results.append(params)
    chex.assert_trees_all_close(*results, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("refresh", ["sketch", problems.slow("gradient")])
def test_accumulated_gradients_are_those_of_update(refresh):
    shared = {"rank": RANK, "update_proj_gap": GAP, "rho": 0.0, "refresh": refresh,
              "weight_dimension_numbers": NUMBERS}  # fmt: skip
    tx = lorenza_optax.lorenza(1e-2, **shared)
    params = problems.params()
    first = second = tx.init(params)
    value_and_grad = jax.jit(
        lambda p, b, s: lorenza_optax.subspace_value_and_grad(problems.loss, **shared)(
            p, b, opt_state=s
        )
    )
    update = jax.jit(lambda gradients, state: tx.update(gradients, state, params))
    gradient = jax.jit(jax.grad(problems.loss))
    for t in range(2):  # settle, so that both are in the same subspace afterwards
        _, first = update(gradient(params, problems.batch(t)), first)
    first = second = (first[0]._replace(count=jnp.asarray(5)), *first[1:])
    batches = [problems.batch(t) for t in (5, 6)]
    total = None
    for batch in batches:
        _, grads, second = value_and_grad(params, batch, second)
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    if refresh == "sketch":  # count 5 is due in neither kind: last_refresh is 0 + gap 4 -> due
        assert int(second[0].last_refresh) == 5
    halves = jax.tree.map(lambda g: g / 2, total)
    updates, after = update(halves, second)

    def both(params):
        return sum(problems.loss(params, batch) for batch in batches) / 2

    # The same subspaces, and the full gradient projected by update itself.
    expected, _ = update(jax.jit(jax.grad(both))(params), second)
    chex.assert_trees_all_close(updates, expected, rtol=1e-3, atol=1e-6)
    assert int(after[0].count) == 6
    wrong = lorenza_optax.lorenza(1e-2, **{**shared, "rank": 2})
    wrong_state = wrong.init(params)
    with pytest.raises(ValueError, match="same rank"):
        wrong.update(halves, wrong_state, params)
    with pytest.raises(ValueError, match="exactly one state"):
        lorenza_optax.subspace_value_and_grad(problems.loss, **shared)(
            params, batches[0], opt_state=(second, second)
        )


@pytest.mark.slow
def test_subspace_ascent_finds_more_of_the_rise_than_probes():
    params, batch = problems.params(), problems.batch(3)
    tx = lorenza_optax.lorenza(
        1e-3, RANK, GAP, ascent="zo", scale_probes=True, weight_dimension_numbers=NUMBERS
    )
    state = tx.init(params)
    step = jax.jit(lambda s: tx.update(None, s, params, value_fn=problems.loss, batch=batch)[1])
    for _ in range(4):
        state = step(state)
    rises, loss = {}, jax.jit(problems.loss)
    for name, kwargs in {
        "zo": {},
        "scaled": {"scale_probes": True, "num_probes": 4},
        "momentum": {"ascent": "momentum"},
        "signed_momentum": {"ascent": "signed_momentum"},
        "subspace": {"ascent": "subspace"},
        "half": {"ascent": "subspace", "ascent_fn": lambda p, b: 2 * problems.loss(p, b)},
    }.items():
        function = lorenza_optax.perturbed_value_and_grad(
            lambda p, b: (problems.loss(p, b), p), rho=0.05, has_aux=True,
            weight_dimension_numbers=NUMBERS, **kwargs,
        )  # fmt: skip
        (value, at), _ = jax.jit(lambda s, f=function: f(params, batch, opt_state=s))(state)
        moved = optax.tree.norm(optax.tree.sub(at, params))
        np.testing.assert_allclose(moved, 0.05, rtol=1e-3)
        rises[name] = float(value - loss(params, batch))
    gradient = jax.jit(jax.grad(problems.loss))(params, batch)
    sam = jax.tree.map(lambda p, g: p + 0.05 * g / optax.tree.norm(gradient), params, gradient)
    best = float(loss(sam, batch) - loss(params, batch))
    assert rises["subspace"] > 0.8 * best
    np.testing.assert_allclose(rises["half"], rises["subspace"], rtol=1e-3)
    assert rises["zo"] < 0.5 * rises["subspace"]
    assert rises["momentum"] > 0.5 * rises["subspace"]  # the same batch all along
    np.testing.assert_allclose(rises["momentum"], rises["signed_momentum"], rtol=1e-2)


def test_stagger_refreshes_each_matrix_once_in_an_interval():
    params = problems.params()
    kwargs = {"rank": RANK, "rho": 0.0, "refresh": "gradient", "weight_dimension_numbers": NUMBERS}
    gap = 5
    tx = lorenza_optax.lorenza(1e-3, update_proj_gap=gap, stagger=True, **kwargs)
    state = tx.init(params)
    step = jax.jit(lambda s, b: tx.update(None, s, params, value_fn=problems.loss, batch=b)[1])
    before, changes = None, []
    for t in range(1 + 2 * gap):
        state = step(state, problems.batch(t))
        now = _projectors(state[0])
        if before is not None:
            changes.append({k for k in now if not np.array_equal(now[k], before[k])})
        before = now
    for start in (0, gap):
        turn = [name for names in changes[start : start + gap] for name in names]
        assert sorted(turn) == sorted(before), "each matrix has one turn"
    assert max(map(len, changes)) < len(before)
    # With an interval of 1 it is the usual refresh of all.
    all_at_once = [
        lorenza_optax.lorenza(1e-3, update_proj_gap=1, stagger=stagger, **kwargs)
        for stagger in (True, False)
    ]
    ends = []
    for tx in all_at_once:
        state = tx.init(params)
        update = jax.jit(tx.update)
        for t in range(3):
            gradient = jax.grad(problems.loss)(params, problems.batch(t))
            updates, state = update(gradient, state, params)
        ends.append(updates)
    chex.assert_trees_all_close(*ends, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_factored_updates_are_the_same_in_place_or_multiplied_out():
    params = problems.params()
    gradient = jax.grad(problems.loss)(params, problems.batch())
    mask = {name: name != "wide" for name in params}
    kwargs = {"weight_decay": 0.1, "mask": mask, "weight_dimension_numbers": NUMBERS}
    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    dense = lorenza_optax.lorenza(schedule, RANK, **kwargs)
    lazy = lorenza_optax.lorenza(schedule, RANK, factored_updates=True, **kwargs)
    expected, _ = dense.update(gradient, dense.init(params), params)
    expected = optax.apply_updates(params, expected)
    for apply in (lorenza_optax.apply_updates, optax.apply_updates):

        @jax.jit
        def step(params, apply=apply):
            updates, _ = lazy.update(gradient, lazy.init(params), params)
            assert isinstance(updates["wide"], lorenza_optax.LowRankUpdate)
            return apply(params, updates)

        chex.assert_trees_all_close(step(params), expected, rtol=1e-5, atol=1e-7)
    wide, nothing = lazy.update(gradient, lazy.init(params), params)[0]["wide"], jnp.zeros((8, 14))
    chex.assert_trees_all_close((wide / 2).added_to(nothing), wide.added_to(nothing) / 2)
    for behind in (  # they need the numbers
        optax.clip_by_global_norm(1.0), optax.clip(1.0), optax.scale_by_adam(), optax.trace(0.9),
        optax.zero_nans(), optax.scale_by_trust_ratio(), optax.add_decayed_weights(0.1),
    ):  # fmt: skip
        tx = optax.chain(lazy, behind)
        with pytest.raises(Exception, match="factored_updates=False"):
            jax.eval_shape(lambda tx=tx: tx.update(gradient, tx.init(params), params))
