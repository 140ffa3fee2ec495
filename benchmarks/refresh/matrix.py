"""Sections A and B: new factors of one matrix, their time and what they capture."""

import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import rich.progress

import llama
import lorenza_optax
from benchmarks import programs
from benchmarks.bars import Bar
from lorenza_optax._linalg.decompositions import randomized_svds

GAP = 200
# Of AdamW, before the gradient is taken. With larger steps one direction holds nearly all of its
# energy (0.9 at 1e-3), and any decomposition finds that.
STEPS, LEARNING_RATE = 10, 2e-4
SPECTRA = {"i^(-1/2)": -0.5, "i^(-1)": -1.0}
POWER_ITERATIONS = (0, 1, 2)
EXACT = "exact SVD"
LORENZA, GALORE, ADAM = "scale_by_lorenza", "scale_by_galore", "scale_by_adam"
REFRESH, PLAIN = ", refresh", ", no refresh"
BARE = "randomized SVD alone"


class Matrix(NamedTuple):
    rows: int
    columns: int
    rank: int


def gradients(matrix, text):
    """A weight of a Llama of one layer, its first gradient and that after some steps of AdamW.

    It stands behind attention: before, a model of bytes has no more than 256 different rows, and
    a gradient of no higher rank.
    """
    config = llama.LlamaConfig(
        hidden_size=matrix.rows,
        intermediate_size=matrix.columns,
        num_layers=1,
        num_heads=max(1, matrix.rows // 64),
    )
    shape = programs.Shape(matrix.rows, 1, batch=8, length=128, rank=matrix.rank)
    params, tx = llama.init(config, 0), optax.adamw(LEARNING_RATE)
    gradient = jax.jit(jax.grad(llama.loss_of(config)))

    def picked(tree):
        found = dict(jax.tree_util.tree_leaves_with_path(tree))
        (leaf,) = (x for path, x in found.items() if "up" in jax.tree_util.keystr(path))
        assert leaf.shape == matrix[:2], leaf.shape
        return leaf

    state, update = tx.init(params), jax.jit(tx.update)
    found = []
    for step in range(STEPS + 1):
        tree = gradient(params, text.batch(shape, step))
        found.append(picked(tree))
        weight = picked(params)
        updates, state = update(tree, state, params)
        params = optax.apply_updates(params, updates)
    return weight, found[0], found[-1]


def share(basis, matrix):
    """The share of ‖G‖² in the span of the columns of ([m, r]), in float64."""
    basis, matrix = (np.asarray(x, np.float64) for x in (basis, matrix))
    return float(np.sum((basis.T @ matrix) ** 2) / np.sum(matrix**2))


def best_share(matrix, rank):
    """The same of the leading singular vectors; squares of singular values from G Gᵀ."""
    matrix = np.asarray(matrix, np.float64)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares = np.linalg.eigvalsh(matrix @ matrix.T)
    return float(np.sum(squares[-rank:]) / np.sum(squares))


def timed(rounds, calls, console):
    """{name: {seconds of each round, their median}}: one call of each, in turns."""
    calls = {name: (jax.jit(f).lower(*args).compile(), args) for name, (f, *args) in calls.items()}
    results = {name: {"seconds": []} for name in calls}
    for turn in rich.progress.track(range(-1, rounds), "  rounds", console=console):
        for name, (compiled, args) in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            if turn >= 0:  # the first call of a program is slow by itself
                results[name]["seconds"].append(time.perf_counter() - started)
    for name, result in results.items():
        result["min_seconds"] = min(result["seconds"])
        result["median_seconds"] = statistics.median(result["seconds"])
        result["temporary_bytes"] = programs.temporary_bytes(calls[name][0])
    return results


def one_matrix(matrix, arguments, text, console):
    """A: an update in which a refresh is due, beside optax.contrib.galore's."""
    console.print(f"  training for {STEPS} steps, for a gradient")
    weight, earlier, gradient = gradients(matrix, text)
    params, due = {"kernel": weight}, {REFRESH: GAP, PLAIN: 1}
    transformations = {
        LORENZA: lorenza_optax.scale_by_lorenza(matrix.rank, GAP),
        GALORE: optax.contrib.scale_by_galore(matrix.rank, GAP),
    }
    calls, states = {}, {}
    for name, tx in transformations.items():
        # The state holds the subspace of an earlier gradient, so that a new one is another.
        _, state = jax.jit(tx.update)({"kernel": earlier}, tx.init(params), params)
        for kind, count in due.items():
            states[name + kind] = state._replace(count=jnp.asarray(count, jnp.int32))
            calls[name + kind] = (tx.update, {"kernel": gradient}, states[name + kind], params)
    adam = optax.scale_by_adam()
    calls[ADAM] = (adam.update, {"kernel": gradient}, adam.init(params))
    key = jax.random.key(0)
    calls[BARE] = (lambda g: randomized_svds([g], matrix.rank, key), gradient)
    results = timed(arguments.rounds, calls, console)

    best = best_share(gradient, matrix.rank)
    new = {name: jax.jit(call[0])(*call[1:]) for name, call in calls.items() if name in states}
    checks = _checks(matrix, gradient, best, states, new, results)
    times = {name: result["median_seconds"] for name, result in results.items()}
    ratio = times[GALORE + REFRESH] / times[LORENZA + REFRESH]
    bar = Bar("A", "a refresh: galore's time / lorenza's", ratio, ">=", 15)
    found = {"matrix": matrix._asdict(), "best_share": best, "programs": results}
    return found, [bar], checks


def _checks(matrix, gradient, best, states, new, results):
    """What is timed refreshes where it should, to what it should; adds the energy to results."""
    checks = []
    for name, (_, state) in new.items():
        ours = name.startswith(LORENZA)
        # The smaller side of the matrix is lorenza's, the larger one galore's.
        projector = state.q["kernel"] if ours else state.projector["kernel"]
        old = states[name].q["kernel"] if ours else states[name].projector["kernel"]
        results[name]["share_of_best"] = share(projector, gradient if ours else gradient.T) / best
        moved = float(jnp.linalg.norm(projector - old))
        if name.endswith(PLAIN):
            checks.append(Bar("A", f"{name}: change of the subspace", moved, "<=", 0))
            continue
        # Turned by so much that another gradient's subspace is told from its own.
        checks.append(Bar("A", f"{name}: change of the subspace", moved, ">=", 0.1))
        gained = results[name]["share_of_best"]
        checks.append(Bar("A", f"{name}: energy / the exact SVD's", gained, ">=", 0.95))
    _, state = new[LORENZA + REFRESH]
    checks.append(Bar("A", "lorenza: last_refresh", int(state.last_refresh), ">=", GAP))
    for factor in (state.q["kernel"], state.r["kernel"].T):
        wrong = float(jnp.max(jnp.abs(factor.T @ factor - jnp.eye(matrix.rank))))
        checks.append(Bar("A", "lorenza: Q and R orthonormal, error", wrong, "<=", 1e-4))
    checks.append(
        Bar("A", "lorenza: error of the update", _error(gradient, states, new), "<=", 1e-3)
    )
    return checks


def _error(gradient, states, new):
    """Of the update with a refresh, against NumPy: only Q is taken from it."""
    updates, state = new[LORENZA + REFRESH]
    before = states[LORENZA + REFRESH].projected
    q, g, mu, nu = (
        np.asarray(x, np.float64)
        for x in (state.q["kernel"], gradient, before.mu["kernel"], before.nu["kernel"])
    )
    low, count = q.T @ g, int(before.count) + 1
    mu, nu = 0.9 * mu + 0.1 * low, 0.999 * nu + 0.001 * low**2
    expected = q @ (mu / (1 - 0.9**count) / (np.sqrt(nu / (1 - 0.999**count)) + 1e-8))
    return float(np.linalg.norm(updates["kernel"] - expected) / np.linalg.norm(expected))


def captured(matrix, arguments, text, console):
    """B: the share of the best energy that is found, by spectrum and power iterations."""
    del text
    rng, rows, bars, checks = np.random.default_rng(0), [], [], []
    size = min(matrix[:2])
    left, right = (np.linalg.qr(rng.standard_normal((length, size)))[0] for length in matrix[:2])
    for spectrum, power in SPECTRA.items():
        values = np.arange(1, size + 1) ** power
        best = np.sum(values[: matrix.rank] ** 2) / np.sum(values**2)
        made = jnp.asarray((left * values) @ right.T, jnp.float32)
        programs_by_name = {
            count: lambda g, key, count=count: lorenza_optax.randomized_svd(
                g, matrix.rank, key, power_iterations=count
            )
            for count in POWER_ITERATIONS
        }
        calls = {c: (f, made, jax.random.key(0)) for c, f in programs_by_name.items()}
        results = timed(arguments.rounds, calls, console)
        for count, function in programs_by_name.items():
            shares = [
                share(jax.jit(function)(made, jax.random.key(seed))[0], made) / best
                for seed in range(3)
            ]
            checks.append(Bar("B", f"{spectrum}, {count}: share", max(shares), "<=", 1 + 1e-4))
            row = {"spectrum": spectrum, "power_iterations": count, "best_share": float(best)}
            rows.append(row | {"share_of_best": min(shares), **results[count]})
        bars.append(Bar("B", f"{spectrum}, 2 power iterations: energy / the exact SVD's",
                        rows[-1]["share_of_best"], ">=", 0.985))  # fmt: skip
    return {"matrix": matrix._asdict(), "rows": rows}, bars, checks
