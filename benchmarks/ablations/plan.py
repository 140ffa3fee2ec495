"""One choice of LORENZA's changed at a time: what each is worth, and which default it led to.

Each variant is the tuned run of another experiment with one change: pre-training the smaller Llama
on Python's standard library, and fine-tuning on SST-2 and STS-B with 256 examples. Seeds and data
are those of the unchanged runs, so differences are paired. The learning rates stay as they were
tuned for the unchanged method, which favours it.
"""

from benchmarks import experiments, finetuning, pretraining
from benchmarks.ablations_report import again, report
from benchmarks.ablations_variants import VARIANTS

__all__ = ["again", "cells", "report", "run"]

TASKS = ("sst2", "stsb")
PRETRAINING_SEEDS = 2  # of three
PLACES = {"cpu": ("0.5M", 256), "full": ("60M", 1024)}  # the Llama; the number of examples


def cells(size):
    model, examples = PLACES[size]
    llamas = {
        (c["method"], c["seed"]): c
        for c in pretraining.cells(size)
        if (c["kind"], c["model"], c.get("text")) == ("final", model, "stdlib")
    }
    berts = {
        (c["method"], c["task"], c["seed"]): c
        for c in finetuning.cells(size)
        if c["kind"] == "final" and c["examples"] == examples
    }
    made = []
    for name, variant in VARIANTS.items():
        for seed in range(PRETRAINING_SEEDS if variant.pretraining else 0):
            base = llamas[variant.pretraining, seed]
            made.append(_changed(size, base, name, variant, "pretraining"))
    for name, variant in VARIANTS.items():
        for (method, task, _), base in berts.items():
            if method == variant.fine_tuning and task in TASKS:
                made.append(_changed(size, base, name, variant, "finetuning"))
    return made


def _changed(size, base, name, variant, experiment):
    kept = {key: value for key, value in base.items() if key not in ("needs", "id")}
    return kept | {
        "id": f"{base['id']}-{name}",
        "size": size,
        "variant": name,
        "experiment": experiment,
        "base": base["id"],
        "changes": variant.changes or {},
        "rate_factor": variant.rate_factor,
        "rho_factor": variant.rho_factor,
        "group": f"{experiment}-{name}-{base['group']}",
    }


def run(cell, display, needed):
    base = base_result(cell)
    changed = {**cell, "arguments": {**cell.get("arguments", {}), **cell["changes"]}}
    if cell["experiment"] == "pretraining":
        rates = {key: base[key] for key in ("matrices_rate", "others_rate")}
        rates["matrices_rate"] *= cell["rate_factor"]
        changed["rho"] *= cell["rho_factor"]
        return pretraining.train(changed, rates, display).result
    rates = {
        "learning_rate": base["learning_rate"] * cell["rate_factor"],
        "rho": base["rho"] * cell["rho_factor"],
    }
    return finetuning.fine_tune(changed, rates, display)


def base_result(cell):
    """The stored result of the unchanged run."""
    of = {"pretraining": pretraining, "finetuning": finetuning}[cell["experiment"]]
    [base] = [c for c in of.cells(cell["size"]) if c["id"] == cell["base"]]
    return experiments.of_another(cell["experiment"], base)["result"]
