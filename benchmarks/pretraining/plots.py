"""The plots of pre-training: losses against steps, time and state; sweeps."""

import numpy as np
from matplotlib import pyplot

from benchmarks import tables

TEXTS = {"stdlib": "standard library", "text": "speeches and news"}


def curves(model, finals, ratios, path):
    texts = list(dict.fromkeys(key[1] for key in finals if key[0] == model))
    figure, panels = pyplot.subplots(
        len(texts), 3, figsize=(13, 3.8 * len(texts)), layout="constrained", squeeze=False
    )
    for row, text in zip(panels, texts, strict=True):
        for index, method in enumerate(tables.NAMES):
            if not (results := finals.get((model, text, method))):
                continue
            curve = np.asarray(next(iter(results.values()))["curve"])
            state = next(iter(results.values()))["optimizer_state_bytes"] / 1e6
            if not curve.size:
                continue
            style = {"color": f"C{index}", "label": tables.NAMES[method]}
            row[0].plot(curve[:, 0], curve[:, 2], **style)
            if method in ratios:
                row[1].plot(curve[:, 0] * ratios[method][1], curve[:, 2], **style)
            row[2].plot(state, curve[-1, 2], "o", **style)
        row[0].set_ylabel(f"validation loss, {TEXTS[text]}")
        for axes, label in zip(
            row, ("steps", "time, in steps of AdamW", "optimizer state, MB"), strict=True
        ):
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def sweep(found_of, title, adamw, path):
    figure, axes = pyplot.subplots(figsize=(5.5, 3.8), layout="constrained")
    for method, found in found_of.items():
        axes.plot(
            list(found), [np.mean(v) for v in found.values()], "o-", label=tables.NAMES[method]
        )
    if adamw is not None:
        axes.axhline(adamw, color="gray", linestyle="--", label="AdamW")
    axes.set(xscale="log", xlabel=title, ylabel="validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
