"""The table and the plot of `python -m benchmarks.ascent`."""

import rich.table

from benchmarks.ascent.choices import BAR, SAM, SUBSPACE
from reporting import pyplot


def table(result, radii):
    made = rich.table.Table(title=f"{result['title']}: means of {result['measured_at']}")
    made.add_column("ascent")
    for heading in ("passes", "cosine", *(f"share of SAM's\nrise, rho={r:g}" for r in radii)):
        made.add_column(heading, justify="right")
    made.add_column(f"lowest,\nrho={radii[0]:g}", justify="right")
    for name, row in result["choices"].items():
        shares = [f"{100 * row['share'][str(radius)]:.1f} %" for radius in radii]
        lowest = f"{100 * row['lowest_share'][str(radii[0])]:.1f} %"
        made.add_row(name, f"{row['passes']:g}", f"{row['cosine']:.3f}", *shares, lowest)
    return made


def plot(results, radius, path):
    """Share of SAM's rise against passes; the labels of one column stand clear of each other."""
    figure, panels = pyplot.subplots(
        1, len(results), figsize=(6 * len(results), 5), squeeze=False, layout="constrained"
    )
    for axes, result in zip(panels[0], results, strict=True):
        columns = {}
        for name, row in result["choices"].items():
            point = (row["passes"], 100 * row["share"][str(radius)], name)
            columns.setdefault(row["passes"], []).append(point)
        for column in columns.values():
            lowest_free = -float("inf")
            for passes, share, name in sorted(column, key=lambda point: point[1]):
                height = max(share, lowest_free)
                lowest_free = height + 4.5
                color = "C3" if name == SUBSPACE else "C7" if name == SAM else "C0"
                axes.plot(passes, share, "o", color=color)
                side = -1 if passes > 10 else 1
                axes.annotate(
                    name, (passes, share), (passes + 0.35 * side, height), fontsize=8,
                    va="center", ha="left" if side > 0 else "right", color=color,
                    arrowprops={"arrowstyle": "-", "color": color, "lw": 0.4},
                )  # fmt: skip
        axes.axhline(100 * BAR, color="C3", linestyle=":", linewidth=1)
        axes.set(title=result["title"], xlim=(-0.5, 18), xlabel="passes (1: forward on the batch)")
        axes.set_ylabel(f"share of SAM's rise, rho={radius:g} (%)")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
