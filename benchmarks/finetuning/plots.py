"""The figure of fine-tuning."""

from matplotlib import pyplot

from benchmarks import tables


def differences(points, baselines, path):
    """The average over tasks of {(method, baseline): Difference}, a panel for each baseline."""
    shown = [b for b in baselines if any((m, b) in points for m in tables.NAMES)]
    order = [m for m in tables.NAMES if any((m, b) in points for b in shown)]
    figure, axes = pyplot.subplots(
        ncols=max(1, len(shown)), figsize=(2 + 4 * max(1, len(shown)), 4), layout="constrained",
        squeeze=False, sharey=True,
    )  # fmt: skip
    for panel, baseline in zip(axes[0], shown, strict=False):
        panel.axvline(0, color="gray", linewidth=1)
        for row, method in enumerate(reversed(order)):
            if point := points.get((method, baseline)):
                panel.plot([point.low, point.high], [row, row], color="C0")
                panel.plot(point.estimate, row, "o", color="C0")
        panel.set_xlabel(f"points above {tables.NAMES[baseline]}")
        panel.set_yticks(range(len(order)), [tables.NAMES[method] for method in reversed(order)])
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
