"""Plots of how programs, work and messages grow."""

from matplotlib import pyplot

from benchmarks.scaling.devices import PLACEMENTS, sent_bytes
from benchmarks.scaling.results import NAMES, PLACES, name_of


def color_of(name):
    return f"C{list(NAMES).index(name)}"


def growth_plot(found, path):
    """Programs by layers, and work by width, rank and probes; None without any."""
    if not found.programs and not found.flops:
        return None
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axes, key, heading in (
        (panels[0, 0], "instructions", "instructions of the program"),
        (panels[0, 1], "compile_seconds", "CPU seconds to compile"),
    ):
        for axis, style in (("unrolled", "o-"), ("scanned", "s--")):
            for name, results in found.programs.get(axis, {}).items():
                points = sorted(results)
                values = [results[point][key] for point in points]
                axes.plot(points, values, style, color=color_of(name),
                          label=f"{name_of(name)}, {axis}")  # fmt: skip
        _finish(axes, "layers", heading)
        axes.set_yscale("log")
    _ratios(panels[1, 0], found.points(found.flops, "width"), "width")
    axes = panels[1, 1]
    for axis in ("rank", "probes"):
        _ratios(axes, found.points(found.flops, axis), axis)
    _finish(axes, "rank, or probes", "FLOPs of a step / AdamW's")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _ratios(axes, points, axis):
    names = dict.fromkeys(name for at in points.values() for name in at if name != "adamw")
    for name in names:
        color = color_of(name) if axis == "width" else None
        values = [at[name]["step"] / at["adamw"]["step"] for at in points.values()]
        axes.plot(list(points), values, "o-", color=color, label=f"{name_of(name)}, by {axis}")
    _finish(axes, axis, "FLOPs of a step / AdamW's")


def _finish(axes, label, heading):
    axes.set_xscale("log", base=2)
    axes.set_xlabel(label)
    axes.set_ylabel(heading)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def devices_plot(found, path):
    """MB that a device sends in a step; None without any."""
    if not found.devices:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, placement in zip(panels, PLACEMENTS, strict=True):
        for results, style in zip(found.strong_and_weak(placement), ("o-", "s--"), strict=True):
            names = list(next(iter(results.values()))["optimizers"]) if results else []
            for name in names:
                sent = [
                    1e-6 * sent_bytes(at["optimizers"][name]["step"], n)
                    for n, at in results.items()
                ]
                label = name_of(name) if style == "o-" else None
                axes.plot(list(results), sent, style, color=color_of(name), label=label)
        _finish(axes, "devices", "MB sent by a device in a step")
        axes.set_ylim(bottom=0)
        axes.set_title(PLACES[placement])
    figure.suptitle("Parameters replicated or sharded; dashed: weak scaling")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
