"""The cells of pre-training."""

from benchmarks.pretraining.methods import METHODS
from benchmarks.pretraining.training import MODELS

TUNING_SEED = 1000
TEXTS = ("stdlib", "text")  # Python's standard library; the zips of speeches and news
SHARED = {"batch_size": 8, "seq_len": 128, "update_proj_gap": 20, "rho": 0.05, "arguments": {}}
FULL = {"batch_size": 128, "seq_len": 256, "update_proj_gap": 100}
SWEPT = ("lorenza", "galore")
RANKS = {"0.5M": (4, 8, 16, 48, 96), "60M": (8, 32, 64, 256, 512)}  # and the model's own
RETUNED = {"0.5M": 48, "60M": 256}  # the rank of them that has a tuning of its own
GAPS = {"0.5M": (5, 10, 50, 100, 250), "60M": (20, 50, 200, 500, 2000)}  # and the shared one


def cells(size):
    models = MODELS[size]
    small, *_ = models
    made = []
    for model in models:
        for method in METHODS:
            made += tuning_cells(size, model, method)
    made += [
        _final(size, model, text, method, seed)
        for seed in range(models[small].seeds)  # one whole table before the next seed
        for model in models
        if seed < models[model].seeds
        for text in TEXTS
        for method in METHODS
    ]
    made += [_race(size, model) for model in models]
    made += [
        _swept(size, small, method, {key: value}, seed)
        for key, values in (("rank", RANKS[small]), ("update_proj_gap", GAPS[small]))
        for value in values
        for method in SWEPT
        for seed in range(2)
    ]
    for method in SWEPT:
        made += _retuned(size, small, method, range(models[small].seeds))
    return made


def tuning_cells(size, model, method, prefix=""):
    trials = METHODS[method].trials(model == next(iter(MODELS[size])))
    return [
        _cell(size, model, "stdlib", method, TUNING_SEED, f"{prefix}tune{index}") | {
            "kind": "tuning", "matrices_rate": matrices, "others_rate": others,
        }
        for index, (matrices, others) in enumerate(trials)
    ]  # fmt: skip


def _final(size, model, text, method, seed):
    return _cell(size, model, text, method, seed, f"seed{seed}") | _needs(size, model, method)


def _swept(size, model, method, changed, seed):
    ((key, value),) = changed.items()
    short = {"rank": "r", "update_proj_gap": "T"}[key]
    made = _cell(size, model, "stdlib", method, seed, f"{short}{value}-seed{seed}")
    return made | changed | {"kind": "sweep", "swept": key} | _needs(size, model, method)


def _retuned(size, model, method, seeds):
    rank = RETUNED[model]
    prefix = f"r{rank}-tuned-"
    trials = [cell | {"rank": rank} for cell in tuning_cells(size, model, method, prefix)]
    more = {"kind": "retuned", "rank": rank, "needs": [cell["id"] for cell in trials]}
    return trials + [
        _cell(size, model, "stdlib", method, seed, f"{prefix}seed{seed}") | more for seed in seeds
    ]


def _race(size, model):
    """All methods in turns in one process: only so do times compare on a busy machine."""
    made = _cell(size, model, "stdlib", "adamw", 0, "race")
    del made["method"]
    return made | {
        "id": f"{size}-{model}-race",
        "kind": "race",
        "steps": 2 * made["update_proj_gap"],
        "methods": list(METHODS),
        "group": "race",
    }


def _needs(size, model, method):
    return {"needs": [cell["id"] for cell in tuning_cells(size, model, method)]}


def _cell(size, model, text, method, seed, suffix):
    of_model = MODELS[size][model]
    return {
        "id": f"{size}-{model}-{text}-{method}-{suffix}",
        "kind": "final",
        "size": size,
        "model": model,
        "text": text,
        "method": method,
        "seed": seed,
        "steps": of_model.steps,
        "rank": of_model.rank,
        **SHARED,
        **(FULL if size == "full" else {}),
        "group": f"{size}-{model}-{method}",
        "work": of_model.steps * of_model.work * METHODS[method].passes,
    }
