"""Training a run with its change, at the learning rates of the unchanged one."""

from benchmarks import experiments, finetuning, pretraining
from benchmarks.finetuning.training import fine_tune
from benchmarks.pretraining.training import train


def run(cell, display, needed):
    base = base_result(cell)
    changed = {**cell, "arguments": {**cell.get("arguments", {}), **cell["changes"]}}
    if cell["experiment"] == "pretraining":
        rates = {key: base[key] for key in ("matrices_rate", "others_rate")}
        rates["matrices_rate"] *= cell["rate_factor"]
        changed["rho"] *= cell["rho_factor"]
        return train(changed, rates, display).result
    rates = {
        "learning_rate": base["learning_rate"] * cell["rate_factor"],
        "rho": base["rho"] * cell["rho_factor"],
    }
    return fine_tune(changed, rates, display)


def base_result(cell):
    """The stored result of the unchanged run."""
    of = {"pretraining": pretraining, "finetuning": finetuning}[cell["experiment"]]
    [base] = [c for c in of.cells(cell["size"]) if c["id"] == cell["base"]]
    return experiments.of_another(cell["experiment"], base)["result"]
