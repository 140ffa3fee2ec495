"""The tables and the plot of `python -m benchmarks.refresh`."""

import statistics

import numpy as np
import rich.table

from reporting import pyplot

OWN_COLOR, OTHER_COLOR = "C0", "C7"
OTHERS = ("adamw", "sam", "galore")


def _seconds(x):
    return f"{1e3 * x:.4g} ms"


def _megabytes(x):
    return f"{1e-6 * x:.4g} MB"


def _ratio(x):
    return f"{x:.2f}"


def _share(x):
    return f"{x:.4f}"


def _count(x):
    return f"{x:,}"


def _text(x):
    return str(x)


def _table(title, rows, columns):
    """A row of cells for each of the rows that has one of the columns {key: (heading, show)}."""
    made = rich.table.Table(title=title)
    for heading, show in columns.values():
        made.add_column(heading, justify="left" if show is _text else "right")
    for row in rows:
        made.add_row(*(show(row[key]) if key in row else "-" for key, (_, show) in columns.items()))
    return made


def one_matrix_tables(found):
    rows = [{"name": name, **result} for name, result in found["programs"].items()]
    columns = {
        "name": ("update", _text),
        "min_seconds": ("min", _seconds),
        "median_seconds": ("median", _seconds),
        "temporary_bytes": ("temporary", _megabytes),
        "share_of_best": ("energy / best", _share),
    }
    title = "A: one {rows} x {columns} gradient, r={rank}; best share of its energy".format(
        **found["matrix"]
    )
    return [_table(f"{title} {found['best_share']:.3f}", rows, columns)]


def captured_tables(found):
    columns = {
        "spectrum": ("spectrum", _text),
        "power_iterations": ("power iterations", _count),
        "min_seconds": ("min", _seconds),
        "median_seconds": ("median", _seconds),
        "best_share": ("best share", _share),
        "share_of_best": ("energy / best", _share),
    }
    title = "B: {rows} x {columns}, r={rank}; lowest of three sketches".format(**found["matrix"])
    return [_table(title, found["rows"], columns)]


def deep_model_tables(found):
    rows = [{"name": name, **result} for name, result in found["optimizers"].items()]
    for row in rows:
        row |= {f"instructions_{key}": value for key, value in row["instructions"].items()}
    size = "d={width}, {layers} layers, r={rank}, {batch} x {length} tokens".format(
        **found["shape"]
    )
    compiling = {
        "name": ("optimizer", _text),
        "trace_seconds": ("trace", _seconds),
        "lower_seconds": ("lower", _seconds),
        "xla_seconds": ("XLA", _seconds),
        "compile_seconds": ("together", _seconds),
        "compile_ratio": ("/ AdamW's", _ratio),
        "instructions_lowered": ("instructions", _count),
        "instructions_compiled": ("compiled", _count),
        "temporary_bytes": ("temporary", _megabytes),
    }
    stepping = {
        "name": ("optimizer", _text),
        "median_seconds": ("median", _seconds),
        "slowest_seconds": ("slowest", _seconds),
        "slowest_ratio": ("/ median", _ratio),
        "slowest_step": ("at step", _count),
        "first_loss": ("first loss", _share),
        "last_loss": ("last loss", _share),
    }
    return [
        _table(f"C: time to compile; {size}", rows, compiling),
        _table(
            f"C: {found['steps']} steps, a refresh in {found['gap']}; {size}",
            [row for row in rows if "slowest_ratio" in row],
            stepping,
        ),
    ]


def main_job_tables(found):
    rows = []
    for refresh, runs in found["runs"].items():
        losses = [run["validation_loss"] for run in runs]
        row = {
            "refresh": refresh,
            "losses": ", ".join(f"{loss:.4f}" for loss in losses),
            "mean": statistics.fmean(losses),
            "temporary_bytes": runs[0]["temporary_bytes"],
            "median_seconds": statistics.median(run["median_seconds"] for run in runs),
        }
        for age in runs[0]["share_of_best_by_age"]:
            row[age] = statistics.fmean(run["share_of_best_by_age"][age] for run in runs)
        rows.append(row)
    columns = {
        "refresh": ("refresh", _text),
        "losses": ("validation loss", _text),
        "mean": ("mean", _share),
        **{age: (f"energy / best,\nage {age}", _share) for age in row if isinstance(age, int)},
        "median_seconds": ("time per step", _seconds),
        "temporary_bytes": ("temporary", _megabytes),
    }
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return [
        _table(f"D: the main job, {found['plan']['steps']} steps, seeds {seeds}", rows, columns)
    ]


def sketches_tables(found):
    rows = []
    for name, shares in found["ways"].items():
        values = [row["share_of_best"] for row in shares]
        settled = [row["share_of_best"] for row in shares if row["step"] >= found["gap"]]
        row = {"first": values[0], "settled": statistics.fmean(settled), "lowest": min(settled)}
        rows.append({"way": name, **row})
    columns = {
        "way": ("way", _text),
        "first": ("first", _share),
        "settled": ("mean after the first T", _share),
        "lowest": ("lowest", _share),
    }
    title = "E: energy / the best, mean of {matrices} matrices, r={rank}, T={gap}".format(**found)
    return [_table(title, rows, columns)]


TABLES = {
    "A": one_matrix_tables,
    "B": captured_tables,
    "C": deep_model_tables,
    "D": main_job_tables,
    "E": sketches_tables,
}


def _plot_one_matrix(axes, found):
    results = found["programs"]
    names = list(results)[::-1]
    values = [results[name]["median_seconds"] for name in names]
    colors = [OTHER_COLOR if "galore" in name or "adam" in name else OWN_COLOR for name in names]
    drawn = axes.barh(names, values, color=colors)
    axes.bar_label(drawn, labels=[_seconds(value) for value in values], padding=3)
    axes.set(xscale="log", xlabel="seconds")
    axes.margins(x=0.3)
    axes.set_title("One {rows} × {columns} gradient, r={rank}".format(**found["matrix"]))


def _plot_compiling(axes, found):
    results = found["optimizers"]
    names = list(results)[::-1]
    left = np.zeros(len(names))
    for part, color in (("trace", "C2"), ("lower", "C1"), ("xla", "C0")):
        values = np.array([results[name][f"{part}_seconds"] for name in names])
        drawn = axes.barh(names, values, left=left, color=color, label=part)
        left += values
    axes.bar_label(drawn, labels=[f"{results[n]['compile_ratio']:.1f}x" for n in names], padding=3)
    axes.axvline(2 * results["adamw"]["compile_seconds"], color="C3", linestyle=":")
    axes.margins(x=0.15)
    axes.set(xlabel="seconds", title=f"Compiling {found['shape']['layers']} unrolled layers")
    axes.legend()


def _plot_steps(axes, found):
    for name, result in found["optimizers"].items():
        if "runs" in result and name != "galore":  # its refreshes are out of the picture
            seconds = np.min(result["runs"], axis=0)[1:]
            axes.plot(range(1, len(seconds) + 1), seconds, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="seconds", ylim=(0, None))
    axes.set_title(f"Time of each step, a refresh in {found['gap']}")
    axes.legend()


def _plot_main_job(axes, found):
    for index, (refresh, runs) in enumerate(found["runs"].items()):
        for run in runs:
            rows = run["energies"]
            axes.plot(
                [row["step"] for row in rows],
                [row["share_of_best"] for row in rows],
                color=f"C{index}", alpha=0.6, linewidth=1, marker=".",
                label=refresh if run is runs[0] else None,
            )  # fmt: skip
    axes.set(xlabel="step", ylabel="energy / the best subspaces'", ylim=(None, 1))
    axes.set_title("Energy in the subspaces during the main job")
    axes.legend()


def plot(summary, path):
    drawings = [
        (draw, summary[section])
        for section, draw in (
            ("A", _plot_one_matrix),
            ("D", _plot_main_job),
            ("C", _plot_compiling),
            ("C", _plot_steps),
        )
        if section in summary
    ]
    if not drawings:
        return
    rows = -(-len(drawings) // 2)
    figure, panels = pyplot.subplots(
        rows, 2, figsize=(12, 4.5 * rows), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(drawings) :]:
        axes.remove()
    for axes, (draw, found) in zip(panels.flat, drawings, strict=False):
        draw(axes, found)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
