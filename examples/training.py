"""One optimizer's run on a problem: the loop, its metrics file, its checkpoints, its interruption.

A run lives in its own folder: `metrics.jsonl` (one line a step), `checkpoints/` (Orbax, the two
latest) and, once finished, `result.json`. A resumed run continues from the latest checkpoint with
the same bits as an uninterrupted one: the batch is a function of (seed, step), everything else is
in the checkpoint. (On a GPU, XLA itself repeats its bits only with
XLA_FLAGS=--xla_gpu_deterministic_ops=true.)
"""

import functools
import json
import math
import pathlib
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import optimizers

# What stands in each line of the metrics file; the other values are those of an evaluation.
OF_EVERY_STEP = ("step", "loss", "learning_rate", "seconds", "tokens_per_second", "diagnostics")


class Problem(NamedTuple):
    """What all optimizers of a comparison have in common."""

    loss: Callable  # (params, batch) -> scalar
    abstract_params: Any  # the shapes of what `init` gives
    init: Callable  # () -> params: fresh arrays, a training step overwrites them
    batch_at: Callable  # step, from 0 -> batch
    evaluate: Callable  # params -> a dict of numbers, validation_loss among them
    tokens_per_step: int
    settings: optimizers.Settings
    steps: int
    eval_every: int
    checkpoint_every: int
    # Like `evaluate`, but for what is measured after the last step only.
    score: Callable = lambda params: {}


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself after `step` steps."""

    def __init__(self, step):
        super().__init__(step)
        self.step = step


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; a second one stops at once."""

    def __init__(self):
        self.received = False

    def __enter__(self):
        def handle(number, frame):
            del number, frame
            self.received = True
            self._restore()

        self._previous = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception):
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def train_step(entry, tx, loss, params, opt_state, batch):
    value, updates, opt_state = entry.call(tx, loss, params, opt_state, batch)
    return optax.apply_updates(params, updates), opt_state, value


def _logged_step(entry, tx, loss, params, opt_state, batch):
    params, opt_state, value = train_step(entry, tx, loss, params, opt_state, batch)
    return params, opt_state, value, optimizers.diagnostics(opt_state)


def train(name, learning_rate, problem, folder, display):
    """Trains with one optimizer, from its latest checkpoint if there is one.

    Args:
      name: a key of `optimizers.OPTIMIZERS`.
      learning_rate: the peak of the schedule.
      problem: what the optimizers have in common.
      folder: this optimizer's folder.
      display: told of every step, see `reporting.Display`.

    Returns:
      The result that is stored as `result.json`.

    Raises:
      Interrupted: after SIGINT or SIGTERM, with everything saved.
    """
    folder = pathlib.Path(folder)
    result_path = folder / "result.json"
    if result_path.exists():
        display.note(f"{name}: finished earlier, not run again")
        return json.loads(result_path.read_text())
    folder.mkdir(parents=True, exist_ok=True)

    entry = optimizers.OPTIMIZERS[name]
    schedule = optimizers.learning_rate_schedule(learning_rate, problem.steps)
    tx = entry.build(schedule, problem.settings)

    with StopRequest() as stop, _checkpoints(folder) as manager:
        done, params, opt_state = _initial_or_restored(manager, problem, tx)
        metrics = _metrics_up_to(folder / "metrics.jsonl", done)

        display.start(name, problem.steps, done)
        # Compiled ahead, so that the program that runs is the one whose memory is reported.
        compiled = (
            jax.jit(functools.partial(_logged_step, entry, tx, problem.loss), donate_argnums=(0, 1))
            .lower(params, opt_state, problem.batch_at(0))
            .compile()
        )
        saved = done
        with (folder / "metrics.jsonl").open("a", buffering=1) as file:
            while done < problem.steps and not stop.received:
                started = time.perf_counter()
                params, opt_state, value, scalars = compiled(
                    params, opt_state, problem.batch_at(done)
                )
                value = float(value)  # waits for the step
                seconds = time.perf_counter() - started
                line = {
                    "step": done + 1,
                    "loss": _finite(value),
                    "learning_rate": float(schedule(done)),
                    "seconds": seconds,
                    "tokens_per_second": problem.tokens_per_step / seconds,
                }
                if scalars:
                    line["diagnostics"] = {k: _finite(float(v)) for k, v in scalars.items()}
                done += 1
                if done % problem.eval_every == 0 or done == problem.steps:
                    line |= _finite_values(problem.evaluate(params))
                metrics.append(line)
                file.write(json.dumps(line) + "\n")
                display.step(line)
                if done % problem.checkpoint_every == 0:
                    saved = _save(manager, done, params, opt_state)
        if saved != done or manager.latest_step() is None:
            _save(manager, done, params, opt_state)
        display.stop()
        if done < problem.steps:
            raise Interrupted(done)

    seconds = [line["seconds"] for line in metrics]
    seconds = seconds[1:] or seconds
    memory = compiled.memory_analysis()
    result = {
        "optimizer": name,
        "learning_rate": learning_rate,
        "steps": problem.steps,
        **{key: value for key, value in metrics[-1].items() if key not in OF_EVERY_STEP},
        **_finite_values(problem.score(params)),
        "train_loss": metrics[-1]["loss"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "optimizer_state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state)),
        # Some backends do not say.
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        # The median is a usual step; the mean has the subspace refreshes in it.
        "seconds_per_step": statistics.median(seconds),
        "mean_seconds_per_step": statistics.fmean(seconds),
    }
    result_path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _finite(value):
    """JSON has no word for a diverged loss."""
    return value if math.isfinite(value) else None


def _finite_values(values):
    return {name: _finite(value) for name, value in values.items()}


def _checkpoints(folder):
    # Not asynchronous: the next step overwrites (donates) the arrays that are being saved.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def _storable(tree):
    """The leaves by number. Orbax refuses empty arrays, which optax.contrib.galore's state has."""
    leaves = jax.tree.leaves(tree)
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves) if leaf.size}


def _restored(tree, stored):
    leaves, structure = jax.tree.flatten(tree)
    for i, leaf in enumerate(leaves):
        leaves[i] = stored[f"{i:05d}"] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)
    return jax.tree.unflatten(structure, leaves)


def _save(manager, step, params, opt_state):
    state = {"params": _storable(params), "opt_state": _storable(opt_state)}
    manager.save(step, args=ocp.args.StandardSave(state), force=True)
    manager.wait_until_finished()
    return step


def _initial_or_restored(manager, problem, tx):
    """(steps done, params, opt_state)."""
    latest = manager.latest_step()
    if latest is None:
        params = problem.init()
        return 0, params, jax.jit(tx.init)(params)
    # Shapes are enough to restore into: the arrays are in memory once.
    params = problem.abstract_params
    opt_state = jax.eval_shape(tx.init, params)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        {"params": _storable(params), "opt_state": _storable(opt_state)},
    )
    stored = manager.restore(latest, args=ocp.args.StandardRestore(target))
    params = _restored(params, stored["params"])
    return latest, params, _restored(opt_state, stored["opt_state"])


def _metrics_up_to(path, step):
    """The lines of the steps that the checkpoint holds; later ones are dropped from the file."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break  # the last line of a killed process
            if line["step"] <= step:
                lines.append(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines
