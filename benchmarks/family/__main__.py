"""Every method of the family on the main job, at equal steps and a tuned learning rate each.

    python -m benchmarks.family                        # all; goes on where it was interrupted
    python -m benchmarks.family --method galore lotus

Each method trains the main job's model on its batches, for `--steps` steps and the shape of
learning-rate schedule that all of examples/ use. Its peak is searched on a grid of a factor of 3
around the rate in examples/optimizers.py, which grows until the best is not at its edge, to six
trials at most. One seed:
small differences mean nothing. Results go to benchmarks/results/family.json as they come, with
the bytes of each optimizer's state for GaLore's Llama of 60M; readme_table.py prints the README's
table from them.
"""

import json
import statistics
import time

import jax
import optax

import corpus
import llama
import optimizers
import pretrain
import reporting
from benchmarks import experiments, options

RESULTS = experiments.RESULTS / "family.json"
FACTOR = 3.0
MOST_TRIALS = 6


def program(entry, plan, example):
    """The compiled step; the learning rate's peak is an argument, so that trials share it."""
    unit, loss = optimizers.learning_rate_schedule(1.0, plan.steps), llama.loss_of(plan.model)

    def step(params, opt_state, batch, peak):
        tx = entry.build(lambda count: peak * unit(count), plan.settings)
        value, updates, opt_state = entry.call(tx, loss, params, opt_state, batch)
        return optax.apply_updates(params, updates), opt_state, value

    tx = entry.build(unit, plan.settings)
    params = llama.init(plan.model, plan.seed)
    opt_state = jax.jit(tx.init)(params)
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, example, 1.0).compile()
    return compiled, tx, time.perf_counter() - started


def trial(compiled, tx, plan, problem, peak, display, label):
    """The losses of one training."""
    params = problem.init()
    opt_state = jax.jit(tx.init)(params)
    losses, seconds = [], []
    display.start(label, plan.steps, 0)
    for index in range(plan.steps):
        batch = problem.batch_at(index)
        started = time.perf_counter()
        params, opt_state, value = compiled(params, opt_state, batch, peak)
        losses.append(float(value))
        seconds.append(time.perf_counter() - started)
        display.step({"step": index + 1, "loss": losses[-1], "learning_rate": peak,
                      "seconds": seconds[-1],
                      "tokens_per_second": problem.tokens_per_step / seconds[-1]})  # fmt: skip
        if not losses[-1] < 20:  # diverged
            break
    display.stop()
    finished = len(losses) == plan.steps
    validation = problem.evaluate(params)["validation_loss"] if finished else None
    if validation is not None and not validation < 20:
        validation = None
    return {
        "learning_rate": peak,
        "validation_loss": validation,
        "train_losses": [round(loss, 4) for loss in losses[:: max(1, plan.steps // 20)]],
        "seconds_per_step": statistics.median(seconds),
    }


def tune(name, plan, problem, display):
    """All trials of one method, the best of them not at the edge of the grid."""
    entry = optimizers.OPTIMIZERS[name]
    compiled, tx, compile_seconds = program(entry, plan, problem.batch_at(0))
    trials = []

    def run(peak):
        trials.append(trial(compiled, tx, plan, problem, peak, display, f"{name} {peak:.1e}"))
        display.note(f"{name}: {peak:.3g} -> {trials[-1]['validation_loss']}")

    for exponent in (0, -1, 1):
        run(float(f"{entry.pretraining * FACTOR**exponent:.2g}"))
    while len(trials) < MOST_TRIALS:
        trials.sort(key=lambda one: one["learning_rate"])
        best = min(trials, key=_loss_or_inf)
        if best is trials[0]:
            run(float(f"{best['learning_rate'] / FACTOR:.2g}"))
        elif best is trials[-1]:
            run(float(f"{best['learning_rate'] * FACTOR:.2g}"))
        else:
            break
    trials.sort(key=lambda one: one["learning_rate"])
    params = problem.abstract_params
    return {
        "trials": trials,
        "best": min(trials, key=_loss_or_inf),
        "compile_seconds": compile_seconds,
        "state_bytes_60M": state_bytes_at("60M", entry),
        "optimizer_state_bytes": _bytes(jax.eval_shape(tx.init, params)),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def state_bytes_at(preset, entry):
    """The bytes of the optimizer's state for a preset's model, rank and T, from shapes alone."""
    plan = pretrain.make_plan(pretrain.parse_arguments(["--preset", preset]))
    tx = entry.build(optimizers.learning_rate_schedule(1.0, 10), plan.settings)
    return _bytes(jax.eval_shape(tx.init, llama.abstract(plan.model)[1]))


def _loss_or_inf(one):
    return float("inf") if one["validation_loss"] is None else one["validation_loss"]


def _bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main():
    parser = options.parser_of("family", __doc__)
    parser.add_argument("--method", nargs="+", choices=optimizers.OPTIMIZERS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--again", action="store_true", help="also what is stored")
    arguments = parser.parse_args()
    plan = pretrain.make_plan(pretrain.parse_arguments(["--steps", str(arguments.steps)]))
    documents, description = corpus.read_documents(None)
    data = corpus.tokenize(documents, description, "bytes", 256, plan.seq_len)
    problem = pretrain.problem_of(plan, data)
    origin = experiments.origin()
    where = {
        "versions": origin["versions"],
        "corpus": data.fingerprint,
        "steps": plan.steps,
        "settings": plan.settings._asdict(),
    }
    display = reporting.Display()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if {k: stored.get(k) for k in where} != json.loads(json.dumps(where)):
        stored = {**where, "methods": {}}
    stored["machine"] = origin["machine"]  # of the last rows
    start = problem.evaluate(problem.init())["validation_loss"]
    stored["initial_validation_loss"] = start
    for name in arguments.method or optimizers.OPTIMIZERS:
        if name in stored["methods"] and not arguments.again:
            continue
        result = tune(name, plan, problem, display)
        stored["methods"][name] = result | {key: origin[key] for key in ("commit", "dirty")}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        best = result["best"]
        display.note(f"{name}: best {best['validation_loss']} at {best['learning_rate']:g}")


if __name__ == "__main__":
    main()
