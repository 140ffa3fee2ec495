"""The cells of the ablations, made of the unchanged ones."""

from benchmarks import finetuning, pretraining
from benchmarks.ablations.variants import VARIANTS

TASKS = ("sst2", "stsb")
# The Llama, the larger one, the number of examples.
PLACES = {"cpu": ("0.5M", "1.9M", 256), "full": ("60M", "130M", None)}


def cells(size):
    model, larger, examples = PLACES[size]
    llamas = [
        c for c in pretraining.cells(size)
        if c["kind"] == "final" and (c["model"] == larger or c["text"] == "stdlib")
    ]  # fmt: skip
    berts = {
        (c["method"], c["task"], c["seed"]): c
        for c in finetuning.cells(size)
        if c["kind"] == "final" and c["examples"] == examples
    }
    made = []
    for name, variant in VARIANTS.items():
        models = (model, larger) if variant.also_larger else (model,)
        for base in llamas:
            if base["method"] == variant.pretraining and base["model"] in models:
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
