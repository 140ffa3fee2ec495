"""The cells of fine-tuning, and the choice among the trials of a tuning."""

import math
import statistics
from typing import NamedTuple

from benchmarks.finetuning.methods import FIRST, HELD_OUT, LONGER, METHODS, REST, ROUND, SLOW

# Apart from those of the final runs, so that none of these has helped to choose. The second draw is
# for the better half of the first: the luck of one may exceed what lies between two trials.
TUNING_SEEDS = (1000, 1001)


class Size(NamedTuple):
    examples: tuple  # None for all
    seeds: int
    max_len: dict  # tokens in training and in scoring; longer texts are cut
    epochs: dict  # by number of examples
    tuned_at: dict  # number of examples at which the hyperparameters are chosen, by the same
    groups: dict  # by number of examples, (methods, tasks), each finished before the next
    tuned_on: dict  # by task, if not itself, that whose tuning serves it, too
    shared: dict  # settings
    # (size, number of examples) of the tuning that this one starts from: it tries three rates round
    # the one that was chosen there, at its radius.
    starts_at: tuple | None = None


# On a CPU a step takes time in proportion to the length: in training these cut 1 % of CoLA, 5 % of
# SST-2, 10 % of STS-B and two fifths of RTE, whose longest texts have 250 tokens.
SHORT = {"cola": (24, 32), "stsb": (48, 64), "sst2": (32, 64), "rte": (64, 96)}
# These cut nothing but some of RTE.
LONG = {"cola": (48, 48), "stsb": (128, 128), "sst2": (64, 64), "rte": (256, 256)}
# Of so few examples a model of this size learns of CoLA and RTE little more than chance.
LEARNED, HARD = ("stsb", "sst2"), ("cola", "rte")
PLANS = {
    "cpu": Size(
        (256, 1024, None), 3, SHORT, {256: 4, 1024: 3, None: 1}, {256: 256, 1024: 256, None: 256},
        {
            256: (
                (FIRST, LEARNED), (REST, LEARNED), (FIRST, HARD), ((*SLOW, *LONGER), ("sst2",)),
            ),
            1024: ((FIRST, LEARNED),),
            None: ((FIRST, ("stsb",)),),
        },
        dict.fromkeys(HARD, "sst2"),
        {"batch_size": 16, "rank": 8, "update_proj_gap": 20},
    ),
    # In GLUE's own sizes a model of this size learns of the hard tasks, too.
    "full": Size(
        (None,), 3, LONG, {None: 3}, {None: None},
        {None: ((FIRST, ("stsb", *HARD)), (FIRST, ("sst2",)), (REST, LEARNED))},
        {},
        {"batch_size": 32, "rank": 8, "update_proj_gap": 100},
        starts_at=("cpu", 256),
    ),
}  # fmt: skip


def cells(size):
    plan, made = PLANS[size], []
    for examples in plan.examples:
        for names, tasks in plan.groups[examples]:
            for task in tasks:
                for name in names:
                    made += _of_method(size, plan, examples, task, name)
    return made


def _of_method(size, plan, examples, task, name):
    method, (train_len, score_len) = METHODS[name], plan.max_len[task]
    epochs = method.longer * plan.epochs[examples]
    # In forward passes of a token; all examples are a guess, made without the data.
    work = method.passes * train_len * (examples or 8000) * epochs
    common = {
        "task": task,
        "method": name,
        "examples": examples,
        "epochs": epochs,
        "train_len": train_len,
        "score_len": score_len,
        **plan.shared,
        "group": f"{size}-{task}-{name}",
    }
    # The tuning of another number of examples, or of another task, may serve this one.
    prefix = f"{size}-{{}}-{task}-{name}"
    tuned_at, tuned_on = plan.tuned_at[examples], plan.tuned_on.get(task, task)
    start = {}
    if plan.starts_at:
        start = {"start": _start(*plan.starts_at, task, name)}
    elif method.radii:
        start = {"needs": _tuning_of(size, tuned_at, tuned_on, method.middle)}
    tuning = [
        {
            "id": f"{prefix.format(tuned_at or 'all')}-tune{index}",
            "kind": "tuning",
            **common,
            **trial,
            "seed": TUNING_SEEDS[0],
            **start,
            "work": work + HELD_OUT * score_len,
        }
        for index, trial in enumerate(_trials(plan, name))
    ]
    again = [
        {
            "id": f"{prefix.format(tuned_at)}-again{place}",
            "kind": "tuning",
            **common,
            "place": place,
            "seed": TUNING_SEEDS[1],
            "needs": [cell["id"] for cell in tuning],
            "work": work + HELD_OUT * score_len,
        }
        for place in range(_second_draws(plan, name))
    ]
    final = [
        {
            "id": f"{prefix.format(examples or 'all')}-seed{seed}",
            "kind": "final",
            **common,
            "seed": seed,
            "needs": _tuning_of(size, tuned_at, tuned_on, name),
            "work": work + 1000 * score_len,
        }
        for seed in range(plan.seeds)
    ]
    return [*tuning, *again, *final] if (tuned_at, tuned_on) == (examples, task) else final


def _trials(plan, name):
    """What each trial sets, of a tuning of its own or of one that goes on from another."""
    method = METHODS[name]
    if plan.starts_at is None:
        return method.trials()
    return [{"rate_factor": method.factor**power} for power in ROUND]


def _second_draws(plan, name):
    return 0 if plan.starts_at else len(_trials(plan, name)) // 2


def _tuning_of(size, examples, task, name):
    """Ids of all trials of a method."""
    plan = PLANS[size]
    of = [f"tune{index}" for index in range(len(_trials(plan, name)))]
    of += [f"again{place}" for place in range(_second_draws(plan, name))]
    return [f"{size}-{examples or 'all'}-{task}-{name}-{suffix}" for suffix in of]


def _start(size, examples, task, name):
    """Ids of another size's trials, of the task's own tuning or that which serves it."""
    return _tuning_of(size, examples, PLANS[size].tuned_on.get(task, task), name)


def borrowed_tunings(cells):
    """(task, the task whose tuning it takes), where these are not the same."""
    pairs = {
        (cell["task"], need.split("-")[2])
        for cell in cells
        if cell["kind"] == "final"
        for need in cell.get("needs", ())
    }
    return sorted(pair for pair in pairs if len(set(pair)) == 2)


def ranked(results):
    """The trials, the best first: of most draws, then by their mean metric, then by mean loss.

    Of a trial that was scored on several draws, one result stands for all.
    """
    draws = {}
    for result in results:
        draws.setdefault((result["learning_rate"], result["rho"]), []).append(result)
    return [found[0] for found in sorted(draws.values(), key=_merit, reverse=True)]


def _merit(draws):
    metrics = [next(iter(result["metrics"].values())) for result in draws]
    losses = [result["loss"] for result in draws]
    if None in metrics or None in losses:
        return len(draws), -math.inf, -math.inf
    return len(draws), statistics.fmean(metrics), -statistics.fmean(losses)
