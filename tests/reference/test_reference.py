"""The references against closed forms."""

import numpy as np
import pytest

from . import adam, adazo_sam, lorenza
from .ascent import global_norm
from .low_rank import limit_growth, transport_moments
from .subspace import align, compressed_side, svd_factors


def run_lorenza(params, loss, grad, **changes):
    arguments = {
        "steps": 4,
        "rank": 2,
        "gap": 2,
        "rho": 0.0,
        "mu": 1e-3,
        "num_probes": 2,
        "probes": gaussian_probes(dict.fromkeys(params, (2,))),
        "proj_type": "std",
        "transport": "keep",
        "estimator": "jvp",
        "learning_rate": 0.1,
        "projected": set(params),
    }
    return lorenza.run(params, loss, grad, **(arguments | changes))


def gaussian_probes(shapes, num_probes=2):
    def probes(t):
        rng = np.random.default_rng(100 + t)
        return {name: rng.normal(size=(num_probes, *shape)) for name, shape in shapes.items()}

    return probes


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def quadratic(target):
    """f = sum |x - target|^2 / 2 over all leaves, whose gradient is x - target."""

    def loss(params, t):
        return sum(np.sum((x - target[k]) ** 2) for k, x in params.items()) / 2

    return loss, lambda params, t: {k: x - target[k] for k, x in params.items()}


def no_loss(params, t):
    return 0.0


PROBLEM = {"tall": random(5, 3), "wide": random(3, 6, seed=1), "bias": random(4, seed=2)}
START = {name: np.zeros_like(x) for name, x in PROBLEM.items()}


def test_adam_two_steps_by_hand():
    state = adam.init({"x": (2,)})
    first, state = adam.direction(state, {"x": np.array([1.0, -2.0])}, b1=0.5, b2=0.75, eps=0.0)
    np.testing.assert_allclose(first["x"], [1.0, -1.0])
    # m = 0.5*0.5 + 0.5*3 = 1.75, m_hat = 1.75/0.75; v = 0.75*0.25 + 0.25*9, v_hat = v/(7/16)
    second, state = adam.direction(state, {"x": np.array([3.0, 0.0])}, b1=0.5, b2=0.75, eps=0.0)
    by_hand = [(1.75 / 0.75) / np.sqrt(2.4375 * 16 / 7), (-0.5 / 0.75) / np.sqrt(0.75 * 16 / 7)]
    np.testing.assert_allclose(second["x"], by_hand)
    assert state["count"] == 2


def test_adam_eps_is_outside_the_root():
    direction, _ = adam.direction(adam.init({"x": ()}), {"x": np.array(2.0)}, eps=2.0)
    np.testing.assert_allclose(direction["x"], 0.5)


def test_svd_factors():
    g = random(5, 3)
    q, s, r_ = svd_factors(g, 3)
    np.testing.assert_allclose(q * s @ r_, g)
    assert (q[np.abs(q).argmax(0), range(3)] > 0).all()
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(svd_factors(-g, 2)[0], q[:, :2])
    np.testing.assert_allclose(svd_factors(-g, 2)[2], -r_[:2])


def test_align():
    q, _, r_ = svd_factors(random(5, 4), 2)
    aligned_q, aligned_r = align(q, r_, q * [1, -1])
    np.testing.assert_array_equal(aligned_q, q * [1, -1])
    np.testing.assert_array_equal(aligned_r, r_ * [[1], [-1]])


@pytest.mark.parametrize(
    ("shape", "std", "reverse"),
    [((4, 3), "right", "left"), ((3, 4), "left", "right"), ((3, 3), "left", "left")],
)
def test_compressed_side(shape, std, reverse):
    assert compressed_side(shape, "std") == std
    assert compressed_side(shape, "reverse_std") == reverse
    assert compressed_side(shape, "left") == "left"
    assert compressed_side(shape, "right") == "right"


@pytest.mark.parametrize("proj_type", ["left", "right"])
@pytest.mark.parametrize("transport", ["keep", "rotate", "reset"])
def test_rank_one_gradients_are_adam_on_one_factor(proj_type, transport):
    """For gradients c_t a b^T the left step is a Adam(|a| c_t b)^T / |a|; mirrored on the right."""
    a, b, c = random(5), random(4, seed=1), [1.0, -0.5, 2.0, -3.0]

    def grad(params, t):
        return {"w": c[t] * np.outer(a, b)}

    history = run_lorenza(
        {"w": np.zeros((5, 4))},
        no_loss,
        grad,
        rank=1,
        gap=1,
        scale=0.5,
        proj_type=proj_type,
        transport=transport,
    )
    kept, other = (a, b) if proj_type == "left" else (b, a)
    state, expected = adam.init({"w": other.shape}), np.zeros((5, 4))
    for t, record in enumerate(history):
        if transport == "reset":
            state = adam.init({"w": other.shape})
        low = {"w": c[t] * np.linalg.norm(kept) * other}
        direction, state = adam.direction(state, low)
        step = np.outer(kept / np.linalg.norm(kept), direction["w"])
        expected -= 0.1 * 0.5 * (step if proj_type == "left" else step.T)
        np.testing.assert_allclose(record["params"]["w"], expected, atol=1e-12)
        np.testing.assert_allclose(record["captured_energy"], 1.0)


def test_other_leaves_are_plain_adam_with_decoupled_weight_decay():
    loss, grad = quadratic(PROBLEM)
    record = run_lorenza(
        START | {"bias": np.ones(4)},
        loss,
        grad,
        projected={"tall", "wide"},
        steps=3,
        transport="reset",
        gap=1,
        weight_decay=0.2,
    )[-1]
    x, state = np.ones(4), adam.init({"bias": (4,)})
    for _ in range(3):
        direction, state = adam.direction(state, {"bias": x - PROBLEM["bias"]})
        x = x - 0.1 * (direction["bias"] + 0.2 * x)
    np.testing.assert_allclose(record["params"]["bias"], x)
    assert record["inner"]["count"] == 1  # the reset concerns the projected count only


@pytest.mark.parametrize("estimator", ["central", "forward", "jvp"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_epsilon(estimator, proj_type):
    loss, grad = quadratic(PROBLEM)
    history = run_lorenza(
        START,
        loss,
        grad,
        projected={"tall", "wide"},
        rho=0.05,
        mu=1e-6,
        estimator=estimator,
        proj_type=proj_type,
        perturb_every=2,
    )
    norms = [global_norm(record["epsilon"]) for record in history]
    np.testing.assert_allclose(norms, [0, 0, 0.05, 0])
    assert [record["ascent_norm"] > 0 for record in history] == [False, False, True, False]
    assert set(history[2]["epsilon"]) == {"tall", "wide"}
    before = history[1]["params"]
    assert history[2]["value"] > loss(before, 2)
    # epsilon is diag in the old factors, and its coefficients are those of mean_j d_j u_j.
    u, g, old = gaussian_probes({"tall": (2,), "wide": (2,)})(2), grad(before, 2), history[1]
    u = {k: u[k] for k in ("tall", "wide")}
    diagonal = {k: np.diag(old["q"][k].T @ g[k] @ old["r"][k].T) for k in u}
    d = sum(u[k] @ diagonal[k] for k in u)
    ascent = {k: old["q"][k] * (d @ u[k] / 2) @ old["r"][k] for k in u}
    np.testing.assert_allclose(history[2]["ascent_norm"], global_norm(ascent), rtol=1e-4)
    for k in u:
        expected = 0.05 * ascent[k] / global_norm(ascent)
        np.testing.assert_allclose(history[2]["epsilon"][k], expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(
            history[2]["gradient"][k], before[k] + history[2]["epsilon"][k] - PROBLEM[k]
        )


def test_forward_difference_keeps_its_curvature_error():
    """On f = |x|^2/2 central equals jvp and forward is off by mu |P|^2 / 2."""
    loss, grad = quadratic({"w": np.zeros((3, 3))})
    arguments = {"rho": 0.1, "mu": 0.5, "steps": 2, "rank": 2, "num_probes": 1}
    runs = {
        name: run_lorenza({"w": random(3, 3)}, loss, grad, estimator=name, **arguments)
        for name in ("central", "forward", "jvp")
    }
    u = gaussian_probes({"w": (2,)})(1)["w"][0]
    record = runs["jvp"][0]
    d = np.sum(record["params"]["w"] * (record["q"]["w"] * u @ record["r"]["w"]))
    for name, slope in [("central", d), ("forward", d + 0.25 * (u @ u)), ("jvp", d)]:
        expected = abs(slope) * np.linalg.norm(u)
        np.testing.assert_allclose(runs[name][1]["ascent_norm"], expected)


def test_an_ascent_that_is_not_finite_or_zero_gives_no_epsilon():
    _, grad = quadratic(PROBLEM)
    for bad in (np.inf, np.nan, 0.0):
        history = run_lorenza(
            START,
            lambda params, t, bad=bad: bad,
            grad,
            projected={"tall"},
            rho=0.1,
            estimator="forward",
            steps=2,
        )
        assert not history[1]["epsilon"]["tall"].any()
        assert history[1]["ascent_norm"] == 0
        assert not history[1]["skipped"]


def test_a_gradient_that_is_not_finite_skips_the_step():
    target = random(4, 4)

    def grad(params, t):
        return {"w": params["w"] - target + (np.nan if t in (0, 4) else 0.0)}

    history = run_lorenza(
        {"w": np.ones((4, 4))}, no_loss, grad, steps=7, gap=4, weight_decay=0.5, transport="reset"
    )
    assert [record["skipped"] for record in history] == [t in (0, 4) for t in range(7)]
    np.testing.assert_allclose(history[0]["params"]["w"], 0.95)
    assert history[0]["q"] == {}
    assert [record["inner"]["count"] for record in history] == [0, 1, 2, 3, 3, 1, 2]
    q = [record["q"].get("w") for record in history]
    assert q[1] is not None
    for t, same in [(2, True), (3, True), (4, True), (5, False), (6, True)]:
        assert np.array_equal(q[t], q[t - 1]) == same
    np.testing.assert_allclose(history[4]["params"]["w"], 0.95 * history[3]["params"]["w"])


def test_rotate_follows_a_change_of_basis():
    m, v = random(2, 3), random(2, 3, seed=1) ** 2
    state = {"count": 3, "m": {"w": m}, "v": {"w": v}}
    swap = np.array([[0.0, -1.0], [1.0, 0.0]])
    moved = transport_moments(state, {"w": swap}, "rotate")
    np.testing.assert_allclose(moved["m"]["w"], [-m[1], m[0]])
    np.testing.assert_allclose(moved["v"]["w"], v[::-1], atol=1e-15)
    # Nothing of the old subspace is left, so nothing of the moments is.
    moved = transport_moments(state, {"w": np.zeros((2, 2))}, "rotate")
    assert not moved["m"]["w"].any()
    assert not moved["v"]["w"].any()
    assert moved["count"] == 3
    # m^2 > v in one row: v would turn negative under this C.
    state = {"count": 1, "m": {"w": np.array([[2.0], [-2.0]])}, "v": {"w": np.zeros((2, 1))}}
    moved = transport_moments(state, {"w": np.full((2, 2), 0.5)}, "rotate")
    np.testing.assert_array_equal(moved["v"]["w"], 0.0)


def test_limit_growth():
    x = np.array([3.0, 4.0])
    for previous in (None, 0.0):
        same, norm = limit_growth(x, previous, 1.01)
        assert same is x
        assert norm == 5.0
    assert limit_growth(x, 4.99, 1.01)[0] is x
    limited, norm = limit_growth(x, 2.0, 1.1)
    np.testing.assert_allclose(limited, 0.44 * x)
    np.testing.assert_allclose(norm, 2.2)


@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_residuals_at_the_first_two_steps(proj_type):
    """b1 = b2 = 0 makes N = sign(ghat), so that no limiter binds when the gradient doubles."""
    g = random(4, 5)

    def grad(params, t):
        return {"w": g * (1 + t)}

    steps = {}
    for residual in (None, "fira", "sumo"):
        history = run_lorenza(
            {"w": np.zeros((4, 5))},
            no_loss,
            grad,
            residual=residual,
            proj_type=proj_type,
            scale=2,
            gap=9,
            steps=2,
            b1=0.0,
            b2=0.0,
        )
        first, second = (record["params"]["w"] for record in history)
        steps[residual] = -first / 0.2, -(second - first) / 0.2
    u, s, vt = np.linalg.svd(g)
    outside = g - u[:, :2] * s[:2] @ vt[:2]
    low = s[:2, None] * vt[:2] if proj_type == "left" else (u[:, :2] * s[:2]).T
    # The columns of N = sign(ghat) have norm sqrt(2), and phi halves when the gradient doubles.
    phi = np.sqrt(2) / np.linalg.norm(low, axis=0)
    fira = outside * (phi if proj_type == "left" else phi[:, None])
    for t in range(2):
        np.testing.assert_allclose(steps["fira"][t] - steps[None][t], fira, atol=1e-6)
        np.testing.assert_allclose(
            steps["sumo"][t] - steps[None][t], outside * (1 + t), rtol=1e-6, atol=1e-6
        )


def test_sumo_limits_the_growth_of_the_inner_update():
    """Gradients of rank one have no residual; grown 100-fold they would give |N| 1.41 times."""
    g = np.outer(random(3), random(4, seed=1))

    def grad(params, t):
        return {"w": g * (1.0, 100.0)[t]}

    first, second = run_lorenza(
        {"w": np.zeros((3, 4))}, no_loss, grad, rank=1, steps=2, residual="sumo", b1=0.0
    )
    step = second["params"]["w"] - first["params"]["w"]
    ratio = np.linalg.norm(step) / np.linalg.norm(first["params"]["w"])
    np.testing.assert_allclose(ratio, 1.1)


def test_adazo_sam_perturbs_all_leaves_from_the_first_update_on():
    loss, grad = quadratic(PROBLEM)
    shapes = {name: x.shape for name, x in START.items()}
    history = adazo_sam.run(
        START,
        loss,
        grad,
        steps=3,
        rho=0.05,
        mu=0.5,
        num_probes=2,
        estimator="central",
        probes=gaussian_probes(shapes),
        learning_rate=0.1,
        weight_decay=0.3,
    )
    before, state = START, adam.init(shapes)
    for t, record in enumerate(history):
        drawn, g = gaussian_probes(shapes)(t), grad(before, t)
        d = [sum(np.sum(drawn[k][j] * g[k]) for k in g) for j in range(2)]
        ascent = {k: (d[0] * x[0] + d[1] * x[1]) / 2 for k, x in drawn.items()}
        norm = global_norm(ascent)
        np.testing.assert_allclose(record["ascent_norm"], norm)
        assert record["value"] > loss(before, t)
        perturbed = {k: g[k] + 0.05 * ascent[k] / norm for k in g}
        direction, state = adam.direction(state, perturbed)
        before = {k: x - 0.1 * (direction[k] + 0.3 * x) for k, x in before.items()}
        for k in g:
            np.testing.assert_allclose(record["params"][k], before[k])


def test_adazo_sam_without_rho_is_adam_and_skips_what_is_not_finite():
    target = random(3)

    def grad(params, t):
        return {"x": params["x"] - target + (np.inf if t == 1 else 0.0)}

    history = adazo_sam.run(
        {"x": np.zeros(3)},
        no_loss,
        grad,
        steps=3,
        rho=0.0,
        mu=1e-3,
        num_probes=1,
        probes=None,
        estimator="jvp",
        learning_rate=0.1,
    )
    assert [record["inner"]["count"] for record in history] == [1, 1, 2]
    np.testing.assert_array_equal(history[1]["params"]["x"], history[0]["params"]["x"])
    np.testing.assert_allclose(history[0]["params"]["x"], 0.1 * np.sign(target), rtol=1e-6)


def test_fira_limits_the_growth_of_the_residual():
    """Grown 100-fold, phi |G_perp| follows |N| and would be 1.41 times the first; 1.01 are left."""
    g = random(3, 4)

    def grad(params, t):
        return {"w": g * (1.0, 100.0)[t]}

    runs = [
        run_lorenza({"w": np.zeros((3, 4))}, no_loss, grad, steps=2, residual=name, b1=0.0)
        for name in ("fira", None)
    ]
    added = [fira["params"]["w"] - plain["params"]["w"] for fira, plain in zip(*runs, strict=True)]
    ratio = np.linalg.norm(added[1] - added[0]) / np.linalg.norm(added[0])
    np.testing.assert_allclose(ratio, 1.01)
