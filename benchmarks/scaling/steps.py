"""What can be counted of a step, and its time in turns with others."""

import functools
import re
import time

import jax
import jax.numpy as jnp
import optax.contrib

import lorenza_optax
from benchmarks import measuring, programs
from benchmarks.programs import Shape
from benchmarks.scaling import devices

PROBES = {count: f"zo, q={count}" for count in (1, 2, 4, 8, 16)}
# Beside the optimizers of step_cost.py, which runs all that it finds there and not this file.
programs.OPTIMIZERS |= {
    name: programs.lorenza(num_probes=count)
    for count, name in PROBES.items()
    if name not in programs.OPTIMIZERS
}

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = ", re.M)


def run(cell, display, needed):
    del needed
    shape = Shape(*cell["shape"])
    if cell["kind"] == "devices":
        return devices.in_child(cell)
    if cell["kind"] == "flops":
        return flops(cell["names"], shape, _text().batch(shape, 0))
    if cell["kind"] == "compile":
        return program(cell["optimizer"], shape, _text().batch(shape, 0))
    done = iter(range(10**6))

    def note(text):
        total = 1 + len(cell["names"]) + cell["rounds"]
        display.step(next(done), total, text)

    rounds = cell["rounds"], cell["refresh_rounds"]
    return {
        "optimizers": race(shape, cell["names"], *rounds, _text(), note),
    }


@functools.cache
def _text():
    return programs.Text()


def refreshes_inside(name):
    """Whether its refresh is a branch that `programs.without_refresh` can leave out."""
    return programs.OPTIMIZERS[name].arguments is not None


def step_flops(name, shape, batch, refresh):
    """FLOPs of a step, as lowered.

    XLA takes of a conditional's branches the one with more: a whole program's FLOPs are those of
    a step that refreshes. It counts nothing for calls of LAPACK, which decompose.
    """
    lowered = programs.lower(programs.Variant(name, refresh), shape, batch, None)
    return lowered.cost_analysis()["flops"]


def flops(names, shape, batch):
    """{name: of a step, and of one that refreshes}; of GaLore's the decomposition is left out."""
    return {
        name: {
            "step": step_flops(name, shape, batch, not refreshes_inside(name)),
            "refresh_step": step_flops(name, shape, batch, True)
            if refreshes_inside(name) else None,
        }
        for name in names
    }  # fmt: skip


def program(name, shape, batch):
    """The size of a whole step's program, and the CPU seconds to make it.

    Of all threads of this process: others hold these up less than they do a clock's.
    """
    started = time.process_time()
    lowered = programs.lower(programs.Variant(name), shape, batch, None)
    traced = time.process_time()
    compiled = lowered.compile()
    finished = time.process_time()
    count = len(INSTRUCTION.findall(compiled.as_text()))
    return {
        "instructions": count,
        "temporary_bytes": programs.temporary_bytes(compiled),
        "trace_seconds": round(traced - started, 3),
        "compile_seconds": round(finished - traced, 3),
        "summary": f"{count} instructions, {finished - started:.1f} CPU seconds",
    }


def make_due(opt_state):
    """The state, so that the next update refreshes; None if it never does."""

    def is_ours(node):
        return isinstance(node, lorenza_optax.LowRankState | optax.contrib.GaLoreState)

    def due(node):
        if isinstance(node, lorenza_optax.LowRankState):
            # Not as if there had been none yet: then the step would not perturb.
            interval = programs.NO_REFRESH
            return node._replace(count=(node.last_refresh // interval + 1) * interval)
        if is_ours(node):
            return node._replace(count=jnp.zeros_like(node.count))
        return node

    if not any(map(is_ours, jax.tree.leaves(opt_state, is_leaf=is_ours))):
        return None
    return jax.tree.map(due, opt_state, is_leaf=is_ours)


def race(shape, names, rounds, refresh_rounds, text, note):
    """Trains with each optimizer, a step of each in turn: {name: seconds of its steps}.

    In the last `refresh_rounds` each makes, after its step, another one that refreshes.
    """
    batches = [jax.device_put(text.batch(shape, step)) for step in range(7)]
    note(f"compiling {len(names)} programs")
    compiled = programs.compile_steps(map(programs.Variant, names), shape, batches[0])
    runners = {name: measuring.Training(name, shape, compiled[programs.Variant(name)])
               for name in names}  # fmt: skip
    for name, runner in runners.items():
        note(f"{name}: first updates")
        runner.warm_up(batches[:6])
    with_refresh = {name: [] for name in names}
    for turn in range(rounds):
        note(f"round {turn + 1} of {rounds}")
        # Another one begins each time: what runs after a large step finds other caches.
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            runner, before = runners[name], runners[name].last_refresh
            runner.seconds.append(runner.step(batches[6]))
            if runner.last_refresh != before:
                raise RuntimeError(f"{name} has refreshed in a step that was timed without")
            if turn < rounds - refresh_rounds:
                continue
            if (due := make_due(runner.opt_state)) is not None:
                runner.opt_state = due
                with_refresh[name].append(runner.step(batches[6]))
                if runner.ours and runner.last_refresh <= before:
                    raise RuntimeError(f"{name} has not refreshed, and should have")
    return {
        name: {
            "seconds": [round(s, 6) for s in runner.seconds],
            "refresh_step_seconds": [round(s, 6) for s in with_refresh[name]],
            "optimizer_state_bytes": runner.state_bytes,
            "perturbed": _perturbed(runner),
        }
        for name, runner in runners.items()
    }


def _perturbed(runner):
    state = programs.low_rank_state(runner.opt_state)
    return None if state is None else bool(getattr(state.ascent, "perturbed", False))
