"""The README's table of ascents: what each finds and costs, from the stored results.

    python -m benchmarks.ascent.readme_table

Reads results/ascent.json and results/step_cost.json, and runs nothing.
"""

import json

from benchmarks import experiments

# How the README calls an ascent, and the two scripts.
ROWS = {
    '`rho=0`, or `"none"`': (None, "rho=0"),
    '`"zo"`, as published': ("zo, q=1", "zo, q=1"),
    '`"zo"`, `num_probes=4`': ("zo, q=4", "zo, q=4"),
    '`"momentum"`': ("momentum", "momentum"),
    '`"signed_momentum"`': ("signed_momentum", "signed_momentum"),
    '`"subspace"`': ("subspace", "subspace"),
    "SAM round AdamW (`optax.contrib.sam`)": ("SAM", "sam"),
    "`optax.contrib.galore`": (None, "galore"),
}
TASKS = {"main_job": "pre-training", "sst2": "SST-2", "rte": "RTE"}


def load(name):
    return json.loads((experiments.RESULTS / f"{name}.json").read_text())


def markdown(ascent, step_cost):
    tasks = {name: heading for name, heading in TASKS.items() if name in ascent["tasks"]}
    radius = str(ascent["arguments"]["rho"])
    costs = step_cost["A"]["optimizers"]
    lines = [
        f"| ascent | SAM's rise it finds: {', '.join(tasks.values())} | passes | time of a step"
        " | temporary memory |",
        "|---|---|---|---|---|",
    ]
    for label, (found, cost) in ROWS.items():
        share = passes = "-"
        if found is not None:
            rows = [ascent["tasks"][task]["choices"][found] for task in tasks]
            share = ", ".join(f"{100 * row['share'][radius]:.0f} %" for row in rows)
            passes = f"{rows[0]['passes']:g}"
        row = costs[cost]
        lines.append(
            f"| {label} | {share} | {passes} | {row['time_ratio']:.2f}x"
            f" | {row['extra_copies']:+.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(load("ascent"), load("step_cost")))
