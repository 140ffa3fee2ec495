"""The cells of memory: shapes, ranks and methods, batches and dtypes."""

from benchmarks.memory.deviceless import H100
from benchmarks.memory.methods import METHODS

# (preset, ranks), the GaLore paper's rank first; what matters most is first, too.
SHAPES = (
    ("7B", (1024, 128, 8)), ("60M", (128,)), ("1B", (512,)), ("350M", (256,)), ("130M", (256,)),
)  # fmt: skip
BATCH = (1, 256)
LARGER_BATCHES = (("7B", 128, (16, 256)), ("60M", 128, (64, 256)))
AT_LARGER = ("adamw", "lora", "galore_randomized", "lorenza_sketch")
UNROLLED = ("adamw", "galore_optax", "galore_randomized", "lorenza", "lorenza_sketch")
OTHER_DTYPE = ("adamw", "lorenza_sketch")
STEPS = {"cpu": 2, "full": 6}  # the first refreshes, and in the last the clock is warm
RUN = ("adamw", "lora", "lorenza")
# At these, which lie between others, a CPU compiles a part of the methods only.
BETWEEN = ("350M", "130M")
CORE = ("adamw", "adafactor", "lora", "galore_randomized", "lorenza", "lorenza_sketch",
        "lorenza_least")  # fmt: skip
ROBERTA_RANKS = (4, 8)
# Compiled for a GPU, too. SVDs of whole matrices are left out: of such a size none would wait.
PLANNED = ("adamw", "adamw_int8", "adafactor", "lora", "galore_randomized", "galore_sketch",
           "lorenza", "lorenza_sketch", "lorenza_int8", "lorenza_least")  # fmt: skip


def cells(size):
    dtype = "float32" if size == "cpu" else "bfloat16"
    made = []
    for preset, ranks in SHAPES:
        for rank in ranks:
            for name, method in METHODS.items():
                left_out = size == "cpu" and preset in BETWEEN and name not in CORE
                if left_out or not method.scanned:
                    continue
                if method.has_rank or rank == ranks[0]:
                    cell = _cell(size, preset, name, rank, dtype=dtype)
                    if preset == "60M" and name in RUN:
                        cell["steps"] = STEPS[size]
                    made.append(cell)
    for preset, rank, batch in LARGER_BATCHES:
        made += [_cell(size, preset, name, rank, dtype=dtype, batch=batch) for name in AT_LARGER]
    made += [_cell(size, "60M", name, 128, dtype=dtype, scanned=False) for name in UNROLLED]
    if size == "cpu":
        made += [_cell(size, "7B", name, 128, dtype="bfloat16") for name in OTHER_DTYPE]
        made += [_counted(size, rank) for rank in ROBERTA_RANKS]
        made += _for_a_gpu(*SHAPES[0])
    return made


def _for_a_gpu(preset, ranks):
    """The largest, compiled on a CPU for a GPU, in its usual dtype."""
    made = []
    for rank in ranks:
        for name, method in METHODS.items():
            if name in PLANNED and (method.has_rank or rank == ranks[0]):
                cell = _cell("gpu", preset, name, rank, dtype="bfloat16")
                made.append({**cell, "target": H100, "group": "target"})
    return made


def _cell(size, preset, name, rank, *, dtype, batch=BATCH, scanned=True):
    method = METHODS[name]
    rank = rank if method.has_rank else None
    parts = [size, preset, name, f"r{rank}" if method.has_rank else ""]
    parts += ["x".join(map(str, batch)) if batch != BATCH else "", "" if scanned else "unrolled"]
    parts += ["bf16" if size == "cpu" and dtype == "bfloat16" else ""]
    return {
        "id": "-".join(part for part in parts if part),
        "kind": "step",
        "preset": preset,
        "method": name,
        "rank": rank,
        "batch": list(batch),
        "dtype": dtype,
        "scanned": scanned,
        # All run on a GPU, on a CPU a few of the smallest.
        "steps": STEPS[size] if size == "full" else 0,
        "seed": 0,
        "group": f"{name}-{scanned}",
    }


def _counted(size, rank):
    return {"id": f"{size}-roberta-r{rank}", "kind": "count", "rank": rank, "group": "count"}
