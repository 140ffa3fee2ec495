"""What the user sees: a progress bar, a closing table, a plot."""

import time

import matplotlib
import rich.console
import rich.progress
import rich.table

matplotlib.use("Agg")  # files only, no window

from matplotlib import pyplot

import training

BASELINE = "adamw"


class Display:
    """A bar with loss, tokens per second and time left; plain lines when not in a terminal."""

    def __init__(self, console=None):
        self.console = console or rich.console.Console()
        if not self.console.is_terminal:
            self.console.width = 100  # a file has no width; the closing table needs this one
        self._bar = None
        self._warned = set()

    def note(self, text):
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, name, steps, done):
        self._name, self._steps = name, steps
        self._first, self._started = done, None
        self._loss = self._validation = "-"
        self.note(f"{name}: compiling" + (f", continuing after step {done}" if done else ""))
        if self.console.is_terminal:
            self._bar = rich.progress.Progress(
                "[bold]{task.description}",
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                "loss {task.fields[loss]}  validation {task.fields[validation]}",
                "{task.fields[speed]} tokens/s",
                rich.progress.TimeRemainingColumn(),
                console=self.console,
            )
            fields = {"loss": "-", "validation": "-", "speed": "-"}
            self._task = self._bar.add_task(name, total=steps, completed=done, **fields)
            self._bar.start()

    def step(self, line):
        if self._started is None:  # compiling is not counted in the time left
            self._started = time.perf_counter() - line["seconds"]
        self._loss = number(line["loss"])
        if "validation_loss" in line:
            metrics = (
                f"{key} {number(value)}"
                for key, value in line.items()
                if key not in (*training.OF_EVERY_STEP, "validation_loss")
            )
            self._validation = "  ".join([number(line["validation_loss"]), *metrics])
        if line["loss"] is None and self._name not in self._warned:
            self._warned.add(self._name)
            self.note(
                f"{self._name}: the loss is not finite at step {line['step']}; "
                "a lower learning rate usually helps"
            )
        speed = f"{line['tokens_per_second']:,.0f}"
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=line["step"],
                loss=self._loss,
                validation=self._validation,
                speed=speed,
            )
        elif line["step"] % max(1, self._steps // 10) == 0 or line["step"] == self._steps:
            elapsed = time.perf_counter() - self._started
            left = elapsed / (line["step"] - self._first) * (self._steps - line["step"])
            self.note(
                f"{self._name}: step {line['step']}/{self._steps}  loss {self._loss}  "
                f"validation {self._validation}  {speed} tokens/s  {left:.0f} s left"
            )

    def stop(self):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def number(value):
    return "not finite" if value is None else f"{value:.4f}"


def size(value):
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def relative(results):
    """Each result's costs divided by AdamW's, where AdamW ran."""
    baseline = next((r for r in results if r["optimizer"] == BASELINE), None)
    keys = ("optimizer_state_bytes", "temporary_bytes", "seconds_per_step")

    def ratios(result):
        if baseline is None or any(not baseline[key] for key in keys):
            return {}
        return {key: result[key] / baseline[key] for key in keys}

    return {result["optimizer"]: ratios(result) for result in results}


def table(results, title, metrics=()):
    """The closing table; `metrics` are keys of the results that are shown beside the loss."""
    ratios = relative(results)
    made = rich.table.Table(title=title)
    made.add_column("optimizer")
    for heading in (
        "lr",
        "validation loss",
        *(metric.replace("_", " ") for metric in metrics),
        "optimizer state",
        "temporary memory",
        "time per step",
    ):
        made.add_column(heading, justify="right")
    for result in results:
        name = result["optimizer"]

        def with_ratio(key, text, name=name):
            ratio = ratios[name].get(key)
            return text if ratio is None or name == BASELINE else f"{text} ({ratio:.2f}x)"

        temporary = result["temporary_bytes"]
        made.add_row(
            name,
            f"{result['learning_rate']:g}",
            number(result["validation_loss"]),
            *(number(result[metric]) for metric in metrics),
            with_ratio("optimizer_state_bytes", size(result["optimizer_state_bytes"])),
            with_ratio("temporary_bytes", "-" if temporary is None else size(temporary)),
            with_ratio("seconds_per_step", f"{1000 * result['seconds_per_step']:.3g} ms"),
        )
    return made


def plot(lines_by_name, path, loss_unit, metrics=()):
    """Training loss (light) and validation loss (dark) of each optimizer, in one picture.

    Beside it one panel for each of the metrics that was measured in training.
    """
    everything = [line for lines in lines_by_name.values() for line in lines]
    metrics = [m for m in metrics if any(line.get(m) is not None for line in everything)]
    panels = 1 + len(metrics)
    figure, axes = pyplot.subplots(
        ncols=panels, figsize=(2 + 5 * panels, 4.5), layout="constrained", squeeze=False
    )
    losses, *others = axes[0]
    for index, (name, lines) in enumerate(lines_by_name.items()):
        color = f"C{index % 10}"

        def curve(axes, key, lines=lines, **style):
            shown = [line for line in lines if line.get(key) is not None]
            axes.plot([line["step"] for line in shown], [line[key] for line in shown], **style)

        curve(losses, "loss", color=color, alpha=0.3, linewidth=1)
        dark = {"color": color, "marker": "o", "markersize": 3, "label": name}
        for panel, key in zip(axes[0], ("validation_loss", *metrics), strict=True):
            curve(panel, key, **dark)
    held_out = [line.get("validation_loss") for line in everything]
    held_out = [loss for loss in held_out if loss is not None]
    if held_out:  # the fall of the first steps would flatten everything after it
        losses.set_ylim(min(held_out) - 0.4, max(held_out) + 0.4)
    losses.set_ylabel(f"loss ({loss_unit})")
    losses.set_title("Validation (dark) and training loss (light)")
    for panel, metric in zip(others, metrics, strict=True):
        panel.set_ylabel(metric.replace("_", " "))
        panel.set_title("On the development set")
    for panel in axes[0]:
        panel.set_xlabel("step")
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# Panels of `plot_diagnostics`, and what each shows.
DIAGNOSTICS = {
    "captured_energy": "Share of the squared gradient in the subspaces",
    "subspace_overlap": "Share of new subspaces that lay in the old ones",
    "ascent_norm": "Slope that the ascent found",
    "steps_since_refresh": "Steps since the last refresh",
}


def plot_diagnostics(lines_by_name, path):
    """What `lorenza_optax.diagnostics` said of each step; False if no optimizer has any."""
    logged = {
        name: [(line["step"], line["diagnostics"]) for line in lines if "diagnostics" in line]
        for name, lines in lines_by_name.items()
    }
    keys = [
        key
        for key in DIAGNOSTICS
        if any(scalars.get(key) is not None for steps in logged.values() for _, scalars in steps)
    ]
    if not keys:
        return False
    figure, axes = pyplot.subplots(
        ncols=len(keys), figsize=(5 * len(keys), 4), layout="constrained", squeeze=False
    )
    for panel, key in zip(axes[0], keys, strict=True):
        for index, (name, steps) in enumerate(logged.items()):
            shown = [(step, scalars[key]) for step, scalars in steps
                     if scalars.get(key) is not None]  # fmt: skip
            if shown:
                panel.plot(*zip(*shown, strict=True), color=f"C{index % 10}", label=name)
        panel.set_title(DIAGNOSTICS[key], fontsize="medium")
        panel.set_xlabel("step")
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
