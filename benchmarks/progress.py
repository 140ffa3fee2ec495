"""What the user of benchmarks/run.py sees: how many cells are done, and how long the rest takes."""

import time

import rich.console
import rich.progress


def duration(seconds):
    """For people: "40 s", "12 min", "3 h 05 min"; "?" for None."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{max(0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Display:
    """Two bars, cells and the steps of the present one; a line for each cell if not a terminal."""

    def __init__(self, console=None):
        self.console = console or rich.console.Console()
        self._bars = None

    def note(self, text):
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, name, count):
        self._count, self._done = count, 0
        if self.console.is_terminal:
            self._bars = rich.progress.Progress(
                # Columns of their own: plain strings would lose their style when a note is printed.
                rich.progress.TextColumn("[bold]{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self._cells = self._bars.add_task(name, total=count, text="")
            self._steps = self._bars.add_task("", total=None, text="")
            self._bars.start()

    def cell(self, cell, seconds, seconds_left):
        """A cell begins that will take `seconds`, with `seconds_left` for all that are left."""
        self._cell, self._started = cell["id"], time.perf_counter()
        self._left = seconds_left
        if self._bars is not None:
            self._bars.reset(self._steps, total=None, description=cell["id"], text="compiling")
        else:
            self.note(
                f"[{self._done + 1}/{self._count}] {cell['id']}: about {duration(seconds)}, "
                f"{duration(seconds_left)} for all that are left"
            )
        self._show_left()

    def step(self, done, total, text=""):
        if self._bars is not None:
            self._bars.update(self._steps, completed=done, total=total, text=text)
        self._show_left()

    def finished(self, text=""):
        seconds = time.perf_counter() - self._started
        self.note(f"{self._cell}: {duration(seconds)}  {text}".rstrip())
        self.skipped()

    def skipped(self):
        self._done += 1
        if self._bars is not None:
            self._bars.update(self._cells, completed=self._done)

    def stop(self):
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _show_left(self):
        if self._bars is not None:
            left = self._left
            if left is not None:
                left = max(0.0, left - (time.perf_counter() - self._started))
            self._bars.update(self._cells, text=f"{duration(left)} left")
