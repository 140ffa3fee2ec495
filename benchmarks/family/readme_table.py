"""The README's table of the family, from benchmarks/results/family.json.

    python -m benchmarks.family.readme_table

`python -m benchmarks.family` makes the numbers; what is said of each method is here.
"""

import json

from benchmarks import experiments

RESULTS = experiments.RESULTS / "family.json"


# What each keeps for a matrix (k, l), k the compressed side; passes of a step in units of one
# forward pass (3: forward, and twice as much backward); when to choose it.
ROWS = {
    "adamw": ("2 k l", 3, "it fits, and you want no surprises", None),
    "lorenza": ("2 r l + r (k + l)", 5, "the ascents of this page, in low rank", "../_lorenza"),
    "lorenza_plus": ("2 r l + r (k + l)", 5, "LORENZA, with a full gradient to spare",
                     "../_lorenza_plus"),
    "adazo_sam": ("2 k l", 5, "Adam's memory fits, and generalization is what lacks",
                  "../_zo_sam"),
    "sam": ("2 k l", 6, "the reference of sharpness; time is no concern", "_sam"),
    "asam": ("2 k l", 6, "SAM where layers differ in scale", "_sam"),
    "galore": ("2 r l + r k", 3, "the baseline of low rank", "_galore"),
    "fira": ("2 r l + r k", 3, "GaLore lags behind Adam, and gradients fit", "_fira"),
    "apollo": ("2 r l", 3, "no decomposition at all; ranks down to 1", "_apollo"),
    "vlorp": ("r l + k + l", 3, "accumulation over many micro-batches", "_vlorp"),
    "projfactor": ("r l + r k + k + l", 3, "GaLore at half the moments", "_projfactor"),
    "flora": ("r l + k + l", 3, "gradients fit, and next to nothing else", "_flora"),
    "lotus": ("3 r l + r k", 3, "you do not know how often to refresh", "_lotus"),
    "gradnormlorp": ("2 r l + r k", 3, "fine-tuning with weight normalization", "_gradnormlorp"),
    "gum": ("r l + r k, and k l of a few", 3, "Muon, in the memory of low rank", "_gum"),
    "cosmos": ("k l + r l + r k", 3, "one momentum of full size fits, but not two", "_cosmos"),
    "owlore": ("2 r l + r k of a few layers", 3, "very deep models", "_owlore"),
    "mezo": ("nothing", 2, "only inference fits", "_mezo"),
    "lozo": ("nothing", 2, "MeZO without a full-size perturbation", "_lozo"),
    "lozo_m": ("r l", 2, "LOZO, with momentum for little", "_lozo_m"),
    "subzero": ("r (k + l)", 2, "MeZO between two fixed small subspaces", "_subzero"),
    "zo_muon": ("r k", 5, "several probes a step pay off", "_zo_muon"),
}  # fmt: skip


def markdown(stored):
    start = stored["initial_validation_loss"]
    lines = [
        "| method | keeps, a matrix | state at 60M | passes | main job's loss | choose it when |",
        "|---|---|---|---|---|---|",
    ]
    adamw = stored["methods"]["adamw"]["state_bytes_60M"]
    for name, (keeps, passes, when, file) in ROWS.items():
        result = stored["methods"].get(name)
        if result is None:
            continue
        size, best = result["state_bytes_60M"], result["best"]
        title = f"`{name}`"
        if file is not None:
            path = f"lorenza_optax/methods/{file}.py".replace("methods/../", "")
            title = f"[{title}]({path})"
        lines.append(
            f"| {title} | {keeps} | {size / 1e6:.1f} MB ({size / adamw:.2f}x) | {passes} |"
            f" {best['validation_loss']:.3f} | {when} |"
        )
    return "\n".join(lines) + f"\n\nAt the start {start:.3f}."


if __name__ == "__main__":
    print(markdown(json.loads(RESULTS.read_text())))
