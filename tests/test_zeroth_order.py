"""The zeroth-order methods against their references, and what they promise of memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorenza_optax
from lorenza_optax import methods
from lorenza_optax._ascent.gradient import PROBE, step_key
from lorenza_optax._base import noise
from lorenza_optax._base.noise import Noise, plus_noise
from lorenza_optax._low_rank.random_subspace import opened
from lorenza_optax._low_rank.zeroth_order import _direction, _partners
from tests import problems
from tests.problems import slow
from tests.reference import lozo as reference_lozo
from tests.reference import mezo as reference_mezo
from tests.reference import subzero as reference_subzero
from tests.reference import zo_muon as reference_zo_muon

STEPS, RANK, GAP, RATE, MU = 5, 2, 2, 1e-2, 1e-3  # refreshes at 0, 2 and 4
PROJECTED = {"wide", "tall", "square", "attention", "stacked/0", "stacked/1", "stacked/2"}
NUMBERS = {"weight_dimension_numbers": problems.DIMENSION_NUMBERS}
value = jax.jit(problems.loss)
gradient = jax.jit(jax.grad(problems.loss))


def stepper(tx, apply_updates=optax.apply_updates):
    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(None, state, params, value_fn=problems.loss, batch=batch)
        return apply_updates(params, updates), state

    return step


def run(tx, steps=STEPS, dtype=np.float64, apply_updates=optax.apply_updates):
    """[(params, state) after each update]."""
    params, step = problems.params(dtype=dtype), stepper(tx, apply_updates)
    state, history = tx.init(params), []
    for t in range(steps):
        params, state = step(params, state, problems.batch(t, dtype))
        history.append((params, state))
    return history


def drawn(scale_by):
    """What a transformation draws, as the references want it: (factors, coordinates).

    factors(name, t) -> (P, K or None), oriented; coordinates(t) -> q dicts of N_j and z_j.
    """
    config = scale_by.update.config
    params = problems.params(dtype=np.float64)
    plan, initial = config.plan(params), scale_by.init(params)
    seed = initial.ascent.seed

    def direction(key, partners):
        low, full = _direction(config, plan, partners, key)
        full = {
            path: plus_noise(jnp.zeros(problems.SHAPES[path]), z) if isinstance(z, Noise) else z
            for path, z in full.items()
        }
        return low | full

    @jax.jit
    def at(t):
        # As at the refresh that was made last.
        count = t // config.update_proj_gap * config.update_proj_gap
        state = opened(config, plan, initial._replace(count=count))
        keys = jax.random.split(step_key(seed, t, PROBE), config.ascent.num_probes)
        partners = _partners(plan, state)
        projectors = {
            path: leaf.matrix.projector(state.q.get(path), state.r.get(path))
            for path, leaf in plan.projected.items()
        }
        return projectors, partners, jax.lax.map(lambda key: direction(key, partners), keys)

    at = functools.cache(lambda t, at=at: jax.device_get(at(jnp.asarray(t, jnp.int32))))

    def named(tree):
        """Stacks apart, other leaves as matrices where they are no coordinates."""
        apart = {f"stacked/{i}": x for i, x in enumerate(tree.get("stacked", ()))}
        rest = {k: v for k, v in tree.items() if k != "stacked"}
        if not plan.projected:
            return problems.matrices(tree)
        return rest | apart

    def factors(name, t):
        projectors, partners, _ = at(t)
        return named(projectors)[name], named(partners).get(name)

    def coordinates(t):
        moves = at(t)[2]
        return [named({k: x[j] for k, x in moves.items()}) for j in range(len(moves["bias"]))]

    return factors, coordinates


def reference_problem():
    def loss(params, t):
        return float(value(problems.leaves(params), problems.batch(t, np.float64)))

    def grad(params, t):
        leaves = problems.leaves(params)
        return problems.matrices(gradient(leaves, problems.batch(t, np.float64)))

    return problems.matrices(problems.params(dtype=np.float64)), loss, grad


def assert_close(history, records):
    for (params, _), record in zip(history, records, strict=True):
        found = problems.matrices(params)
        for name, expected in record["params"].items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-8, atol=1e-9, err_msg=name)


SETTINGS = {"steps": STEPS, "learning_rate": RATE, "mu": MU}


@pytest.mark.parametrize(
    ("variant", "q", "estimator"),
    [
        slow("sgd", 3, "central"),
        ("sign", 1, "forward"),
        slow("momentum", 3, "jvp"),
        slow("adam", 1, "central"),
        ("conservative", 1, "central"),
        slow("conservative", 3, "jvp"),
        slow("adam", 3, "jvp"),
    ],
)
def test_mezo(variant, q, estimator):
    check_mezo(variant, q, estimator)


@pytest.mark.slow
@pytest.mark.parametrize(("q", "estimator"), [(3, "central"), slow(1, "jvp")])
def test_mezo_with_all_leaves_drawn_part_by_part(q, estimator, monkeypatch):
    monkeypatch.setattr(noise, "SMALL", 10)
    check_mezo("sgd", q, estimator, lorenza_optax.apply_updates, factored_updates=True)


def check_mezo(variant, q, estimator, apply_updates=optax.apply_updates, **more):
    with jax.enable_x64(True):
        arguments = {"num_probes": q, "estimator": estimator, "mu": MU}
        tx = methods.mezo(RATE, variant=variant, **arguments, **more)
        _, coordinates = drawn(methods.scale_by_mezo(**arguments))
        params, loss, grad = reference_problem()
        records = reference_mezo.run(
            params, loss, grad=grad, direction=coordinates, variant=variant,
            num_probes=q, estimator=estimator, **SETTINGS,
        )  # fmt: skip
        assert_close(run(tx, apply_updates=apply_updates), records)


@pytest.mark.parametrize(
    ("momentum", "q", "proj_type", "divided"),
    [slow(None, 1, "std", True), (0.8, 3, "std", False), slow(0.8, 1, "reverse_std", True)],
)
def test_lozo(momentum, q, proj_type, divided):
    with jax.enable_x64(True):
        arguments = {
            "num_probes": q, "mu": MU, "proj_type": proj_type, "divide_by_rank": divided, **NUMBERS
        }  # fmt: skip
        if momentum is None:
            tx = methods.lozo(RATE, RANK, GAP, **arguments)
        else:
            tx = methods.lozo_m(RATE, RANK, GAP, momentum=momentum, **arguments)
        factors, coordinates = drawn(methods.scale_by_lozo(RANK, GAP, **arguments))
        params, loss, _ = reference_problem()
        records = reference_lozo.run(
            params, loss, projector=lambda name, t: factors(name, t)[0], coordinates=coordinates,
            gap=GAP, projected=PROJECTED, num_probes=q, proj_type=proj_type,
            divide_by_rank=divided, momentum=momentum, **SETTINGS,
        )  # fmt: skip
        assert_close(run(tx), records)


@pytest.mark.parametrize(
    ("q", "estimator", "normalize"),
    [(3, "central", True), slow(1, "jvp", False)],
)
def test_subzero(q, estimator, normalize):
    with jax.enable_x64(True):
        arguments = {"num_probes": q, "estimator": estimator, "normalize": normalize, "mu": MU}
        tx = methods.subzero(RATE, RANK, GAP, **arguments, **NUMBERS)
        factors, coordinates = drawn(methods.scale_by_subzero(RANK, GAP, **arguments, **NUMBERS))
        params, loss, grad = reference_problem()
        compressed_right = {k for k in PROJECTED if params[k].shape[0] > params[k].shape[1]}

        def u_and_v(name, t):
            p, k = factors(name, t)
            return (k.T, p) if name in compressed_right else (p, k.T)

        def inner(t):
            """Z_j from s Z_j K: K has orthonormal rows."""
            out = []
            for n in coordinates(t):
                z = dict(n)
                for name in PROJECTED:
                    s = np.sqrt(params[name].size) / RANK if normalize else 1.0
                    z[name] = n[name] @ factors(name, t)[1].T / s
                    z[name] = z[name].T if name in compressed_right else z[name]
                out.append(z)
            return out

        records = reference_subzero.run(
            params, loss, grad=grad, factors=u_and_v, coordinates=inner, gap=GAP,
            projected=PROJECTED, num_probes=q, estimator=estimator, normalize=normalize, **SETTINGS,
        )  # fmt: skip
        for name in PROJECTED:
            for basis in u_and_v(name, 0):
                np.testing.assert_allclose(basis.T @ basis, np.eye(RANK), atol=1e-12)
        assert_close(run(tx), records)


@pytest.mark.parametrize("q", [3, slow(1)])
def test_zo_muon(q):
    with jax.enable_x64(True):
        arguments = {"num_probes": q, "mu": MU, "others_scale": 1e-2, **NUMBERS}
        tx = methods.zo_muon(RATE, RANK, GAP, **arguments)
        factors, coordinates = drawn(methods.scale_by_zo_muon(RANK, GAP, **arguments))
        params, loss, _ = reference_problem()
        records = reference_zo_muon.run(
            params, loss, projector=lambda name, t: factors(name, t)[0], coordinates=coordinates,
            gap=GAP, projected=PROJECTED, num_probes=q, other_learning_rate=1e-2 * RATE, **SETTINGS,
        )  # fmt: skip
        assert_close(run(tx), records)


LAYERS, WIDTH = 6, 256


def layered(scanned):
    """A loss whose weights are large enough to be drawn part by part, its weights and a batch."""
    params = {
        "layers": [
            0.1 * jax.random.normal(jax.random.key(i), (WIDTH, WIDTH)) for i in range(LAYERS)
        ]
    }
    if scanned:
        params["layers"] = jnp.stack(params["layers"])

    def loss(params, batch):
        one = lambda x, w: (x + jnp.tanh(x @ w), None)  # noqa: E731
        if scanned:
            x, _ = jax.lax.scan(one, batch, params["layers"])
        else:
            x = functools.reduce(lambda x, w: one(x, w)[0], params["layers"], batch)
        return jnp.mean(x**2)

    return loss, params, jnp.ones((4, WIDTH))


IN_PLACE = {
    "mezo": functools.partial(methods.mezo, 1e-3),
    "mezo, forward gradient": functools.partial(methods.mezo, 1e-3, estimator="jvp"),
    "lozo": functools.partial(methods.lozo, 1e-3, 2),
    "lozo_m": functools.partial(methods.lozo_m, 1e-3, 2),
    "subzero": functools.partial(methods.subzero, 1e-3, 8),
    "zo_muon": functools.partial(methods.zo_muon, 1e-3, 8),
}


@pytest.mark.parametrize(
    ("name", "scanned"),
    [
        ("mezo", False),
        ("mezo", True),
        ("lozo", False),
        ("subzero", False),
        *(slow(name, True) for name in ("lozo", "subzero", "lozo_m", "zo_muon")),
        *(slow(name, False) for name in ("lozo_m", "zo_muon")),
    ],
)
def test_a_step_needs_little_more_memory_than_the_loss(name, scanned, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # where stacks are taken layer by layer
    loss, params, batch = layered(scanned)
    numbers = {"layers": lorenza_optax.WeightDimensionNumbers(1, 2)} if scanned else None
    more = {} if name == "mezo" else {"weight_dimension_numbers": numbers}
    tx = IN_PLACE[name](factored_updates=True, **more)

    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, batch))
        return lorenza_optax.apply_updates(params, updates), state

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params)).compile()
    forward = jax.jit(loss).lower(params, batch).compile()
    extra = program.memory_analysis().temp_size_in_bytes
    extra -= forward.memory_analysis().temp_size_in_bytes
    # MeZO has one weight at a time, of which there are six, and what it draws for it.
    assert extra / (LAYERS * WIDTH**2 * 4) <= (0.4 if name == "mezo" else 0.3)


@pytest.mark.parametrize("name", ["mezo", slow("mezo, forward gradient")])
def test_noise_is_the_same_in_a_scan_and_out_of_it(name):
    """Scanned layers draw their own parts of what the update draws as a whole."""
    loss, params, batch = layered(scanned=True)
    tx = IN_PLACE[name](mu=1e-3)
    config, state = methods.scale_by_mezo(mu=1e-3).update.config, tx.init(params)
    updates, new = tx.update(None, state, params, value_fn=lambda p: loss(p, batch))
    key = jax.random.split(step_key(state[0].ascent.seed, 0, PROBE), 1)[0]
    plan = config.plan(params)
    z = plus_noise(
        jnp.zeros(params["layers"].shape), _direction(config, plan, {}, key).full["layers"]
    )
    value = lambda s: loss({"layers": params["layers"] + s * z}, batch)  # noqa: E731
    slope = jax.jvp(value, (0.0,), (1.0,))[1]
    np.testing.assert_allclose(new[0].ascent.ascent_norm, abs(slope), rtol=1e-2)
    np.testing.assert_allclose(updates["layers"], -1e-3 * slope * z, rtol=1e-2)
    np.testing.assert_allclose([np.mean(z), np.std(z)], [0, 1], atol=0.01)
    assert len(np.unique(z)) > 0.9 * z.size  # no part is drawn twice


@pytest.mark.parametrize("name", ["mezo", "subzero", *map(slow, ("lozo", "lozo_m", "zo_muon"))])
def test_updates_in_place_are_those_that_are_formed_and_a_seed_gives_the_same_bits(name):
    loss, params, batch = layered(scanned=True)
    applied, numbers = {}, {"layers": lorenza_optax.WeightDimensionNumbers(1, 2)}
    more = {} if name == "mezo" else {"weight_dimension_numbers": numbers}
    for in_place in (False, True, True):
        tx = IN_PLACE[name](factored_updates=in_place, weight_decay=0.1, **more)

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, batch))
            return lorenza_optax.apply_updates(params, updates), state

        found = step(params, tx.init(params))
        if in_place in applied:
            jax.tree.map(np.testing.assert_array_equal, applied[True], found)
        applied[in_place] = found
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        applied[False][0], applied[True][0],
    )  # fmt: skip


METHODS = {
    "mezo": functools.partial(methods.mezo, 1e-2),
    "mezo-adam": functools.partial(methods.mezo, 1e-2, variant="adam", num_probes=2),
    "lozo": functools.partial(methods.lozo, 1e-2, RANK, GAP, **NUMBERS),
    "lozo_m": functools.partial(methods.lozo_m, 1e-2, RANK, GAP, **NUMBERS),
    "subzero": functools.partial(methods.subzero, 1e-2, RANK, GAP, **NUMBERS),
    "zo_muon": functools.partial(methods.zo_muon, 1e-2, RANK, GAP, others_scale=0.1, **NUMBERS),
}


def each_method(*fast):
    names = [name if name in fast else slow(name) for name in METHODS]
    return pytest.mark.parametrize("name", names)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_needed(name):
    tx, params = METHODS[name](), problems.params()
    with pytest.raises(ValueError, match="value_fn=loss"):
        tx.update(params, tx.init(params), params)


def test_wrong_choices_are_refused():
    params = {"w": jnp.ones((16, 8)), "b": jnp.ones(8)}
    masked = optax.masked(methods.mezo(1e-2), {"w": True, "b": False})
    with pytest.raises(ValueError, match="Instead, use the method by itself, close value_fn over"):
        masked.update(params, masked.init(params), params, value_fn=lambda p: 0.0)
    with pytest.raises(ValueError, match=r"use mezo\(learning_rate"):
        methods.scale_by_mezo(variant="conservative")
    with pytest.raises(ValueError, match="variant must be one of"):
        methods.mezo(1e-3, variant="momentun")
    with pytest.raises(ValueError, match="'sgd' only"):
        methods.mezo(1e-3, variant="adam", factored_updates=True)


def test_conservative_steps_never_raise_the_loss_of_their_batch():
    before, kept = problems.params(), 0
    growing = lambda count: 0.03 * 3.0**count  # noqa: E731
    for t, (after, _) in enumerate(
        run(methods.mezo(growing, variant="conservative"), 8, np.float32)
    ):
        batch = problems.batch(t)
        assert value(after, batch) <= value(before, batch)
        kept += all(jax.tree.leaves(jax.tree.map(np.array_equal, after, before)))
        before = after
    assert 0 < kept < 8


@each_method("mezo")
def test_central_differences_come_to_the_derivative(name):
    with jax.enable_x64(True):
        ways = ({"estimator": "jvp"}, {"estimator": "central", "mu": 1e-4})
        central, exact = (run(METHODS[name](**way), 1)[0][0] for way in ways)
        moved = jax.tree.map(lambda x, p: x - p, exact, problems.params(dtype=np.float64))
        assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(moved))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                     central, exact)  # fmt: skip


@each_method("lozo_m", "mezo-adam")
def test_a_restored_state_goes_on_with_the_same_bits(name):
    tx = METHODS[name]()
    step, params = stepper(tx), problems.params()
    state = tx.init(params)
    for t in range(4):
        if t == 3:
            stored = serialization.to_bytes((params, state))
        params, state = step(params, state, problems.batch(t))
    restored = serialization.from_bytes((params, state), stored)
    again = step(*restored, problems.batch(3))
    jax.tree.map(np.testing.assert_array_equal, again, (params, state))


@each_method("subzero")
def test_losses_that_are_not_finite_leave_all_as_it_is(name):
    tx, params = METHODS[name](), problems.params()
    step, state = stepper(tx), tx.init(params)
    params, state = step(params, state, problems.batch(0))
    wrong = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), problems.batch(1))
    after, skipped = step(params, state, wrong)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert skipped[0].skipped == 1
    for field in ("q", "r", "projected", "others"):
        same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
        same(getattr(skipped[0], field), getattr(state[0], field))


def test_bfloat16_weights_are_moved_by_less_than_their_rounding():
    """Formed in float32 where they are used: a move of 1e-3 is not lost."""
    loss, params, batch = layered(scanned=True)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    cast = lambda p: loss(jax.tree.map(lambda w: w.astype(jnp.float32), p), batch)  # noqa: E731
    slopes = []
    for at in (narrow, jax.tree.map(lambda w: w.astype(jnp.float32), narrow)):
        tx = methods.mezo(1e-3, mu=1e-4)
        updates, state = tx.update(None, tx.init(at), at, value_fn=cast)
        assert updates["layers"].dtype == at["layers"].dtype
        slopes.append(float(state[0].ascent.ascent_norm))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)


@pytest.mark.parametrize("axis_type", [slow(AxisType.Auto), AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["mezo", slow("lozo"), slow("subzero")])
def test_sharded_weights_give_the_numbers_of_one_device(name, axis_type):
    loss, params, batch = layered(scanned=True)
    numbers = {"layers": lorenza_optax.WeightDimensionNumbers(1, 2)}
    more = {} if name == "mezo" else {"weight_dimension_numbers": numbers}
    tx = IN_PLACE[name](factored_updates=True, mu=1e-2, **more)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, batch))
        return lorenza_optax.apply_updates(params, updates), state

    alone, _ = step(params, tx.init(params))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, NamedSharding(mesh, P(None, "x", None)))
        found, _ = step(sharded, tx.init(sharded))
    assert found["layers"].sharding.spec == P(None, "x", None)
    np.testing.assert_allclose(found["layers"], alone["layers"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["sgd", slow("conservative")])
def test_slopes_are_averaged_over_devices(variant):
    params = problems.params()
    tx = methods.mezo(1e-2, variant=variant, axis_name="x")
    whole = methods.mezo(1e-2, variant=variant)
    batches = jax.tree.map(lambda *x: jnp.concatenate(x), *map(problems.batch, range(4)))

    def step(params, state, batch):
        updates, state = tx.update(None, state, params, value_fn=squares, batch=batch)
        return optax.apply_updates(params, updates), state

    def squares(params, batch):  # a mean over the batch: so is the mean over devices
        outputs = {
            k: jnp.tanh(x @ params[k]) - y for k, (x, y) in batch.items() if k in ("wide", "tall")
        }
        return sum(jnp.mean(x**2) for x in outputs.values())

    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    each = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=P())
    found, _ = jax.jit(each)(params, tx.init(params), batches)
    updates, _ = whole.update(None, whole.init(params), params, value_fn=squares, batch=batches)
    expected = optax.apply_updates(params, updates)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected
    )
