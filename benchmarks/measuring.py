"""How a step is measured: its time in turns with others, its update against an independent one."""

import functools
import statistics
import time

import jax
import numpy as np

from benchmarks import programs
from lorenza_optax._ascent.directions import in_subspace
from lorenza_optax._ascent.gradient import PROBE, step_key
from lorenza_optax._factored.landscape import Subspaces


class Training:
    """One optimizer's training: its program, its arrays, its times."""

    def __init__(self, name, shape, compiled):
        self.compiled = compiled
        self.params = programs.init(shape)
        # Compiled, so that no two arrays of the state share a buffer and all can be donated.
        self.opt_state = jax.jit(programs.OPTIMIZERS[name].build(shape).init)(self.params)
        self.state_bytes = programs.tree_bytes(self.opt_state)
        self.refreshes, self.seconds, self.losses = [], [], []
        self.ours = programs.low_rank_state(self.opt_state) is not None

    def step(self, batch):
        started = time.perf_counter()
        self.params, self.opt_state, loss = self.compiled(self.params, self.opt_state, batch)
        jax.block_until_ready((self.params, self.opt_state))
        seconds = time.perf_counter() - started
        self.losses.append(float(loss))
        return seconds

    @property
    def last_refresh(self):
        return int(programs.low_rank_state(self.opt_state).last_refresh) if self.ours else 0

    def warm_up(self, batches):
        """The updates that refresh, which come first, and one more; says how many."""
        for count, batch in enumerate(batches):
            seconds = self.step(batch)
            if self.last_refresh < 0:
                raise RuntimeError(f"update {count} should have refreshed; losses {self.losses}")
            if self.last_refresh < count:
                return count + 1
            self.refreshes.append(seconds)
        raise RuntimeError(f"the first {len(batches)} updates all refresh")

    def result(self):
        return {
            "temporary_bytes": programs.temporary_bytes(self.compiled),
            "optimizer_state_bytes": self.state_bytes,
            # The first call is slow by itself. LORENZA's first three refresh, GaLore's first.
            "refresh_seconds": min(self.refreshes[1:] or self.refreshes),
            "seconds": self.seconds,
            "min_seconds": min(self.seconds),
            "median_seconds": statistics.median(self.seconds),
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
        }


def race(shape, names, rounds, text, note):
    """Trains with each optimizer, a step of each in turn: {name: its costs}."""
    batches = [jax.device_put(text.batch(shape, step)) for step in range(rounds + 6)]
    note(f"  compiling {len(names)} programs")
    compiled = programs.compile_steps(map(programs.Variant, names), shape, batches[0])
    runners = {name: Training(name, shape, compiled[programs.Variant(name)]) for name in names}
    for name, runner in runners.items():
        note(f"  {name}: first updates")
        runner.warm_up(batches[:6])
    note(f"  {rounds} rounds")
    refreshed = {name: runner.last_refresh for name, runner in runners.items()}
    for turn in range(rounds):
        # Another one begins each time: what runs after a large step finds other caches.
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            runners[name].seconds.append(runners[name].step(batches[6 + turn]))
    for name, runner in runners.items():
        if runner.last_refresh != refreshed[name]:
            raise RuntimeError(f"{name} has refreshed in a step that was timed")
        arguments = programs.OPTIMIZERS[name].arguments
        if arguments is not None and arguments.get("rho") != 0:
            found = programs.low_rank_state(runner.opt_state).ascent
            if not found.perturbed:
                raise RuntimeError(f"{name} has not perturbed in the step that was timed")
    results = {name: runner.result() for name, runner in runners.items()}
    weights = programs.tree_bytes(runners["adamw"].params)
    baseline = results["adamw"]
    for name in {"adamw", "sam"}.intersection(results):
        del results[name]["refresh_seconds"]
    for result in results.values():
        result["time_ratio"] = ratio(result, baseline)
        extra = result["temporary_bytes"] - baseline["temporary_bytes"]
        result["extra_copies"] = extra / weights
    return {"shape": shape._asdict(), "weights_bytes": weights, "optimizers": results}


def ratio(result, baseline):
    """The median over rounds of a ratio of times: both steps of a round met the same noise."""
    pairs = zip(result["seconds"], baseline["seconds"], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def error_of_update(name, shape, text, compiled):
    """(relative error of an update without a refresh, share that the perturbation has in it).

    `compiled` is the step that is timed, at this shape. What it is held against takes from it
    the state before the update and the probes' random numbers, and nothing else: full gradients
    by `jax.grad` at plainly perturbed weights, the rest in NumPy and float64.
    """
    batches = [text.batch(shape, step) for step in range(7)]
    training = Training(name, shape, compiled)
    batch = batches[training.warm_up(batches[:6])]
    before = jax.device_get((training.params, training.opt_state))
    training.step(batch)
    arguments = {"ascent": "zo", "rho": programs.RHO, "num_probes": 1}
    arguments |= programs.OPTIMIZERS[name].arguments
    expected = _independent_update(arguments, shape, *before, batch)
    old, new = _flat(before[0]), _flat(training.params)
    unperturbed = _independent_update(arguments | {"rho": 0}, shape, *before, batch)
    error = _distance({path: new[path] - old[path] for path in old}, expected)
    return error, _distance(unperturbed, expected)


def _distance(update, expected):
    return float(_norm({path: update[path] - u for path, u in expected.items()}) / _norm(expected))


def _independent_update(arguments, shape, params, opt_state, batch):
    weights, state = _flat(params), programs.low_rank_state(opt_state)

    def gradient(at):
        leaves = [at[path].astype(np.float32) for path in weights]
        tree = jax.tree.unflatten(jax.tree.structure(params), leaves)
        return _flat(_gradient(shape)(tree, batch))

    q, r = _flat(state.q), _flat(state.r)
    mu, nu, others_mu, others_nu = (
        _flat(tree)
        for tree in (state.projected.mu, state.projected.nu, state.others.mu, state.others.nu)
    )
    # The shorter side is compressed, of a square the rows.
    left = {path: weights[path].shape[-2] <= weights[path].shape[-1] for path in mu}

    def project(path, g):
        return q[path].mT @ g if left[path] else r[path] @ g.mT

    def lift(path, low):
        return q[path] @ low if left[path] else low.mT @ r[path]

    def direction():
        kind = arguments["ascent"]
        if kind == "subspace":
            g = gradient(weights)
            return {p: lift(p, project(p, g[p])) if p in mu else g[p] for p in weights}
        if kind in ("momentum", "signed_momentum"):
            moment = {p: lift(p, mu[p]) for p in mu} | others_mu
            signed = kind == "signed_momentum"
            uphill = not signed or _dot(gradient(weights), moment) >= 0
            return {p: m if uphill else -m for p, m in moment.items()}
        g, count = gradient(weights), arguments["num_probes"]
        # Only shapes of the factors are read here.
        rows = {p: state.r[p] if left[p] else state.q[p].mT for p in mu}
        key = step_key(state.ascent.seed, state.count, PROBE)
        drawn = _flat(in_subspace(Subspaces({}, {}), rows).draw(key, count).weights)
        total = dict.fromkeys(mu, 0.0)
        for j in range(count):
            probe = {p: (q[p] * drawn[p][j][..., None, :]) @ r[p] for p in mu}
            slope = _dot(g, probe)
            total = {p: total[p] + slope * probe[p] for p in mu}
        return total

    point = weights
    if arguments["rho"]:
        found = direction()
        length = arguments["rho"] / _norm(found)
        point = {p: w + length * found[p] if p in found else w for p, w in weights.items()}
    g, updates = gradient(point), {}
    for path, w in weights.items():
        if path in mu:
            step = _adam(project(path, g[path]), mu[path], nu[path], state.projected.count)
            step = lift(path, step)
        else:
            step = _adam(g[path], others_mu[path], others_nu[path], state.others.count)
        decay = programs.optimizers.WEIGHT_DECAY
        updates[path] = -programs.LEARNING_RATE * (step + decay * w)
    return updates


def _adam(g, mu, nu, count, b1=0.9, b2=0.999, eps=1e-8):
    mu, nu, count = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g, int(count) + 1
    return mu / (1 - b1**count) / (np.sqrt(nu / (1 - b2**count)) + eps)


@functools.cache
def _gradient(shape):
    return jax.jit(jax.grad(programs.loss_of(shape)))


def _flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def _dot(a, b):
    return sum(np.sum(a[path] * b[path]) for path in b)


def _norm(tree):
    return np.sqrt(_dot(tree, tree))
