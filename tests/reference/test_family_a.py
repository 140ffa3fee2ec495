"""The references of the family's first half against laws that the methods obey."""

import itertools

import numpy as np
import pytest

from . import adam, apollo, cosmos, flora, gradnormlorp, gum, lorenza, lotus, owlore, vlorp
from .newton_schulz import newton_schulz
from .subspace import compressed_side, svd_factors

SHAPES = {"tall": (8, 4), "wide": (4, 12), "bias": (5,)}
MATRICES = {"tall", "wide"}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


START = {k: random(*shape, seed=i) for i, (k, shape) in enumerate(SHAPES.items())}


def noise(params, t):
    """Gradients that do not depend on the parameters."""
    return {k: random(*x.shape, seed=100 * t + len(k) + x.size) for k, x in params.items()}


def constant(params, t):
    return noise(params, 0)


def gaussian(rank, divide=1):
    """The projectors that a library would draw; 4 is the shorter side of both matrices."""
    return lambda name, t: random(4 // divide, rank, seed=t) / np.sqrt(rank)


def orthogonal(name, t):
    return np.linalg.qr(random(4, 4, seed=t))[0]


def last(history):
    return history[-1]["params"]


def moves(history):
    """What each update subtracted."""
    states = [START, *(record["params"] for record in history)]
    return [
        {k: before[k] - after[k] for k in after} for before, after in itertools.pairwise(states)
    ]


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_allclose(a[k], b[k], **({"rtol": 1e-9, "atol": 1e-12} | tolerance))


def plain_adam(params, grad, steps, rate, **betas):
    state = adam.init({k: x.shape for k, x in params.items()})
    for t in range(steps):
        update, state = adam.direction(state, grad(params, t), **betas)
        params = {k: x - rate * update[k] for k, x in params.items()}
    return params


def galore(params, grad, steps, gap, rate, projected=MATRICES):
    """LORENZA without an ascent."""
    return lorenza.run(
        params,
        lambda params, t: 0.0,
        grad,
        steps=steps,
        rank=2,
        gap=gap,
        rho=0.0,
        mu=1.0,
        num_probes=1,
        probes=None,
        proj_type="std",
        transport="keep",
        estimator="jvp",
        learning_rate=rate,
        projected=projected,
    )


COMMON = {"grad": noise, "steps": 5, "rank": 2, "projected": MATRICES, "learning_rate": 0.1}
RUNS = {
    "apollo": lambda: apollo.run(START, gap=2, projector=gaussian(2), **COMMON),
    "cosmos": lambda: cosmos.run(START, b1=0.9, b2=0.999, **COMMON),
    "gradnormlorp": lambda: gradnormlorp.run(START, gap=2, **COMMON),
    "gum": lambda: gum.run(START, gap=2, full=lambda t: {"tall"}, q=0.5, **COMMON),
    "lotus": lambda: lotus.run(START, eta=2, gamma=0.5, **COMMON),
    "owlore": lambda: owlore.run(START, gap=2, interval=3, active=lambda t: (), **COMMON),
    "vlorp": lambda: vlorp.run(
        START, gap=2, granularity=2, projector=gaussian(2, 2), eps=1e-8, **COMMON
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_other_leaves_take_adam_and_the_start_stays_as_it_is(name):
    before = {k: x.copy() for k, x in START.items()}
    history = RUNS[name]()
    close(START, before, rtol=0, atol=0)
    close({"bias": last(history)["bias"]}, {"bias": plain_adam(START, noise, 5, 0.1)["bias"]})
    for move in moves(history):
        assert all(np.isfinite(x).all() and x.any() for x in move.values())


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_newton_schulz_keeps_the_singular_vectors(shape):
    u, s, vt = np.linalg.svd(random(*shape), full_matrices=False)
    inner = u.T @ newton_schulz((u * s) @ vt) @ vt.T
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-12)
    assert np.all((np.diag(inner) > 0.6) & (np.diag(inner) < 1.3))
    assert not newton_schulz(np.zeros(shape)).any()


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_apollo_with_the_whole_space_has_adam_norms_and_the_gradients_direction(scale_type):
    def identity(name, t):
        return np.eye(4)

    common = COMMON | {"rank": 4, "learning_rate": 1.0}
    history = apollo.run(
        START, gap=9, projector=identity, scale_type=scale_type, growth_limit=np.inf, **common
    )
    state = adam.init({k: SHAPES[k] for k in MATRICES})
    for t, move in enumerate(moves(history)):
        g = {k: x for k, x in noise(START, t).items() if k in MATRICES}
        n, state = adam.direction(state, g)
        for k, side in ("tall", 1), ("wide", 0):
            axis = side if scale_type == "channel" else None
            factor = np.linalg.norm(n[k], axis=axis, keepdims=True)
            factor = factor / np.linalg.norm(g[k], axis=axis, keepdims=True)
            np.testing.assert_allclose(move[k], factor * g[k])


def test_apollo_limits_the_growth_of_its_step():
    def growing(params, t):
        return {k: x * 10.0 ** (t == 1) for k, x in constant(params, t).items()}

    common = COMMON | {"grad": growing, "steps": 2}
    history = apollo.run(START, gap=9, projector=gaussian(2), scale=3.0, b1=0.0, **common)
    first, second = moves(history)
    for k in MATRICES:
        ratio = np.linalg.norm(second[k]) / np.linalg.norm(first[k])
        np.testing.assert_allclose(ratio, 1.01)


@pytest.mark.parametrize("normalize", ["after", "before"])
@pytest.mark.parametrize("min_dim", [2, 128])
def test_flora_with_orthogonal_projectors_is_momentum_in_the_whole_space(normalize, min_dim):
    common = COMMON | {"rank": 4}
    common |= {"normalize": normalize, "min_dim_size_to_factor": min_dim, "kappa": 2}
    inside = flora.run(START, projector=orthogonal, **common)
    outside = flora.run(START, projector=None, **(common | {"projected": set()}))
    close(last(inside), last(outside))


def test_flora_takes_a_rank_one_gradient_to_its_sign():
    g = np.outer(random(8), random(4, seed=1))
    for normalize in "after", "before":
        history = flora.run(
            {"w": START["tall"]},
            lambda params, t: {"w": g},
            steps=1,
            rank=2,
            kappa=1,
            projector=None,
            projected=set(),
            learning_rate=1.0,
            beta=0.0,
            normalize=normalize,
            min_dim_size_to_factor=2,
        )
        rms = np.sqrt(np.mean(START["tall"] ** 2))
        np.testing.assert_allclose(START["tall"] - last(history)["w"], rms * np.sign(g))


def test_flora_carries_momentum_over_a_switch():
    """With G = 0 after the first update, momentum is b^t P_t^T P_(t-1) ... P_0^T G_0."""
    history = flora.run(
        START,
        projector=gaussian(2),
        kappa=1,
        beta=0.5,
        **(COMMON | {"grad": lambda params, t: {k: x * (t == 0) for k, x in START.items()}}),
    )
    expected = 0.5 * gaussian(2)("", 0).T @ START["wide"]
    for t, record in enumerate(history):
        if t:
            expected = 0.5 * gaussian(2)("", t).T @ gaussian(2)("", t - 1) @ expected
        np.testing.assert_allclose(record["momentum"]["wide"], expected)


@pytest.mark.parametrize(("granularity", "eps_in_root"), [(1, False), (2, True), (4, False)])
def test_vlorp_with_a_whole_orthogonal_basis_does_not_depend_on_it(granularity, eps_in_root):
    """O = G and P m = the whole momentum, whatever the granularity and the basis."""

    def basis(name, t):
        return np.linalg.qr(random(4 // granularity, 4 // granularity, seed=7))[0]

    history = vlorp.run(
        START,
        gap=2,
        granularity=granularity,
        projector=basis,
        eps_in_root=eps_in_root,
        **(COMMON | {"rank": 4 // granularity, "learning_rate": 1.0}),
    )
    for k in MATRICES:
        m, v = 0.0, 0.0
        for t, move in enumerate(moves(history)):
            g = noise(START, t)[k]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            factored = np.outer(v.sum(1), v.sum(0)) / v.sum()
            expected = np.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1)) * m
            root = np.sqrt(factored + 1e-6) if eps_in_root else np.sqrt(factored) + 1e-6
            np.testing.assert_allclose(move[k], expected / root)


def test_vlorp_compresses_pieces_of_rows():
    """The paper's layout: (n, m) as (n c, m / c), so that c pieces of each row are compressed."""
    p = gaussian(1, 2)("", 0)
    history = vlorp.run(
        START, gap=9, granularity=2, projector=lambda name, t: p, **(COMMON | {"rank": 1})
    )
    g = noise(START, 0)["tall"]
    expected = [piece @ p for row in g for piece in (row[:2], row[2:])]
    np.testing.assert_allclose(history[0]["m"]["tall"], 0.1 * np.transpose(expected))


@pytest.mark.parametrize("transport", ["keep", "reset", "rotate"])
def test_vlorp_momentum_at_a_resampling(transport):
    history = vlorp.run(
        START, gap=2, granularity=1, projector=gaussian(2), transport=transport, **COMMON
    )
    m, p, old = history[1]["m"]["wide"], gaussian(2)("", 2), gaussian(2)("", 0)
    m = {"keep": m, "reset": 0 * m, "rotate": p.T @ old @ m}[transport]
    expected = 0.9 * m + 0.1 * p.T @ noise(START, 2)["wide"]
    np.testing.assert_allclose(history[2]["m"]["wide"], expected)


def test_lotus_is_galore_where_it_never_or_always_switches():
    for gap, gamma in (100, 0.0), (1, np.inf):
        ours = lotus.run(START, eta=1, gamma=gamma, **COMMON)
        close(last(ours), last(galore(START, noise, 5, gap, 0.1)))
        assert [record["switched"]["tall"] for record in ours] == [True] + 4 * [gap == 1]


def test_lotus_switches_where_the_gradient_stands_still():
    """A constant gradient switches once it is tested, one that flips its sign is 2 / age away."""

    def grad(params, t):
        g = constant(params, t)
        return g | {"wide": g["wide"] * (-1) ** t}

    history = lotus.run(START, eta=2, gamma=0.4, **(COMMON | {"grad": grad, "steps": 7}))
    switched = {k: [record["switched"][k] for record in history] for k in MATRICES}
    # Tests at ages 2, 4 and 6 find distances of 2/2, 2/4 and 2/6; the switch starts age 1 anew.
    assert switched["tall"] == 7 * [True]
    assert switched["wide"] == [t in (0, 5) for t in range(7)]


def test_gum_is_unbiased_and_muon_at_full_rank():
    common = COMMON | {"steps": 1, "learning_rate": 1.0}
    q = 0.25
    low = gum.run(START, gap=1, full=lambda t: set(), q=q, **common)[0]
    full = gum.run(START, gap=1, full=lambda t: MATRICES, q=q, **common)[0]
    for k in MATRICES:
        g = noise(START, 0)[k]
        g = g.T if compressed_side(g.shape, "std") == "right" else g
        mean = (1 - q) * low["p"][k] @ low["momentum"][k] + q * full["momentum"][k]
        np.testing.assert_allclose(mean, g)
    common = COMMON | {"rank": 4, "learning_rate": 1.0}
    history = gum.run(START, gap=2, full=lambda t: set(), q=q, beta=0.9, **common)
    for k in MATRICES:
        momentum = 0.0
        for t, move in enumerate(moves(history)):
            momentum = 0.9 * momentum * (t % 2) + noise(START, t)[k]
            np.testing.assert_allclose(move[k], newton_schulz(momentum), atol=1e-12)


def test_cosmos_tracks_the_eigenbasis_of_a_constant_gradient():
    history = cosmos.run(START, b2=0.9, **(COMMON | {"grad": constant, "learning_rate": 1.0}))
    for k, short in ("tall", 4), ("wide", 4):
        g = constant(START, 0)[k]
        g = g.T if k == "tall" else g
        p, s, _ = svd_factors(g, 2)
        for t, (record, move) in enumerate(zip(history, moves(history), strict=True)):
            np.testing.assert_allclose(record["p"][k], p, atol=1e-9)
            expected = np.diag(s**2) * (1 - 0.9 ** (t + 1))
            np.testing.assert_allclose(record["s"][k], expected, atol=1e-9)
            np.testing.assert_allclose(np.linalg.norm(move[k]), np.sqrt(short))


def test_cosmos_at_full_rank_is_adam_in_the_basis_with_a_fixed_norm():
    # gamma = 0: what is outside of the whole space is round-off, but B would give it norm sqrt(k).
    common = COMMON | {"rank": 4, "learning_rate": 1.0, "gamma": 0.0}
    history = cosmos.run(START, eps=0.0, **common)
    # The first direction is P sign(P^T G), of norm sqrt(k l); the step has norm sqrt(k).
    g = noise(START, 0)["wide"]
    p = svd_factors(g, 4)[0]
    move = moves(history)[0]["wide"]
    np.testing.assert_allclose(move, p @ np.sign(p.T @ g) / np.sqrt(12), atol=1e-12)


def test_cosmos_step_in_rows_and_columns_alike():
    turned = {"w": START["wide"].T}
    common = COMMON | {"projected": {"w"}}
    wide = cosmos.run({"w": START["wide"]}, **(common | {"grad": lambda params, t: turn(t, False)}))
    tall = cosmos.run(turned, **(common | {"grad": lambda params, t: turn(t, True)}))
    close({"w": last(wide)["w"].T}, last(tall))


def turn(t, transposed):
    g = random(4, 12, seed=t)
    return {"w": g.T if transposed else g}


def test_gradnormlorp_gradients_are_those_of_the_normalized_weight():
    v, g, target = random(5, 3), random(3, seed=1), random(5, 3, seed=2)

    def loss(v, g):
        return np.sum((g * v / np.linalg.norm(v, axis=0) - target) ** 3)

    weight = g * v / np.linalg.norm(v, axis=0)
    dv, dg = gradnormlorp.split(3 * (weight - target) ** 2, v, g)
    for index in np.ndindex(5, 3):
        h = np.zeros((5, 3))
        h[index] = 1e-6
        numeric = (loss(v + h, g) - loss(v - h, g)) / 2e-6
        np.testing.assert_allclose(dv[index], numeric, rtol=1e-6, atol=1e-6)
    for j in range(3):
        h = 1e-6 * np.eye(3)[j]
        numeric = (loss(v, g + h) - loss(v, g - h)) / 2e-6
        np.testing.assert_allclose(dg[j], numeric, rtol=1e-6, atol=1e-6)


def test_gradnormlorp_keeps_directions_and_magnitudes_apart():
    record = gradnormlorp.run(START, gap=2, **COMMON)[-1]
    for k in MATRICES:
        weight, v = record["params"][k], record["v"][k]
        np.testing.assert_allclose(np.linalg.norm(weight, axis=0), np.abs(record["g"][k]))
        np.testing.assert_allclose(
            np.abs(np.sum(weight * v, axis=0)),
            np.linalg.norm(weight, axis=0) * np.linalg.norm(v, axis=0),
        )


LAYERS = {f"layers/{i}/{k}": x + i for i in range(3) for k, x in START.items()}
LAYER_MATRICES = {k for k in LAYERS if not k.endswith("bias")} | MATRICES


def test_owlore_with_all_layers_active_is_galore():
    params = LAYERS | START
    common = COMMON | {"projected": LAYER_MATRICES}
    ours = owlore.run(params, gap=2, interval=9, active=lambda t: range(3), **common)
    close(last(ours), last(galore(params, noise, 5, 2, 0.1, LAYER_MATRICES)))


def test_owlore_trains_the_sampled_layers_anew():
    chosen = {0: {1}, 2: {1, 2}, 4: {0}}
    common = COMMON | {"projected": LAYER_MATRICES}
    history = owlore.run(LAYERS | START, gap=9, interval=2, active=chosen.get, **common)
    before = LAYERS | START
    for t, record in enumerate(history):
        moved = {k for k, x in record["params"].items() if np.any(x != before[k])}
        layers = chosen[t - t % 2]
        assert moved == set(START) | {k for k in LAYERS if int(k.split("/")[1]) in layers}
        assert record["inner"]["layers"]["count"] == t % 2 + 1
        assert record["inner"]["rest"]["count"] == t + 1
        before = record["params"]
    # A layer sampled again starts over: its second period is GaLore from the weights it has.
    params = {k: x for k, x in history[1]["params"].items() if k.startswith("layers/1/")}
    again = galore(
        params, lambda params, t: noise(params, t + 2), 2, 9, 0.1, LAYER_MATRICES & params.keys()
    )
    close(last(again), {k: history[3]["params"][k] for k in params})


def test_owlore_probabilities():
    quiet, loud = np.ones((2, 4)), np.ones((4, 5))
    loud[0, 0] = 100.0
    assert owlore.outlier_ratio([quiet, loud], 5) == 1 / 28
    probabilities = owlore.probabilities([[quiet, loud], [quiet], [loud]], 5)
    np.testing.assert_allclose(probabilities, np.array([1 / 28, 0, 1 / 20]) / (1 / 28 + 1 / 20))
    np.testing.assert_allclose(owlore.probabilities([[quiet], [-quiet]], 5), 0.5)
