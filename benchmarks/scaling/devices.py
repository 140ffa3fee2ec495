"""What devices send each other in a step, from the programs that XLA makes for several.

It takes a process of its own, child.py, which pretends to have so many devices.
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys

import jax

import lorenza_optax
from benchmarks import experiments, programs

PLACEMENTS = ("replicated", "fsdp")  # of parameters and state; the batch is always split


def in_child(cell):
    """The result of `measure` in a process that has the cell's number of devices."""
    flags = (
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={cell['devices']}",
        "--xla_backend_optimization_level=0",  # of LLVM's: what is sent has been settled before
    )
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling.child", json.dumps(cell)],
        cwd=experiments.ROOT.parent,
        env={**os.environ, "XLA_FLAGS": " ".join(flags).strip(), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


def measure(cell):
    shape = programs.Shape(*cell["shape"])
    if jax.device_count() != cell["devices"]:
        raise RuntimeError(f"{jax.device_count()} devices, not {cell['devices']}")
    mesh = jax.make_mesh((cell["devices"],), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = jax.eval_shape(lambda: programs.init(shape))
    plan = lorenza_optax.projection_plan(params, shape.rank)
    low = sum(math.prod(leaf.low_rank_shape) for leaf in plan.projected.values())
    others = sum(math.prod(leaf.shape) for leaf in plan.others.values())
    found = {}
    for name in cell["names"]:
        ours = programs.OPTIMIZERS[name].arguments is not None
        sent = {"step": collectives(name, shape, mesh, cell["placement"], refresh=not ours)}
        if ours:
            sent["refresh_step"] = collectives(name, shape, mesh, cell["placement"], refresh=True)
        found[name] = sent
    return {
        "weights_bytes": programs.tree_bytes(params),
        "low_rank_gradient_bytes": 4 * (low + others),
        "optimizers": found,
    }


@contextlib.contextmanager
def _always_refreshing():
    with programs.mock.patch(
        "lorenza_optax._low_rank.in_update.is_due", lambda *_: jax.numpy.ones((), bool)
    ):
        yield


def collectives(name, shape, mesh, placement, refresh):
    """{kind: [how many, bytes of their results on a device]} of a step of one kind only."""
    entry = programs.OPTIMIZERS[name]
    tx, loss = entry.build(shape), programs.loss_of(shape)
    params = jax.eval_shape(lambda: programs.init(shape))
    everywhere = jax.NamedSharding(mesh, jax.P())
    if placement == "fsdp":
        placed = jax.tree.map(lambda leaf: fully_sharded(leaf, mesh), params)
        state = lorenza_optax.state_shardings(tx, params, placed)
    else:
        placed = state = everywhere
    batch = jax.ShapeDtypeStruct((shape.batch, shape.length + 1), "int32")

    def step(params, opt_state, batch):
        value, updates, opt_state = entry.call(tx, loss, params, opt_state, batch)
        return entry.apply_updates(params, updates), opt_state, value

    with _always_refreshing() if refresh else programs.without_refresh():
        compiled = (
            jax.jit(
                step,
                donate_argnums=(0, 1),
                in_shardings=(placed, state, jax.NamedSharding(mesh, jax.P("data"))),
                out_shardings=(placed, state, everywhere),
            )
            .lower(params, jax.eval_shape(tx.init, params), batch)
            .compile()
        )
    ours = entry.arguments is not None
    if ours and bool(programs.refresh_in(compiled)) != refresh:
        raise RuntimeError(f"{name}: a refresh is where it should not be, or the other way about")
    return parse(compiled.as_text())


def fully_sharded(leaf, mesh):
    """Over all devices along the largest dimension, the first of equals."""
    spec = [None] * leaf.ndim
    spec[leaf.shape.index(max(leaf.shape))] = "data"
    return jax.NamedSharding(mesh, jax.P(*spec))


_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def parse(text):
    """{kind: [how many, bytes of their results]} of one run of a program.

    A loop counts as often as XLA knows it to run, a conditional as its branch that sends most.
    """
    bodies = {}
    for part in re.split(r"^(?=\S)", text, flags=re.M):
        if head := re.match(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$", part, re.M):
            bodies[head["name"]] = part.splitlines()[1:]
            if head["entry"]:
                entry = head["name"]
    return _sent(entry, bodies, {})


def _sent(name, bodies, known):
    if name not in known:
        known[name] = {}
        for line in bodies[name]:
            if match := programs.INSTRUCTION.match(line):
                if match["stage"] != "-start":
                    size = programs.collective_bytes(line)
                    _add(known[name], {match["kind"]: [1, size[match["kind"]]]})
                continue
            called = _CALLED.findall(line)
            if branches := _BRANCHES.search(line):
                called += re.findall(r"[\w.-]+", branches[1])
            inside = [_sent(one, bodies, known) for one in called]
            inside = [found for found in inside if found]
            if not inside:
                continue
            if " while(" in line:
                trips = _TRIPS.search(line)
                if trips is None:
                    raise RuntimeError(f"a loop of unknown length sends: {line.strip()[:200]}")
                _add(known[name], inside[0], int(trips[1]))
            else:
                _add(known[name], max(inside, key=lambda f: sum(size for _, size in f.values())))
    return known[name]


def _add(total, found, times=1):
    for kind, (count, size) in found.items():
        before = total.get(kind, [0, 0])
        total[kind] = [before[0] + times * count, before[1] + times * size]


def sent_bytes(collectives, devices, scattered=False):
    """What one device sends in a step, if rings carry out the collectives.

    With `scattered`, as if each all-reduce left every device its part only.
    """
    n = devices
    shares = {
        "all-reduce": (1 if scattered else 2) * (n - 1) / n,
        "all-gather": (n - 1) / n,
        "reduce-scatter": n - 1,  # its result is the n-th part of what is reduced
        "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }
    return sum(shares[kind] * size for kind, (_, size) in collectives.items())
