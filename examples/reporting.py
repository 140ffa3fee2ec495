"""What the user sees: a progress bar, a closing table, a plot."""

import time

import matplotlib
import rich.console
import rich.progress
import rich.table

matplotlib.use("Agg")  # files only, no window

from matplotlib import pyplot

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
            self._validation = number(line["validation_loss"])
        if line["loss"] is None and self._name not in self._warned:
            self._warned.add(self._name)
            self.note(
                f"{self._name}: the loss is not finite at step {line['step']}; "
                "a lower --lr usually helps"
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


def table(results):
    ratios = relative(results)
    made = rich.table.Table(title="After training, on held-out text")
    made.add_column("optimizer")
    for heading in (
        "lr",
        "validation loss",
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
            with_ratio("optimizer_state_bytes", size(result["optimizer_state_bytes"])),
            with_ratio("temporary_bytes", "-" if temporary is None else size(temporary)),
            with_ratio("seconds_per_step", f"{1000 * result['seconds_per_step']:.3g} ms"),
        )
    return made


def plot(metrics_by_name, path):
    """Training loss (light) and validation loss (dark) of each optimizer, in one picture."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for index, (name, lines) in enumerate(metrics_by_name.items()):
        color = f"C{index % 10}"
        trained = [line for line in lines if line["loss"] is not None]
        held_out = [line for line in lines if line.get("validation_loss") is not None]
        axes.plot(
            [line["step"] for line in trained],
            [line["loss"] for line in trained],
            color=color,
            alpha=0.3,
            linewidth=1,
        )
        axes.plot(
            [line["step"] for line in held_out],
            [line["validation_loss"] for line in held_out],
            color=color,
            marker="o",
            markersize=3,
            label=name,
        )
    held_out = [
        line["validation_loss"]
        for lines in metrics_by_name.values()
        for line in lines
        if line.get("validation_loss") is not None
    ]
    if held_out:  # the fall of the first steps would flatten everything after it
        axes.set_ylim(min(held_out) - 0.4, max(held_out) + 0.4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Validation (dark) and training loss (light)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
