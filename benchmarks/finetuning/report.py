"""The part of RESULTS.md on fine-tuning: scores, paired differences, what the tuning chose."""

import statistics

import glue
from benchmarks import experiments, tables
from benchmarks.finetuning import findings, paired, plots
from benchmarks.finetuning.findings import BASELINES
from benchmarks.finetuning.methods import HELD_OUT, METHODS
from benchmarks.finetuning.plan import borrowed_tunings

TUNED = ("learning_rate", "rho")


def report(size, cells, records, folder):
    found, body = [], []
    # In the order of the cells.
    for examples in dict.fromkeys(cell["examples"] for cell in cells):
        here = [cell for cell in cells if cell["examples"] == examples]
        if not any(cell["id"] in records for cell in here):
            continue
        done = sum(cell["id"] in records for cell in here)
        title = "All examples" if examples is None else f"{examples} examples"
        body += ["", f"### {title} ({size} size)", "", f"{done} of {len(here)} cells are finished."]
        runs = _finished(here, records)
        if not runs:
            continue
        methods, tasks = (tuple(dict.fromkeys(key[i] for key in runs)) for i in (0, 1))
        averages = _averages(here, tasks)
        averaged = next(iter(averages.values()), tasks)
        body += ["", *_scores(runs, methods, tasks, averages)]
        differences = {
            (method, baseline): of
            for baseline in BASELINES
            for method in methods
            if method != baseline and (of := _differences(runs, method, baseline, tasks, averages))
        }
        for baseline in BASELINES:
            body += ["", *_differences_table(differences, baseline, methods, tasks, averages)]
        if differences:
            path = folder / f"differences-{size}-{examples or 'all'}.png"
            points = {
                key: mean
                for key, of in differences.items()
                if (mean := findings.average(of, averaged))
            }
            plots.differences(points, BASELINES, path)
            text = f"Differences of the average over tasks, {title.lower()}"
            body += ["", f"![{text}](results/{folder.name}/{path.name})"]
        body += [
            "",
            *_chosen(runs, methods, tasks, _offered(here, records), _tuned_at(here)),
            "",
            *_costs(runs, methods, tasks),
        ]
        if part := findings.of_number(differences, title, averaged):
            found.append(part)
    return experiments.Section(findings.together(size, found), [*_explanation(cells), *body])


def again(size, cells, records):
    """One run for each number of examples, of LORENZA where there is one."""
    expected = {}
    for cell in sorted(cells, key=lambda cell: cell["method"] != "lorenza_zo"):
        key = cell["examples"]
        if cell["kind"] == "final" and cell["id"] in records and key not in expected:
            name = glue.TASKS[cell["task"]].metrics[0]

            def value(result, name=name):
                return result["metrics"][name]

            stored = value(records[cell["id"]]["result"])
            edges = stored - tables.SAME_SCORE, stored + tables.SAME_SCORE
            expected[key] = experiments.Expectation(cell["id"], name, value, *edges)
    return list(expected.values())


def _finished(cells, records):
    """{(method, task): results of its seeds}, of those of which every seed is finished."""
    seeds = {}
    for cell in cells:
        if cell["kind"] == "final":
            record = records.get(cell["id"])
            seeds.setdefault((cell["method"], cell["task"]), []).append(record)
    return {
        key: [record["result"] for record in found] for key, found in seeds.items() if all(found)
    }


def _explanation(cells):
    cell = cells[0]
    budgets = {c["examples"]: c["epochs"] for c in cells if METHODS[c["method"]].longer == 1}
    steps = ", ".join(
        f"{examples or 'all'} examples {epochs} epoch{'s' * (epochs > 1)}"
        + (f" ({examples * epochs // cell['batch_size']} steps)" if examples else "")
        for examples, epochs in budgets.items()
    )  # fmt: skip
    pairs = [[glue.TASKS[task].folder for task in pair] for pair in borrowed_tunings(cells)]
    borrowed = "".join(f" {task} takes what was tuned on {other}." for task, other in pairs)
    return [
        f"MiniLM-L6 (22.6 M parameters) on RTE, CoLA, SST-2 and STS-B, in batches of "
        f"{cell['batch_size']} ({steps}), AdamW's weight decay and one schedule for all; low-rank "
        f"methods at rank {cell['rank']}, T = {cell['update_proj_gap']}. {_tuning(cell)}{borrowed} "
        f"It is then trained {_trained(budgets.keys())}, and scored on the development set; of one "
        "seed all methods see the same examples in the same order. Scores are in points (100 times "
        "the metric): accuracy for RTE and SST-2, Matthews' correlation for CoLA, Pearson's for "
        "STS-B.",
        "",
        "Intervals are of 95 %, by Student's t, over seeds and over the examples that score: the "
        "variance of the paired differences between seeds, though no less than what the examples "
        "alone explain of it, and what all seeds have in common by the choice of examples. They do "
        "not hold what the choice of the hyperparameters adds.",
        "",
        "Toward the published gain were tried: two radii for each ascent, and others under "
        "ablations below, the exact direction in the subspace, and SAM's in full space. The gain "
        "is quoted from a summary of the paper, which names neither the models and tasks that it "
        "is the average of nor its unit.",
    ]


def _tuning(cell):
    if "start" in cell:
        return (
            "Each method has three trials of tuning, which differ from the choice with few "
            "examples (for CoLA and RTE that of SST-2) by factors of 1/2, 1 and 2 in the learning "
            f"rate, at its radius. They are scored on {HELD_OUT} examples of the train set that "
            "they are not trained on, and the best is chosen."
        )
    return (
        "(LOZO is at rank 2 and T = 50, its own, with embeddings among its matrices.) "
        "Texts are cut, to fewer tokens in training than in scoring ([PLAN.md](PLAN.md)). "
        "Each method has six trials of tuning: six learning rates, a factor of 2 apart (LOZO and "
        "MeZO 4), or, where there is a radius, two radii at three rates round the rate that was "
        "tuned for the same method without perturbation (AdamW, GaLore, Fira), whose tuning serves "
        f"them, too. They are scored on {HELD_OUT} other examples of the train set; the better "
        "three are trained and scored on a second draw, too, and the one with the best mean is "
        "chosen. (This is the third design; two were given up after final runs had been seen.)"
    )


def _trained(numbers):
    of_few = ["on other draws, one for each seed"] * (numbers != {None})
    of_all = ["on all examples, in another order and from another head for each seed"]
    return " or ".join(of_few + of_all * (None in numbers))


def _points(result, name):
    value = result["metrics"][name]
    return 0.0 if value is None else 100 * value  # a run that diverged has learned nothing


def _averages(cells, tasks):
    """{column: the tasks that it averages}, first those that were tuned themselves."""
    others = {task for task, _ in borrowed_tunings(cells)}
    own = tuple(task for task in tasks if task not in others)
    found = {"average" if own == tasks else f"average of {' and '.join(own)}": own, "all": tasks}
    return {name: of for name, of in found.items() if len(of) > 1 and (name != "all" or own != of)}


def _scores(runs, methods, tasks, averages):
    rows = []
    for method in methods:
        row, means = [tables.NAMES[method]], {}
        for task in tasks:
            results = runs.get((method, task))
            if results is None:
                row.append("-")
                continue
            columns = [[_points(r, name) for r in results] for name in glue.TASKS[task].metrics]
            means[task] = statistics.fmean(columns[0])
            row.append(" / ".join(_mean_and_deviation(values) for values in columns))
        for of in averages.values():
            mean = statistics.fmean(means.get(task, 0) for task in of)
            row.append(f"{mean:.1f}" if means.keys() >= set(of) else "-")
        rows.append(row)
    titles = [f"{t} ({' / '.join(glue.TASKS[t].metrics)})" for t in tasks]
    titles += averages
    seeds = len(next(iter(runs.values())))
    return [
        f"Mean over {seeds} seeds and, after ±, their standard deviation. Averages are of the "
        "first metric of each task, and missing where a task is.",
        "",
        *tables.markdown(["method", *titles], rows),
    ]


def _mean_and_deviation(values):
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _differences(runs, method, baseline, tasks, averages):
    """{task or average: Difference in points}, of tasks that both have."""
    parts = {
        task: paired.of_results(task, runs[method, task], runs[baseline, task], index)
        for index, task in enumerate(tasks)
        if (method, task) in runs and (baseline, task) in runs
    }
    found = {task: paired.interval([part]) for task, part in parts.items()}
    for name, of in averages.items():
        if parts.keys() >= set(of):
            found[name] = paired.interval([parts[task] for task in of])
    return found


def _differences_table(differences, baseline, methods, tasks, averages):
    columns = [*tasks, *averages]
    rows = [
        [tables.NAMES[method], *(_interval(found.get(name)) for name in columns)]
        for method in methods
        if (found := differences.get((method, baseline)))
    ]
    if not rows:
        return [f"Nothing to compare with {tables.NAMES[baseline]} yet."]
    return [
        f"Points above {tables.NAMES[baseline]}, with intervals of 95 %:",
        "",
        *tables.markdown(["method", *columns], rows),
    ]


def _interval(difference):
    return "-" if difference is None else difference.shown()


def _offered(cells, records):
    """{(method, task): {what was tuned: values that were tried}}."""
    found = {}
    for cell in cells:
        tried = [need for need in cell.get("needs", ()) if cell["kind"] == "final"]
        of = found.setdefault((cell["method"], cell["task"]), {key: set() for key in TUNED})
        for need in tried:
            for key, values in of.items():
                if need in records:
                    values.add(records[need]["result"][key])
    return found


def _tuned_at(cells):
    """Of whose tuning the runs are, if not of so many examples."""
    if any(cell["kind"] == "tuning" for cell in cells):
        return ""
    others = {need.split("-")[1] for cell in cells for need in cell.get("needs", ())}
    return f" (with {' or '.join(others)} examples, which serves here, too)" if others else ""


def _chosen(runs, methods, tasks, offered, tuned_at):
    def cell(method, task):
        if (method, task) not in runs:
            return "-"
        result, rates = runs[method, task][0], offered[method, task]["learning_rate"]
        edge = " (edge)" if rates and result["learning_rate"] in (min(rates), max(rates)) else ""
        rate = f"{result['learning_rate']:.2g}{edge}"
        if result["rho"] is None:
            return rate
        radii = sorted(offered[method, task]["rho"])
        of = f" of {' and '.join(f'{x:g}' for x in radii)}" if len(radii) > 1 else ""
        return f"{rate}, {result['rho']:g}{of}"

    rows = [[tables.NAMES[m], *(cell(m, t) for t in tasks)] for m in methods]
    head = f"Tuned learning rate and radius{tuned_at}; an edge is that of the rates tried:"
    return [head, "", *tables.markdown(["method", *tasks], rows)]


def _costs(runs, methods, tasks):
    rows = []
    for method in methods:
        some = next(runs[method, task][0] for task in tasks if (method, task) in runs)
        trained, state = (some[key] for key in ("trained_parameters", "optimizer_state_bytes"))
        rows.append([tables.NAMES[method], f"{trained / 1e6:.2f} M", f"{state / 1e6:.1f} MB"])
    return [
        "Trained parameters and optimizer state:",
        "",
        *tables.markdown(["method", "trained", "state"], rows),
    ]
