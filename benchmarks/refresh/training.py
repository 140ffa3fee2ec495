"""Section D: the main job, with refreshes from gradients and from sketches."""

import functools
import statistics
import time

import jax
import numpy as np
import rich.progress

import corpus
import llama
import lorenza_optax
import optimizers
import pretrain
import training
from benchmarks import programs
from benchmarks.bars import Bar
from benchmarks.refresh.matrix import best_share, share

REFRESHES = ("gradient", "sketch")


def main_job(size, arguments, text, console):
    """D: final validation losses, and energy along the way as a share of the best."""
    del text
    results = {refresh: [] for refresh in REFRESHES}
    plan = pretrain.make_plan(pretrain.parse_arguments(size))
    documents, description = corpus.read_documents()
    data = corpus.tokenize(documents, description, "bytes", 256, plan.seq_len)
    checks = []
    for seed in arguments.seeds:
        plan = pretrain.make_plan(pretrain.parse_arguments([*size, "--seed", str(seed)]))
        for refresh in REFRESHES:
            run = _train(refresh, plan, data, console)
            results[refresh].append(run)
            console.print(
                f"  {refresh}, seed {seed}: validation loss {run['validation_loss']:.4f}, energy "
                f"{run['share_of_best']:.3f} of the best"
            )
            checks += _checks(f"{refresh}, seed {seed}", run, plan)
    return {"arguments": size, "plan": _described(plan), "runs": results}, [], checks


def _described(plan):
    return {"steps": plan.steps, **plan.settings._asdict()}


def ages(gap):
    """Updates since a refresh at which energy is taken: just after, half way, and last."""
    return sorted({min(1, gap - 1), gap // 2, gap - 1})


def _train(refresh, plan, data, console):
    factory = functools.partial(lorenza_optax.lorenza, refresh=refresh)
    schedule = optimizers.learning_rate_schedule(
        optimizers.OPTIMIZERS["lorenza"].pretraining, plan.steps
    )
    tx = optimizers.lorenza(schedule, plan.settings, factory)
    entry, loss = optimizers.OPTIMIZERS["lorenza"], llama.loss_of(plan.model)
    params = llama.init(plan.model, plan.seed)
    opt_state = jax.jit(tx.init)(params)

    def batch_at(step):
        return corpus.train_batch(data.train, plan.seed, step, plan.batch_size, plan.seq_len)

    step_of = functools.partial(training.train_step, entry, tx, loss)
    jitted = jax.jit(step_of, donate_argnums=(0, 1))
    compiled = jitted.lower(params, opt_state, batch_at(0)).compile()
    gradient, evaluate = jax.jit(jax.grad(loss)), jax.jit(loss)
    gap, rank = plan.settings.update_proj_gap, plan.settings.rank
    seconds, losses, energies = [], [], []
    description = f"  {refresh}, seed {plan.seed}"
    for step in rich.progress.track(range(plan.steps), description, console=console):
        batch = batch_at(step)
        if step and step % gap in ages(gap):
            found = _energy(gradient(params, batch), opt_state, rank)
            energies.append({"step": step, "age": step % gap, **found})
        started = time.perf_counter()
        params, opt_state, value = compiled(params, opt_state, batch)
        losses.append(float(value))  # waits for the step
        seconds.append(time.perf_counter() - started)
    held_out = corpus.validation_batches(
        data.validation, pretrain.VALIDATION_BATCHES, plan.batch_size, plan.seq_len
    )
    by_age = {
        age: statistics.fmean(row["share_of_best"] for row in energies if row["age"] == age)
        for age in ages(gap)
    }
    return {
        "seed": plan.seed,
        "validation_loss": statistics.fmean(float(evaluate(params, batch)) for batch in held_out),
        "losses": losses,
        "energies": energies,
        "share_of_best": statistics.fmean(row["share_of_best"] for row in energies),
        "share_of_best_by_age": by_age,
        "last_refresh": int(programs.low_rank_state(opt_state).last_refresh),
        "temporary_bytes": programs.temporary_bytes(compiled),
        "median_seconds": statistics.median(seconds),
        "mean_seconds": statistics.fmean(seconds[1:]),
    }


def _energy(tree, opt_state, rank):
    """Shares of the squared norm of the projected leaves' gradient: held, and the most there is."""
    state, leaves = programs.low_rank_state(opt_state), jax.tree.leaves(tree)
    plan = lorenza_optax.projection_plan(tree, rank)
    held = best = whole = 0.0
    for (path, leaf), g in zip(plan.leaves.items(), leaves, strict=True):
        if path not in plan.projected:
            continue
        matrix = np.asarray(leaf.matrix.orient(leaf.matrix.matrix(g)), np.float64)
        norm = np.sum(matrix**2)
        projector = leaf.matrix.projector(state.q.get(path), state.r.get(path))
        held += norm * share(projector, matrix)
        best += norm * best_share(matrix, rank)
        whole += norm
    found = {"share": held / whole, "best_share": best / whole, "share_of_best": held / best}
    return {key: float(value) for key, value in found.items()}


def _checks(name, run, plan):
    tenth = max(1, plan.steps // 10)
    losses, gap = run["losses"], plan.settings.update_proj_gap
    learned = statistics.fmean(losses[:tenth]) - statistics.fmean(losses[-tenth:])
    shares = [row["share_of_best"] for row in run["energies"]]
    expected = (plan.steps - 1) // gap * gap
    return [
        Bar("D", f"{name}: the loss falls by", learned, ">=", 0.1),
        Bar("D", f"{name}: energy / the best, most", max(shares), "<=", 1 + 1e-4),
        Bar("D", f"{name}: energy / the best, least", min(shares), ">=", 1e-3),
        Bar("D", f"{name}: last refresh", run["last_refresh"], ">=", expected),
    ]
