"""The part of RESULTS.md on what single scripts measured: tables from their stored JSON.

Each runs by itself, `python -m benchmarks.NAME`, and writes benchmarks/results/NAME.json.
"""

import json

from benchmarks import main_job, tables
from benchmarks.ascent import readme_table as table_of_ascents
from benchmarks.family import readme_table as table_of_family

SCRIPTS = {
    "main_job": "The main job: a Llama of 1.9 M parameters, 200 steps on Python's standard library",
    "pretrain_tuning": "Hyperparameters on the main job, one seed",
    "family": "The family on the main job's model, 100 steps at the best rate of each, one seed",
    "int8_moments": "Moments in less precision, on the main job",
    "ascent": "What an ascent finds and costs",
    "step_cost": "Whole steps beside AdamW's, GaLore's and SAM's",
    "refresh": "Refreshes",
    "zeroth_order_memory": "Memory of zeroth-order steps beyond a forward pass",
}
MAIN_JOB = (
    "One seed; the two ran one after the other, so their times compare loosely. AdamW is at the "
    "best of {rates} rates, chosen by this same loss; LORENZA at the choice of an earlier tuning: "
    "the best of {ours} settings (next table, which has this one, too, run at another time) now "
    "comes to {best}. LORENZA has a second step size in its `scale`; AdamW with the same freedom "
    "comes to {freed}, of {theirs} settings. Of three seeds and two texts, "
    "tuned alike and apart from what is reported, the same model is in pretraining above."
)
PLACES = ("unrolled", "scanned")


def section(folder):
    """Lines of RESULTS.md; nothing where nothing is stored."""
    stored = {
        name: json.loads(path.read_text())
        for name in SCRIPTS
        if (path := folder / f"{name}.json").exists()
    }
    if not stored:
        return []
    lines = ["", "## Single scripts", "", "Each by `python -m benchmarks.NAME`."]
    for name, found in stored.items():
        lines += ["", f"### {SCRIPTS[name]} (`{name}`)", "", *_body(name, stored)]
        where = found[0] if isinstance(found, list) else found
        device, versions = where["machine"], where["versions"]
        lines += ["", f"Made on {device['device_kind']}, {device['cpu_count']} CPUs, "
                  f"jax {versions['jax']}."]  # fmt: skip
    return lines


def _body(name, stored):
    found = stored[name]
    if name == "main_job":
        lines = main_job.markdown(found).splitlines()
        rows = stored.get("pretrain_tuning")
        return [*lines, "", _of_the_tuning(rows)] if rows else lines
    if name == "family":
        return table_of_family.markdown(found).replace("](", "](../").splitlines()
    if name == "pretrain_tuning":
        return _trials(found)
    if name == "int8_moments":
        return [*_moments(found), "", *_bars(found)]
    if name == "ascent":
        lines = table_of_ascents.markdown(found, stored["step_cost"]).splitlines()
        return [*lines, "", _least_share(found)]
    if name == "zeroth_order_memory":
        return [*_copies(found), "", *_bars(found)]
    return _bars(found)


def _least_share(ascent):
    shares = [
        (share, task, radius)
        for task, one in ascent["tasks"].items()
        for radius, share in one["choices"]["subspace"]["share"].items()
    ]
    least, task, radius = min(shares)
    return (
        f'The rise is at rho = {ascent["arguments"]["rho"]}. Over tasks and radii "subspace" finds '
        f"at least {100 * least:.1f} % of SAM's ({task}, rho = {radius}), where "
        f"{100 * ascent['bar']['share']:.0f} % were asked for."
    )


def _of_the_tuning(rows):
    """What the main job's settings are among those that were tried."""
    losses = {"ours": [], "rates": [], "freed": []}
    for row in rows:
        name, arguments = row["trial"]
        kind = {"lorenza": "ours", "adamw": "freed" if "scale" in arguments else "rates"}.get(name)
        if kind:
            losses[kind].append(row["result"]["validation_loss"])
    best, freed = (f"{min(losses[kind]):.3f}" for kind in ("ours", "freed"))
    ours, rates, theirs = (len(losses[kind]) for kind in ("ours", "rates", "freed"))
    return MAIN_JOB.format(ours=ours, rates=rates, theirs=theirs, best=best, freed=freed)


def _trials(rows):
    return tables.markdown(
        ["optimizer", "arguments", "validation loss"],
        [
            [
                row["trial"][0],
                ", ".join(f"{key}={value}" for key, value in row["trial"][1].items()),
                f"{row['result']['validation_loss']:.3f}",
            ]
            for row in rows
        ],
    )


def _moments(found):
    whole = found["moment_bytes"]["float32"]
    return tables.markdown(
        ["moments", "validation loss", "bytes of moments, of float32's"],
        [
            [
                run["moment_dtype"],
                f"{run['result']['validation_loss']:.3f}",
                f"{found['moment_bytes'][run['moment_dtype']] / whole:.2f}",
            ]
            for run in found["runs"]
        ],
    )


def _copies(found):
    rows = [
        [name, *(f"{found[place]['optimizers'][name]['extra_copies']:.2f}" for place in PLACES)]
        for name in found["unrolled"]["optimizers"]
    ]
    return [
        "Temporary memory beyond evaluating the loss, in copies of the weights:",
        "",
        *tables.markdown(["step", *PLACES], rows),
    ]


def _bars(found):
    return tables.markdown(
        ["claim", "measured", "bar", "holds"],
        [
            [b["claim"], f"{b['value']:.3g}", f"{b['sign']} {b['limit']:g}",
             "yes" if b["holds"] else "**no**"]
            for b in found["bars"]
        ],
    )  # fmt: skip
