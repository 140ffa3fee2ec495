"""The findings on fine-tuning, in words that the intervals choose."""

import glue
from benchmarks import tables

BASELINES = ("galore", "adamw", "sam")
SUBJECTS = ("lorenza_zo", "lorenza_subspace", "lorenza_plus", "galore")


def average(found, tasks):
    """That of the tasks which were tuned themselves, or that of the only task; or None."""
    if len(tasks) == 1:
        return found.get(*tasks)
    return next((of for name, of in found.items() if name.startswith("average")), None)


def of_number(differences, examples, tasks):
    """One for a number of examples: who is above whom, and who is not told apart."""
    parts = []
    for method in SUBJECTS:
        found = {
            baseline: mean
            for baseline in BASELINES
            if (mean := average(differences.get((method, baseline), {}), tasks))
        }
        by_verdict = {}
        for baseline, mean in found.items():
            text = f"{tables.NAMES[baseline]} {mean.shown()}"
            by_verdict.setdefault(_verdict(mean), []).append(text)
        verdicts = [f"{verdict} {', '.join(of)}" for verdict, of in by_verdict.items()]
        if verdicts:
            parts.append(f"{tables.NAMES[method]} is {' and '.join(verdicts)}")
    names = " and ".join(glue.TASKS[task].folder for task in tasks)
    return parts and f"{examples}, {names}: {'; '.join(parts)}."


def _verdict(difference):
    if difference.low is not None and difference.low > 0:
        return "above"
    if difference.high is not None and difference.high < 0:
        return "below"
    return "not told apart from"


def together(size, parts):
    """The published claim is of LORENZA against low-rank baselines."""
    text = (
        f"**Accuracy.** Fine-tuning ({size} size), differences in points, of the average where "
        "there are several tasks. Reported of the paper, over low-rank baselines: +2.8 %."
    )
    return ["\n  - ".join([text, *parts])] if parts else []
