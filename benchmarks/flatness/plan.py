"""The cells of flatness, made of those of fine-tuning and pre-training."""

from benchmarks import finetuning, pretraining
from benchmarks.pretraining import training

TASKS = ("sst2", "stsb")  # RTE and CoLA are left for later
METHODS = ("adamw", "galore", "sam", "lorenza_zo", "lorenza_subspace")
TEXTS = ("stdlib",)
LLAMA_METHODS = (
    "adamw", "galore", "fira", "lotus", "lorenza", "lorenza_subspace", "lorenza_plus", "muon",
)  # fmt: skip
EXAMPLES = {"cpu": 256, "full": None}  # to fine-tune on
SEEDS = range(3)

# Of each of the two sets: texts of 32 or 48 tokens, and sequences of 128.
MEASURED = {"finetuning": 64, "pretraining": 32}
SETTINGS = {
    # At most: five gave a residual of 0.3 % on SST-2, seven of 0.2 % on the Llama.
    "lanczos_steps": 12,
    "tolerance": 0.01,
    # SAM's radius. At 0.5 the loss of a fine-tuned model rises to 4, and nothing local is left.
    "rho": 0.05,
    "relative_rho": 0.5,  # adaptive SAM's is about ten times SAM's
    "ascent_steps": 5,
    "random_directions": 1,  # there and back, as a control: nothing rises in 22 M dimensions
}


def cells(size):
    small, *_ = training.MODELS[size]
    fine_tuned = [
        c for c in finetuning.cells(size)
        if c["kind"] == "final" and c["examples"] == EXAMPLES[size] and c["seed"] in SEEDS
        and c["task"] in TASKS and c["method"] in METHODS
    ]  # fmt: skip
    pre_trained = [
        c for c in pretraining.cells(size)
        if c["kind"] == "final" and c["model"] == small and c["seed"] in SEEDS
        and c["text"] in TEXTS and c["method"] in LLAMA_METHODS
    ]  # fmt: skip
    return [_cell("finetuning", c) for c in fine_tuned] + [
        _cell("pretraining", c)
        # All seeds of a method together: they share its program.
        for c in sorted(pre_trained, key=lambda c: LLAMA_METHODS.index(c["method"]))
    ]


def _cell(kind, source):
    return {
        "id": f"{kind}-{source['id']}",
        "kind": kind,
        "task": source["task"] if kind == "finetuning" else source["text"],
        "method": source["method"],
        "seed": source["seed"],
        "source": source,
        "measured": MEASURED[kind],
        **SETTINGS,
        "group": f"{kind}-{source['group']}",
        "work": 1,
    }
