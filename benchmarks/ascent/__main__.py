"""What each ascent finds, measured on LORENZA's own trajectory.

    python -m benchmarks.ascent                                  # during the main job
    python -m benchmarks.ascent --data-dir /path/to/glue         # and during two fine-tuning runs

At several steps of a run, on the parameters, the optimizer's state and the batch of that step,
each choice gives its perturbation of length rho, as `perturbed_value_and_grad` takes it. Told of
each are its cosine to the batch gradient over all leaves, the rise of the batch loss that it
makes as a share of the rise that SAM on all leaves makes with the same rho, and the passes spent
to find it. Written after each task are benchmarks/results/ascent.json and ascent.png; of an
earlier run they keep the tasks that are not run again, if all else was the same, the commit too.
Exits with 1 where "subspace" finds less than 85 % of SAM's rise.
"""

import json
import pathlib
import statistics
import sys

import jax
import optax
import rich.console
import rich.progress

import lorenza_optax
from benchmarks import experiments, options
from benchmarks.ascent import tasks
from benchmarks.ascent.choices import (
    BAR,
    CHOICES,
    OWN,
    SAM,
    SUBSPACE,
    perturbation_by,
    perturbation_by_sam,
)
from benchmarks.ascent.report import plot, table

SMALL_RHO = 0.01  # where the loss is closer to linear


@jax.jit
def cosine_and_norm(move, gradient):
    norm = optax.tree.norm(move)
    return optax.tree.vdot(move, gradient) / (norm * optax.tree.norm(gradient)), norm


def projected(gradient, opt_state, rank):
    """The gradient, of projected leaves as far as it lies in the subspaces: Q Q'G, or G R'R."""
    plan = lorenza_optax.projection_plan(gradient, rank)
    left, right = (optax.tree.get(opt_state, name) for name in "qr")

    def part(path, leaf):
        if path not in plan.projected:
            return leaf
        if leaf.shape[0] <= leaf.shape[1]:  # the shorter side is compressed; of squares the left
            return left[path] @ (left[path].T @ leaf)
        return (leaf @ right[path].T) @ right[path]

    leaves, structure = jax.tree.flatten(gradient)
    return structure.unflatten(part(*pair) for pair in zip(plan.leaves, leaves, strict=True))


def check(holds, message):
    if not holds:
        sys.exit(f"The measurement is wrong: {message}")


class Meter:
    """Measures all choices at a point of one task's trajectory."""

    def __init__(self, task, draws, radii):
        rho = task.settings.rho
        self.task, self.draws, self.radii = task, draws, radii
        self.gradient = jax.jit(jax.grad(task.loss))
        self.by_sam = perturbation_by_sam(rho)
        self.by = {
            name: perturbation_by(choice, task.loss, rho)
            for name, choice in CHOICES.items()
            if name != SAM
        }
        self.full_space = lorenza_optax.zo_sam_perturbation(rho).init(task.params)
        # One program for all points: differences of its values have no round-off of their own.
        self.loss_at = jax.jit(
            lambda params, move, share, batch: task.loss(
                jax.tree.map(lambda p, m: p + share * m, params, move), batch
            )
        )

    def measure(self, step, params, opt_state, batch, advance):
        """Samples {choice: [...]}, and the loss at the point that LORENZA perturbs to itself."""
        gradient = self.gradient(params, batch)
        moved = self.by_sam(params, gradient)
        base = float(self.loss_at(params, moved, 0.0, batch))
        rho, samples, own_loss = self.task.settings.rho, {}, None
        for name, choice in CHOICES.items():
            samples[name] = []
            for draw in range(self.draws if choice.is_random else 1):
                if name != SAM:
                    state = self._state(choice, opt_state, draw)
                    moved = self.by[name](params, state, batch)
                cosine, norm = map(float, cosine_and_norm(moved, gradient))
                check(abs(norm / rho - 1) < 1e-3, f"{name} has length {norm}, and rho is {rho}")
                rises = {
                    radius: float(self.loss_at(params, moved, radius / rho, batch)) - base
                    for radius in self.radii
                }
                if name == SAM:
                    check(cosine > 1 - 1e-4, f"SAM's cosine is {cosine}")
                    check(min(rises.values()) > 0, f"SAM descends: {rises}")
                    most = rises
                if name == SUBSPACE:
                    expected = projected(gradient, opt_state, self.task.settings.rank)
                    to_it = float(cosine_and_norm(moved, expected)[0])
                    check(to_it > 1 - 1e-3, f"subspace has cosine {to_it} to Q Q' gradient")
                if name == OWN and draw == 0:
                    own_loss = base + rises[rho]
                shares = {str(radius): rises[radius] / most[radius] for radius in self.radii}
                rises = {str(radius): rise for radius, rise in rises.items()}
                samples[name].append(
                    {"step": step, "cosine": cosine, "rise": rises, "share": shares}
                )
                advance()
        return samples, own_loss

    def _state(self, choice, opt_state, draw):
        state = opt_state
        if choice.in_full_space:
            state = self.full_space._replace(count=opt_state[0].count)
        if draw:  # the first draw is that of LORENZA's own next step
            key = jax.random.key(draw, impl="threefry2x32")
            state = optax.tree.set(state, seed=jax.random.key_data(key))
        return state


def follow(name, task, arguments, radii, console):
    """Trains, and measures on the way; what the JSON file keeps of this task."""
    meter = Meter(task, arguments.draws, radii)
    tx, params = task.optimizer(), task.params
    opt_state = tx.init(params)
    value_and_grad = lorenza_optax.perturbed_value_and_grad(task.loss, rho=task.settings.rho)

    @jax.jit
    def train_step(params, opt_state, batch):
        value, gradient = value_and_grad(params, batch, opt_state=opt_state)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    checkpoints, losses = task.checkpoints(), []
    check(checkpoints, f"{task.steps} steps have nothing in them to measure; see --every")
    draws = sum(arguments.draws if choice.is_random else 1 for choice in CHOICES.values())
    samples = {choice: [] for choice in CHOICES}
    console.print(f"{name}: {task.steps} steps, measured at {', '.join(map(str, checkpoints))}")
    columns = rich.progress.Progress.get_default_columns()
    with rich.progress.Progress(
        *columns, rich.progress.TimeElapsedColumn(), console=console
    ) as progress:
        training = progress.add_task(f"{name}: training", total=task.steps)
        measuring = progress.add_task(f"{name}: measuring", total=draws * len(checkpoints))
        for step in range(task.steps):
            batch, own_loss = task.batch_at(step), None
            if step in checkpoints:
                found, own_loss = meter.measure(
                    step, params, opt_state, batch, lambda: progress.advance(measuring)
                )
                for choice, rows in found.items():
                    samples[choice] += rows
                share = found[SUBSPACE][0]["share"][str(task.settings.rho)]
                progress.console.print(
                    f"{name}: step {step}, loss {losses[-1]:.4f}; SAM's rise "
                    f"{found[SAM][0]['rise'][str(task.settings.rho)]:.4f}, subspace {share:.1%}"
                )
            params, opt_state, value = train_step(params, opt_state, batch)
            losses.append(float(value))
            if own_loss is not None:
                # Measured is the point at which the training step has taken its gradient.
                error = abs(own_loss / losses[-1] - 1)
                check(error < 1e-5, f"{OWN} gives {own_loss}, and training {losses[-1]}")
            progress.advance(training)
    tenth = max(1, len(losses) // 10)
    first, last = statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])
    console.print(f"{name}: mean loss of the first {tenth} steps {first:.4f}, last {last:.4f}")
    check(last < first, f"{name} has not learned: loss {first} at first, {last} at last")
    return {
        "title": task.title,
        "steps": task.steps,
        "measured_at": checkpoints,
        "settings": task.settings._asdict() | {"learning_rate": task.learning_rate},
        "losses": losses,
        "choices": {c: summarized(CHOICES[c], rows, radii) for c, rows in samples.items()},
    }


def summarized(choice, rows, radii):
    shares = {str(radius): [row["share"][str(radius)] for row in rows] for radius in radii}
    return {
        "passes": choice.passes,
        "cosine": statistics.fmean(row["cosine"] for row in rows),
        "share": {radius: statistics.fmean(values) for radius, values in shares.items()},
        "lowest_share": {radius: min(values) for radius, values in shares.items()},
        "samples": rows,
    }


def main():
    parser = options.parser_of("ascent", __doc__)
    add = parser.add_argument
    add("--data-dir", help="folder with RTE/ and SST-2/, see examples/glue.py")
    add("--task", nargs="+", choices=tasks.TASKS, help="(default: all there is data for)")
    add("--steps", type=int, help="of each trajectory (default: 200, fine-tuning 150)")
    add("--every", type=int, help="steps between measurements (default: 25, fine-tuning 20)")
    add("--draws", type=int, default=4, help="of the probes, at each measurement")
    add("--rho", type=float, default=0.05)
    add("--seed", type=int, default=0)
    add(
        "--out",
        type=pathlib.Path,
        default=experiments.RESULTS,
        help="folder of ascent.json and ascent.png",
    )
    arguments = parser.parse_args()
    if arguments.task is None:
        arguments.task = list(tasks.TASKS) if arguments.data_dir else ["main_job"]
    if arguments.data_dir is None and arguments.task != ["main_job"]:
        parser.error("--data-dir is needed for the fine-tuning tasks")

    radii = [arguments.rho] + [SMALL_RHO] * (arguments.rho != SMALL_RHO)
    console = rich.console.Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    same = conditions(arguments)
    found = kept(arguments.out, same)
    for name in arguments.task:
        task = tasks.TASKS[name](arguments)
        found[name] = follow(name, task, arguments, radii, console)
        console.print(table(found[name], radii))
        store(arguments.out, found, same, radii)

    passed = True
    for name in arguments.task:
        for radius in map(str, radii):
            row = found[name]["choices"][SUBSPACE]
            share = row["share"][radius]
            passed &= share >= BAR
            console.print(
                f"{'pass' if share >= BAR else 'FAIL'}  {name}, rho={radius}: subspace finds "
                f"{share:.1%} of SAM's rise for {row['passes']} passes (bar: {BAR:.0%})"
            )
    sys.exit(0 if passed else 1)


def conditions(arguments):
    """What all tasks of a file were measured with."""
    without = ("out", "data_dir", "task")
    return {
        "arguments": {k: value for k, value in vars(arguments).items() if k not in without},
        **experiments.origin(),
    }


def kept(folder, same):
    """The tasks that are stored already, if they were measured under the same conditions."""
    path = folder / "ascent.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    return earlier["tasks"] if same.items() <= earlier.items() else {}


def store(folder, found, same, radii):
    ordered = {name: found[name] for name in tasks.TASKS if name in found}
    shares = [one["choices"][SUBSPACE]["share"][str(r)] for one in ordered.values() for r in radii]
    bar = {"share": BAR, "passed": min(shares) >= BAR}
    summary = {"tasks": ordered, "bar": bar, **same}
    folder.mkdir(parents=True, exist_ok=True)
    plot(list(ordered.values()), radii[0], folder / "ascent.png")
    (folder / "ascent.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
