"""Training a run with its change, at the learning rates of the unchanged one."""

from benchmarks import experiments, finetuning, pretraining
from benchmarks.finetuning.training import fine_tune
from benchmarks.pretraining.training import train


def run(cell, display, needed):
    changed = {**cell, "arguments": {**cell.get("arguments", {}), **cell["changes"]}}
    of = rates(cell, base_result(cell))
    if cell["experiment"] == "pretraining":
        changed["rho"] *= cell["rho_factor"]
        return train(changed, of, display).result
    return fine_tune(changed, of, display)


def rates(cell, base):
    """What was tuned for the unchanged run, with the cell's change of it."""
    if cell["experiment"] == "pretraining":
        return {
            "matrices_rate": base["matrices_rate"] * cell["rate_factor"],
            "others_rate": base["others_rate"],
        }
    return {
        "learning_rate": base["learning_rate"] * cell["rate_factor"],
        "rho": base["rho"] * cell["rho_factor"],
    }


def base_result(cell):
    """The stored result of the unchanged run."""
    of = {"pretraining": pretraining, "finetuning": finetuning}[cell["experiment"]]
    [base] = [c for c in of.cells(cell["size"]) if c["id"] == cell["base"]]
    return experiments.of_another(cell["experiment"], base)["result"]
