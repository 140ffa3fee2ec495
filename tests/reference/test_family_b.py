"""The references of zeroth-order methods, SAM and GaLore against laws that they must obey."""

import json

import numpy as np
import pytest

from ..gold import make_galore
from . import adam, galore, lorenza, lozo, mezo, sam, subzero, zo_muon
from .ascent import global_norm
from .newton_schulz import newton_schulz

SHAPES = {"tall": (5, 3), "wide": (3, 6), "bias": (4,)}
MATRICES = {"tall", "wide"}
LOW = {"tall": (2, 5), "wide": (2, 6), "bias": (4,)}  # rank 2, oriented


def random(shapes, *seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


START, TARGET = random(SHAPES, 1), random(SHAPES, 2)


def grad(params, t):
    """That of f = sum |x - (1 + t) target|^2 / 2, whose central differences are exact."""
    return {k: x - (1 + t) * TARGET[k] for k, x in params.items()}


def loss(params, t):
    return global_norm(grad(params, t)) ** 2 / 2


def draws(shapes, probes=2):
    return lambda t: [random(shapes, 3, t, j) for j in range(probes)]


def gaussian(name, t):
    return random({"tall": (3, 2), "wide": (3, 2)}, 4, t)[name]


def orthonormal(name, t):
    return np.linalg.qr(gaussian(name, t))[0]


def run_mezo(**changes):
    arguments = {"steps": 3, "learning_rate": 0.01, "mu": 1e-3, "num_probes": 2, "grad": grad}
    arguments["direction"] = draws(SHAPES)
    return mezo.run(START, loss, **arguments | changes)


def run_low(method, **changes):
    arguments = {"steps": 5, "learning_rate": 0.01, "mu": 1e-3, "num_probes": 2, "gap": 2}
    arguments |= {"projected": MATRICES, "projector": gaussian, "coordinates": draws(LOW)}
    return method.run(START, loss, grad=grad, **arguments | changes)


def assert_same(actual, expected, **tolerances):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], **tolerances)


def lift(factor, low):  # both matrices have three compressed rows, "tall" on its right side
    return {"tall": (factor["tall"] @ low["tall"]).T, "wide": factor["wide"] @ low["wide"]}


@pytest.mark.parametrize("variant", ["sgd", "sign", "momentum", "adam", "conservative"])
def test_central_differences_are_exact_on_a_quadratic(variant):
    central, exact = (run_mezo(variant=variant, estimator=name) for name in ("central", "jvp"))
    for a, b in zip(central, exact, strict=True):
        assert_same(a["params"], b["params"], rtol=1e-6, atol=1e-9)


def test_mezo_forward_differences_see_the_curvature():
    forward, exact = (run_mezo(mu=0.5, estimator=e)[0]["slopes"] for e in ("forward", "jvp"))
    squares = [global_norm(z) ** 2 for z in draws(SHAPES)(0)]
    np.testing.assert_allclose(np.subtract(forward, exact), np.multiply(0.25, squares))


def test_mezo_is_gradient_descent_over_an_orthogonal_frame():
    """With z_j = sqrt(d) e_j for all d coordinates the estimate is the gradient."""
    size = sum(np.prod(shape) for shape in SHAPES.values())
    ends = np.cumsum([np.prod(shape) for shape in SHAPES.values()])[:-1]
    frame = [
        {k: x.reshape(SHAPES[k]) for k, x in zip(SHAPES, np.split(row, ends), strict=True)}
        for row in np.sqrt(size) * np.eye(size)
    ]
    arguments = {"direction": lambda t: frame, "num_probes": size, "estimator": "central"}
    g = grad(START, 0)
    first = {v: run_mezo(variant=v, **arguments)[0] for v in ("sgd", "sign", "adam")}
    assert_same(first["sgd"]["gradient"], g, rtol=1e-6, atol=1e-9)
    assert_same(first["sign"]["update"], {k: np.sign(x) for k, x in g.items()})
    assert_same(first["adam"]["update"], {k: np.sign(x) for k, x in g.items()}, rtol=1e-5)


def test_mezo_momentum_sums_and_conservative_never_rises():
    history = run_mezo(variant="momentum", momentum=0.5)
    gradients = [record["gradient"]["bias"] for record in history]
    expected = gradients[2] + 0.5 * gradients[1] + 0.25 * gradients[0]
    np.testing.assert_allclose(history[2]["update"]["bias"], expected)
    before = START
    for t, record in enumerate(run_mezo(variant="conservative", learning_rate=10.0)):
        assert loss(record["params"], t) == min(record["candidate_losses"]) <= loss(before, t)
        assert_same(record["params"], before)  # the rate is far too large either way
        before = record["params"]
    flat = mezo.run(
        START,
        lambda params, t: np.float64(1),
        steps=1,
        learning_rate=1.0,
        mu=1e-3,
        num_probes=1,
        direction=draws(SHAPES),
        variant="conservative",
    )
    assert_same(flat[0]["params"], START)


def test_lozo_with_a_full_identity_is_mezo():
    eye = {"projector": lambda name, t: np.eye(3), "projected": MATRICES}
    oriented = {"tall": (3, 5), "wide": (3, 6), "bias": (4,)}
    full = draws(oriented)
    turned = lambda t: [z | {"tall": z["tall"].T} for z in full(t)]  # noqa: E731
    for changes in ({}, {"divide_by_rank": True}):
        low = run_low(lozo, coordinates=full, steps=1, **eye, **changes)[0]
        plain = run_mezo(direction=turned)[0]["update"]
        plain |= {k: plain[k] / 3 for k in MATRICES if changes}
        assert_same(low["params"], {k: x - 0.01 * plain[k] for k, x in START.items()})


@pytest.mark.parametrize("method", [lozo, zo_muon])
def test_updates_are_lifted_from_the_kept_factor(method):
    history, before = run_low(method), START
    for t, record in enumerate(history):
        kept = {k: gaussian(k, t - t % 2) for k in MATRICES}
        assert_same(record["projector"], kept)
        drawn, g = draws(LOW)(t), grad(before, t)
        directions = [lift(kept, n) | {"bias": n["bias"]} for n in drawn]
        d = [sum(np.sum(g[k] * p[k]) for k in g) for p in directions]
        if method is zo_muon:  # forward differences: f has curvature 1
            d = [x + 5e-4 * global_norm(p) ** 2 for x, p in zip(d, directions, strict=True)]
        low = {k: (d[0] * drawn[0][k] + d[1] * drawn[1][k]) / 2 for k in LOW}
        update = low | {k: newton_schulz(low[k]) for k in MATRICES if method is zo_muon}
        update = lift(kept, update) | {"bias": low["bias"]}
        expected = {k: x - 0.01 * update[k] for k, x in before.items()}
        assert_same(record["params"], expected, rtol=1e-6, atol=1e-9)
        before = record["params"]


def test_zo_muon_steps_have_singular_values_near_one_and_the_others_a_rate_of_their_own():
    first = run_low(zo_muon, projector=orthonormal, other_learning_rate=1e-7, steps=1)[0]
    for name in MATRICES:
        step = (START[name] - first["params"][name]) / 0.01
        values = np.linalg.svd(step, compute_uv=False)
        assert values[2] < 1e-9
        assert 0.6 < values[1] <= values[0] < 1.3
    bias = START["bias"] - 1e-7 * first["low"]["bias"]
    np.testing.assert_allclose(first["params"]["bias"], bias)


def test_lozo_momentum_crosses_a_switch():
    history = run_low(lozo, momentum=0.75)
    m = dict.fromkeys(LOW, 0.0)
    for t, record in enumerate(history):
        if t in (2, 4):
            for k in MATRICES:
                new, old = gaussian(k, t), gaussian(k, t - 2)
                m[k] = new.T @ old @ m[k] / 3
        m = {k: 0.75 * m[k] + 0.25 * record["low"][k] for k in LOW}
        assert_same(record["momentum"], m)
        before = history[t - 1]["params"] if t else START
        moved = {k: (before[k] - x) / 0.01 for k, x in record["params"].items()}
        assert_same(moved, lift(record["projector"], m) | {"bias": m["bias"]}, atol=1e-9)
    plain, undamped = run_low(lozo), run_low(lozo, momentum=0.0)
    assert_same(undamped[-1]["params"], plain[-1]["params"])


def test_subzero():
    """Normalized directions have the norm of full Gaussians; a square full basis is MeZO."""

    def factors(name, t):
        sides = zip(SHAPES[name], random({"u": (9, 9), "v": (9, 9)}, t).values(), strict=True)
        return [np.linalg.qr(x[:size, :2])[0] for size, x in sides]

    z = {"tall": (2, 2), "wide": (2, 2), "bias": (4,)}
    shared = {"projected": MATRICES, "grad": grad, "gap": 2, "estimator": "jvp"}
    shared |= {"steps": 3, "learning_rate": 0.01, "mu": 1e-3, "num_probes": 2}
    arguments = shared | {"factors": factors, "coordinates": draws(z)}
    scaled, plain = (subzero.run(START, loss, normalize=n, **arguments) for n in (True, False))
    for history, factor in ((scaled, {"tall": 15**0.5 / 2, "wide": 18**0.5 / 2}), (plain, {})):
        for t, record in enumerate(history):
            before = history[t - 1]["params"] if t else START
            step = {k: (before[k] - x) / 0.01 for k, x in record["params"].items()}
            for k in MATRICES:
                u, v = factors(k, t - t % 2)
                lifted = factor.get(k, 1.0) * u @ record["low"][k] @ v.T
                np.testing.assert_allclose(step[k], lifted, atol=1e-9)
    eyes = lambda name, t: [np.eye(n)[:, : min(SHAPES[name])] for n in SHAPES[name]]  # noqa: E731
    small = draws({"tall": (3, 3), "wide": (3, 3), "bias": (4,)})
    first = subzero.run(
        START, loss, normalize=False, **shared | {"factors": eyes, "coordinates": small}
    )[0]
    padded = [z | {"tall": np.pad(z["tall"], ((0, 2), (0, 0)))} for z in small(0)]
    padded = [z | {"wide": np.pad(z["wide"], ((0, 0), (0, 3)))} for z in padded]
    expected = run_mezo(direction=lambda t: padded, estimator="jvp", steps=1)[0]
    assert_same(first["params"], expected["params"])


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_ascends_most_within_its_ball(adaptive):
    """|epsilon / T| = rho, and no other direction of that size has a larger slope."""
    g = grad(START, 0)
    epsilon = sam.ascent(START, g, 0.05, adaptive, eta=0.1)
    t = {k: np.abs(x) + 0.1 if adaptive else 1.0 for k, x in START.items()}
    np.testing.assert_allclose(global_norm({k: x / t[k] for k, x in epsilon.items()}), 0.05)
    rise = sum(np.sum(epsilon[k] * g[k]) for k in g)
    np.testing.assert_allclose(rise, 0.05 * global_norm({k: t[k] * x for k, x in g.items()}))
    zero = {k: np.zeros_like(x) for k, x in START.items()}
    assert_same(sam.ascent(START, zero, 0.05, adaptive), zero)


def test_sam_with_sgd_and_with_adam():
    for inner in ("sgd", "adam"):
        shared = {"steps": 3, "learning_rate": 0.1, "inner": inner}
        before, state = START, adam.init(SHAPES)
        for t, record in enumerate(sam.run(START, grad, rho=0.05, **shared)):
            # f has curvature 1, so that the gradient grows by epsilon.
            g = grad(before, t)
            update = {k: x * (1 + 0.05 / global_norm(g)) for k, x in g.items()}
            if inner == "adam":
                update, state = adam.direction(state, update)
            before = {k: x - 0.1 * update[k] for k, x in before.items()}
            assert_same(record["params"], before)


def run_galore(**changes):
    arguments = {"steps": 6, "rank": 2, "gap": 3, "learning_rate": 0.1, "projected": MATRICES}
    return galore.run(START, grad, **arguments | changes)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("residual", [None, "fira"])
def test_galore_is_lorenza_without_an_ascent(proj_type, residual):
    shared = {"proj_type": proj_type, "residual": residual, "scale": 0.5}
    other = lorenza.run(
        START,
        loss,
        grad,
        steps=6,
        rank=2,
        gap=3,
        rho=0.0,
        mu=1e-3,
        num_probes=1,
        probes=None,
        transport="keep",
        estimator="jvp",
        learning_rate=0.1,
        projected=MATRICES,
        **shared,
    )
    for a, b in zip(run_galore(**shared), other, strict=True):
        assert_same(a["params"], b["params"], rtol=1e-10)


GOLD = json.loads(make_galore.PATH.read_text())


def run_gold(run, own_svd, **changes):
    arguments = dict(GOLD["settings"])
    gap = arguments["gap"] = arguments.pop("update_proj_gap")
    assert arguments.pop("weight_decay") == 0
    arguments |= {"projected": MATRICES, "eps": run["eps"], "eps_before_correction": True}
    if not own_svd:
        arguments["projector"] = lambda name, t: np.array(run["projectors"][name][t // gap])
    return galore.run(make_galore.START, make_galore.gradients, **arguments | changes)


@pytest.mark.parametrize("own_svd", [False, True])
@pytest.mark.parametrize("run", GOLD["runs"], ids=lambda run: str(run["eps"]))
def test_galore_agrees_with_galore_torch(run, own_svd):
    """To the 9 digits of the file, or to the float32 of galore-torch's SVD where we take our own.

    Its signs do not matter: LAPACK as PyTorch calls it answers the other sign for the first left
    singular vector of "wide" than as NumPy calls it, at each of the three refreshes alike.
    """
    for t, record in enumerate(run_gold(run, own_svd)):
        gold = {k: run["params"][k][t] for k in run["params"]}
        assert_same(record["params"], gold, rtol=0, atol=1e-7 if own_svd else 1.1e-9)


def test_the_gold_values_see_where_eps_is_added_and_a_sign_that_turns():
    run = GOLD["runs"][0]
    last = {k: np.array(x[-1]) for k, x in run["params"].items()}
    outside = run_gold(run, False, eps_before_correction=False)[-1]["params"]
    assert all(np.abs(outside[k] - last[k]).max() > 5e-5 for k in last)

    def turned(name, t):
        return np.array(run["projectors"][name][t // 4]) * (-1.0 if t == 4 else 1.0)

    after = run_gold(run, False, projector=turned)[-1]["params"]
    assert all(np.abs(after[k] - last[k]).max() > 1e-3 for k in MATRICES)


def test_the_gold_problem_has_the_gradient_it_says():
    direction = random({k: x.shape for k, x in make_galore.START.items()}, 5)
    ahead, behind = (
        make_galore.loss({k: x + h * direction[k] for k, x in make_galore.START.items()}, 3)
        for h in (1e-5, -1e-5)
    )
    gradient = make_galore.gradients(make_galore.START, 3)
    exact = sum(np.sum(gradient[k] * direction[k]) for k in gradient)
    np.testing.assert_allclose((ahead - behind) / 2e-5, exact, rtol=1e-7)
