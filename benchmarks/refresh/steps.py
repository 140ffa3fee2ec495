"""Section C: a deep unrolled model, compiled and then trained over refreshes."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

import lorenza_optax
import optimizers
from benchmarks import programs
from benchmarks.bars import Bar

OWN, STAGGERED = "zo, q=1", "zo, q=1, stagger"
SKETCH = "zo, q=1, sketch"
STEPPED = ("adamw", "galore", OWN, SKETCH, STAGGERED)
RUNS = 2  # of the same steps


def _other(name, gap):
    entry = optimizers.OPTIMIZERS[name]

    def build(shape):
        settings = optimizers.Settings(shape.rank, gap, programs.RHO, 0)
        return entry.build(programs.LEARNING_RATE, settings)

    return programs.Optimizer(build, entry.call)


def _lorenza(gap, **arguments):
    def build(shape):
        return lorenza_optax.lorenza(
            programs.LEARNING_RATE,
            shape.rank,
            gap,
            weight_decay=optimizers.WEIGHT_DECAY,
            **arguments,
        )

    return programs.Optimizer(build, optimizers.call_with_value_fn)


def entries(gap):
    return {
        "adamw": _other("adamw", gap),
        **{name: _other(f"optax_{name}", gap) for name in ("sam", "galore")},
        "rho=0": _lorenza(gap, rho=0.0),
        OWN: _lorenza(gap),  # all defaults
        "subspace": _lorenza(gap, ascent="subspace"),
        SKETCH: _lorenza(gap, refresh="sketch"),
        STAGGERED: _lorenza(gap, stagger=True),
    }


def deep_model(size, arguments, text, console):
    """C: the time to compile, and how much longer the slowest of many steps takes."""
    shape, gap, steps = size
    results = {name: {} for name in entries(gap)}
    compiled = {}
    for turn in range(arguments.compilations):
        for name, entry in entries(gap).items():
            program, seconds = _compile(entry, shape, text.batch(shape, 0))
            parts = "trace {trace:.1f} s, lower {lower:.1f} s, XLA {xla:.1f} s".format(**seconds)
            console.print(f"  compiled, {turn + 1} of {arguments.compilations}: {name}: {parts}")
            results[name].setdefault("compilations", []).append(seconds)
            if name in STEPPED:
                compiled[name] = program
            results[name]["temporary_bytes"] = programs.temporary_bytes(program)
    for result in results.values():
        parts = {
            f"{part}_seconds": min(seconds[part] for seconds in result["compilations"])
            for part in ("trace", "lower", "xla")
        }
        result |= parts | {"compile_seconds": sum(parts.values())}
        result["instructions"] = result["compilations"][-1]["instructions"]
    for result in results.values():
        for part in ("compile", "xla"):
            ratio = result[f"{part}_seconds"] / results["adamw"][f"{part}_seconds"]
            result[f"{part}_ratio"] = ratio

    checks = []
    for name in STEPPED:
        # One refresh of galore's, by full decompositions, takes longer than all other steps.
        updates, times = (gap, 1) if name == "galore" else (steps, RUNS)
        batches = [jax.device_put(text.batch(shape, step)) for step in range(updates + 1)]
        runs = []
        for run in range(times):
            label = f"  {name}, run {run + 1} of {times}"
            entry = entries(gap)[name]
            runs.append(_train(entry, shape, compiled[name], batches, label, console))
        results[name] |= _summary(runs)
        checks += _checks(name, runs, updates, gap)
        del compiled[name]
    own, staggered = results[OWN], results[STAGGERED]
    found = {"shape": shape._asdict(), "gap": gap, "steps": steps, "optimizers": results}
    return found, [
        Bar("C", "defaults: time to compile / AdamW's", own["compile_ratio"], "<=", 2),
        Bar("C", "staggered: slowest step / median", staggered["slowest_ratio"], "<=", 1.5),
    ], checks  # fmt: skip


def _compile(entry, shape, batch):
    """The whole step, compiled with nothing left over from before, and how long each part took."""
    tx, loss = entry.build(shape), programs.loss_of(shape)

    def step(params, opt_state, batch):
        value, updates, opt_state = entry.call(tx, loss, params, opt_state, batch)
        return entry.apply_updates(params, updates), opt_state, value

    params = jax.eval_shape(lambda: programs.init(shape))
    opt_state = jax.eval_shape(tx.init, params)
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, opt_state, batch)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    seconds = dict(zip(("trace", "lower", "xla"), np.diff(times).tolist(), strict=True))
    given, made = (program.as_text().count(" = ") for program in (lowered, compiled))
    return compiled, {**seconds, "instructions": {"lowered": given, "compiled": made}}


def _train(entry, shape, compiled, batches, description, console):
    """The seconds and the loss of each step, and which subspaces each has changed."""
    params = programs.init(shape)
    # Compiled, so that no two arrays of the state share a buffer and all can be donated.
    opt_state = jax.jit(entry.build(shape).init)(params)
    _, before = _changed(_factors(opt_state), _factors(opt_state))
    seconds, losses, changes = [], [], []
    for batch in rich.progress.track(batches, description, console=console, refresh_per_second=1):
        started = time.perf_counter()
        params, opt_state, loss = compiled(params, opt_state, batch)
        jax.block_until_ready((params, opt_state))
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
        changed, before = _changed(before, _factors(opt_state))
        changes.append(np.asarray(changed))
    return seconds, losses, np.stack(changes)


def _factors(opt_state):
    """The arrays that span the subspaces, one a leaf."""
    ours = programs.low_rank_state(opt_state)
    if ours is not None:
        return [ours.q.get(path, ours.r.get(path)) for path in sorted({*ours.q, *ours.r})]
    projectors = optax.tree.get(opt_state, "projector")
    return [leaf for leaf in jax.tree.leaves(projectors) if leaf.size]


@jax.jit
def _changed(old, new):
    """Which have changed, and a copy that outlives the donation of the state."""
    different = [jnp.any(a != b) for a, b in zip(old, new, strict=True)]
    return jnp.array(different, bool), jax.tree.map(jnp.copy, new)


def _summary(runs):
    """Of the steps after the first, which refreshes everything.

    Of each step the faster of its runs, which do the same work: a step that another process
    has held up would count as the slowest.
    """
    seconds = np.min([run[0] for run in runs], axis=0)[1:]
    median = statistics.median(seconds)
    return {
        "runs": [run[0] for run in runs],
        "median_seconds": median,
        "slowest_seconds": max(seconds),
        "slowest_step": int(np.argmax(seconds)) + 1,
        "slowest_ratio": max(seconds) / median,
        "slowest_ratio_of_runs": [max(run[0][1:]) / statistics.median(run[0][1:]) for run in runs],
        "first_loss": runs[0][1][0],
        "last_loss": runs[0][1][-1],
    }


def _checks(name, runs, steps, gap):
    tenth = max(1, steps // 10)
    learned = min(
        statistics.fmean(losses[:tenth]) - statistics.fmean(losses[-tenth:])
        for _, losses, _ in runs
    )
    checks = [Bar("C", f"{name}: the loss falls by", learned, ">=", 0.1)]
    changes = np.stack([changed for _, _, changed in runs])
    if changes.size:
        # Of each run and leaf, without the first update; from sketches the next two refresh too.
        times = np.sum(changes[:, 1:], axis=1) - (2 if name == SKETCH else 0)
        wrong = int(np.max(np.abs(times - steps // gap)))
        claim = f"{name}: refreshes of a leaf, off {steps // gap} by"
        checks.append(Bar("C", claim, wrong, "<=", 0))
    return checks
