"""What a zeroth-order step needs beside a forward pass: memory, time, time to compile.

    python -m benchmarks.zeroth_order_memory           # some minutes on two cores
    python -m benchmarks.zeroth_order_memory --quick --out FOLDER   # tiny sizes: does it run?

Of each method the whole step is compiled, with parameters and state donated and updates applied,
on the transformer of programs.py, its layers unrolled and scanned. Memory is XLA's plan of it
(``memory_analysis``), in copies of the weights beyond what the loss alone needs. All matrices are
projected, the embedding and the head too, as in the published code; by default the library leaves
out what is called "embedding". "in place" is ``factored_updates`` with
``lorenza_optax.apply_updates``. Writes benchmarks/results/zeroth_order_memory.json; exits with 1 if
a bar does not hold or a step is not what it should be.
"""

import functools
import json
import pathlib
import statistics
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

import lorenza_optax
import machine
from benchmarks import experiments, options, programs
from benchmarks.bars import Bar, bars_table, stored
from benchmarks.programs import Shape
from lorenza_optax import methods
from lorenza_optax._ascent.gradient import PROBE, step_key
from lorenza_optax._base.noise import Noise, plus_noise
from lorenza_optax._low_rank.random_subspace import opened
from lorenza_optax._low_rank.zeroth_order import _direction, _partners

VOCABULARY = 8192  # more than the bytes of the text: embedding and head are a part of most models
SIZES = {
    "unrolled": Shape(width=1024, layers=4, batch=2, length=128, rank=32),
    "scanned": Shape(width=1024, layers=8, batch=2, length=128, rank=32, scanned=True),
}
QUICK = {
    name: size._replace(width=128, layers=2, length=16, rank=4) for name, size in SIZES.items()
}
CHECKED = Shape(width=256, layers=2, batch=2, length=16, rank=4)  # drawn part by part
LOZO_RANK, RATE, MU = 2, 1e-6, 1e-3
LIMIT = 0.3  # copies of the weights
TOLERANCE = 2e-3  # of an update, relative: losses are differences in float32


def optimizers(shape, rate=RATE):
    """{name: (transformation, adds updates, whether the bar is for it)}."""
    matrix, stack = (lorenza_optax.WeightDimensionNumbers(*axes) for axes in ((0, 1), (1, 2)))
    numbers = matrix
    if shape.scanned:
        layers = programs.dimension_numbers(shape)["layers"]
        numbers = {"embedding": matrix, "head": matrix, "layers": dict.fromkeys(layers, stack)}
    made = {
        "MeZO": functools.partial(methods.mezo, rate),
        "LOZO": functools.partial(methods.lozo, rate, LOZO_RANK, weight_dimension_numbers=numbers),
        "LOZO-M": functools.partial(
            methods.lozo_m, rate, LOZO_RANK, weight_dimension_numbers=numbers
        ),
        "SubZero": functools.partial(
            methods.subzero, rate, shape.rank, weight_dimension_numbers=numbers
        ),
        "ZO-Muon": functools.partial(
            methods.zo_muon, rate, shape.rank, weight_dimension_numbers=numbers
        ),
    }
    found = {}
    for name, make in made.items():
        found[name] = (make(mu=MU), optax.apply_updates, name == "LOZO")
        in_place = make(mu=MU, factored_updates=True), lorenza_optax.apply_updates
        found[f"{name}, in place"] = (*in_place, name in ("LOZO", "SubZero"))
    return found


def compiled_step(tx, apply_updates, loss, params, batch):
    def step(params, state, batch):
        updates, state = tx.update(
            None, state, params, value_fn=lambda params, batch: loss(params, batch), batch=batch
        )
        return apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
    started = time.perf_counter()
    return lowered.compile(), time.perf_counter() - started, programs.tree_bytes(state)


def measured(shape, rounds, batch, note):
    """The costs of all optimizers on one model."""
    loss = programs.loss_of(shape)
    params = programs.init(shape)
    weights = programs.tree_bytes(params)
    forward = jax.jit(loss).lower(params, batch).compile()
    alone = programs.temporary_bytes(forward)
    results, bars, runs = {}, [], {}
    for name, (tx, apply_updates, promised) in optimizers(shape).items():
        program, seconds, state_bytes = compiled_step(tx, apply_updates, loss, params, batch)
        extra = (programs.temporary_bytes(program) - alone) / weights
        results[name] = {
            "temporary_bytes": programs.temporary_bytes(program),
            "extra_copies": extra,
            "state_copies": state_bytes / weights,
            "compile_seconds": seconds,
        }
        note(f"  {name}: {extra:+.3f} copies, compiled in {seconds:.1f} s")
        runs[name] = (tx, program)
        if promised:
            claim = f"{name}, {'scanned' if shape.scanned else 'unrolled'}: extra copies"
            bars.append(Bar("memory", claim, extra, "<=", LIMIT))
    # A method at a time, for the memory of one; a forward pass before each of its steps.
    for name, (tx, program) in runs.items():
        trained = jax.tree.map(jnp.copy, params)
        state = jax.jit(tx.init)(trained)
        trained, state = program(trained, state, batch)  # it draws the subspaces
        seconds, passes = [], []
        for _ in range(rounds):
            started = time.perf_counter()
            jax.block_until_ready(forward(trained, batch))
            passes.append(time.perf_counter() - started)
            started = time.perf_counter()
            trained, state = jax.block_until_ready(program(trained, state, batch))
            seconds.append(time.perf_counter() - started)
        ratios = [step / one for step, one in zip(seconds, passes, strict=True)]
        results[name] |= {
            "min_seconds": min(seconds),
            "forward_min_seconds": min(passes),
            "forward_passes": statistics.median(ratios),
        }
        note(f"  {name}: {results[name]['forward_passes']:.2f} forward passes")
        if not np.isfinite(float(forward(trained, batch))):
            raise RuntimeError(f"{name} has not trained")
    found = {
        "shape": shape._asdict(),
        "vocabulary": VOCABULARY,
        "weights_bytes": weights,
        "forward_temporary_bytes": alone,
        "optimizers": results,
    }
    return found, bars


def errors_of_updates(batch):
    """Each method's first step against plain evaluations at θ ± μ D: {name: relative error}.

    Taken from the library are the drawn directions D alone.
    """
    loss, params, errors = jax.jit(programs.loss_of(CHECKED)), programs.init(CHECKED), {}
    weights = _numpy(params)
    for name, (tx, apply_updates, _) in optimizers(CHECKED, rate=1.0).items():
        if name.startswith("ZO-Muon"):
            continue  # what Newton-Schulz makes of it is in the tests
        state = tx.init(params)
        program, *_ = compiled_step(tx, apply_updates, loss, params, batch)
        copied = jax.tree.map(jnp.copy, (params, state))
        after, state = program(*copied, batch)
        config = _config_of(name)
        plan = config.plan(params)
        low_state = opened(config, plan, tx.init(params)[0])
        key = jax.random.split(step_key(low_state.ascent.seed, 0, PROBE), 1)[0]
        move = _direction(config, plan, _partners(plan, low_state), key)
        direction = {}
        for path, leaf in plan.leaves.items():
            if leaf.view is None:
                z = move.full[path]
                z = plus_noise(jnp.zeros(leaf.shape), z) if isinstance(z, Noise) else z
                direction[path] = np.asarray(z, np.float64)
                continue
            p = leaf.view.projector(low_state.q.get(path), low_state.r.get(path))
            whole = leaf.view.leaf(leaf.view.orient(p @ move.low[path]))
            direction[path] = np.asarray(whole, np.float64)
        above, below = (
            float(
                loss(
                    _tree(params, {k: w + s * MU * direction[k] for k, w in weights.items()}), batch
                )
            )
            for s in (1, -1)
        )
        slope = (above - below) / (2 * MU)
        factors = {
            path: config.zeroth_order.weight(leaf) if leaf.view else 1.0
            for path, leaf in plan.leaves.items()
        }
        share = 0.1 if name.startswith("LOZO-M") else 1.0  # 1 - β
        new = _numpy(after)
        wrong = sum(
            np.sum((new[k] - w + share * slope * factors[k] * direction[k]) ** 2)
            for k, w in weights.items()
        )
        whole = sum(np.sum((share * slope * factors[k] * direction[k]) ** 2) for k in weights)
        errors[name] = float(np.sqrt(wrong / whole))
    return errors


def _config_of(name):
    numbers = lorenza_optax.WeightDimensionNumbers(0, 1)
    arguments = {"mu": MU} if name.startswith("MeZO") else {
        "mu": MU, "weight_dimension_numbers": numbers
    }  # fmt: skip
    kind = name.partition(",")[0]
    rank = CHECKED.rank if kind == "SubZero" else LOZO_RANK
    made = {
        "MeZO": lambda: methods.scale_by_mezo(**arguments),
        "LOZO": lambda: methods.scale_by_lozo(rank, **arguments),
        "LOZO-M": lambda: methods.scale_by_lozo_m(rank, **arguments),
        "SubZero": lambda: methods.scale_by_subzero(rank, **arguments),
    }
    return made[kind]().update.config


def _numpy(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def _tree(like, arrays):
    leaves = [jnp.asarray(array, jnp.float32) for array in arrays.values()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def table(name, found):
    made = rich.table.Table(title=f"{name}: {Shape(**found['shape'])}")
    made.add_column("step")
    columns = {
        "extra_copies": ("extra copies", "{:+.3f}"),
        "state_copies": ("state, copies", "{:.3f}"),
        "forward_passes": ("time, forward passes", "{:.2f}"),
        "min_seconds": ("seconds", "{:.3f}"),
        "compile_seconds": ("to compile", "{:.1f} s"),
    }
    for heading, _ in columns.values():
        made.add_column(heading, justify="right")
    for step, result in found["optimizers"].items():
        made.add_row(step, *(form.format(result[key]) for key, (_, form) in columns.items()))
    return made


def main():
    parser = options.parser_of("zeroth_order_memory", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--rounds", type=int, help="timed steps of each method")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON file")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (2 if arguments.quick else 7)
    out = arguments.out or (None if arguments.quick else experiments.RESULTS)
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 120
    note = functools.partial(console.print, highlight=False, markup=False)
    text, bars, summary = programs.Text(), [], {}
    with mock.patch.object(programs, "VOCABULARY", 256 if arguments.quick else VOCABULARY):
        for name, shape in (QUICK if arguments.quick else SIZES).items():
            note(name)
            summary[name], found = measured(shape, rounds, text.batch(shape, 0), note)
            bars += [] if arguments.quick else found
    errors = errors_of_updates(text.batch(CHECKED, 0))
    checks = [
        Bar("check", f"{k}: error of the update", e, "<=", TOLERANCE) for k, e in errors.items()
    ]
    for name, found in summary.items():
        console.print(table(name, found))
    console.print(bars_table(bars + checks))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        summary = {
            "bars": stored(bars + checks),
            "rounds": rounds,
            **summary,
            "machine": machine.describe(),
            "versions": machine.versions(),
        }
        (out / "zeroth_order_memory.json").write_text(json.dumps(summary, indent=1) + "\n")
    if wrong := [bar.claim for bar in bars + checks if not bar.holds]:
        sys.exit(f"Not as promised: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
