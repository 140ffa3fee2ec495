"""The plots of pre-training: losses against steps, time and state; sweeps."""

import numpy as np
from matplotlib import pyplot

from benchmarks import tables
from benchmarks.pretraining import sweeps

TEXTS = {"stdlib": "standard library", "text": "speeches and news"}


def curves(model, finals, ratios, path):
    """Means over seeds; against time where all methods have raced."""
    texts = list(dict.fromkeys(key[1] for key in finals if key[0] == model))
    methods = [m for m in tables.NAMES if any((model, text, m) in finals for text in texts)]
    labels = ["steps", "time, in steps of AdamW", "optimizer state, MB"]
    if not ratios:
        labels.pop(1)
    figure, panels = pyplot.subplots(
        len(texts), len(labels), figsize=(4.4 * len(labels), 3.8 * len(texts)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for row, text in zip(panels, texts, strict=True):
        for index, method in enumerate(methods):
            results = [r for r in finals.get((model, text, method), {}).values() if r["curve"]]
            if not results:
                continue
            lengths = {len(result["curve"]) for result in results}
            curve = np.mean([np.asarray(r["curve"], float)[: min(lengths)] for r in results], 0)
            style = {"color": f"C{index}", "label": tables.NAMES[method]}
            row[0].plot(curve[:, 0], curve[:, 2], **style)
            if method in ratios:
                row[1].plot(curve[:, 0] * ratios[method][1], curve[:, 2], **style)
            row[-1].plot(results[0]["optimizer_state_bytes"] / 1e6, curve[-1, 2], "o", **style)
        row[0].set_ylabel(f"validation loss, {TEXTS[text]}")
        for axes, label in zip(row, labels, strict=True):
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def sweep(found, title, path):
    figure, axes = pyplot.subplots(figsize=(5.5, 3.8), layout="constrained")
    for method, by_value in found.runs.items():
        means = [np.mean(np.asarray(sweeps.losses(r), float)) for r in by_value.values()]
        axes.plot(list(by_value), means, "o-", label=tables.NAMES[method])
    axes.axhline(np.mean(sweeps.losses(found.adamw)), color="gray", linestyle="--", label="AdamW")
    axes.set(xscale="log", xlabel=title, ylabel="validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
