"""Learning rates for the main job: trains the tiny Llama with each trial and keeps every result.

    python -m benchmarks.pretrain_tuning                      # the grid below
    python -m benchmarks.pretrain_tuning --trial lorenza learning_rate=2e-2 update_proj_gap=10

Each trial is the default run of examples/pretrain.py (same model, text, batches and steps) with
other hyperparameters. Results are added to benchmarks/results/pretrain_tuning.json as they come;
a trial that is there already, on this machine and these versions, is not run again.
"""

import json
import tempfile

import jax
import optax

import corpus
import lorenza_optax
import machine
import optimizers
import pretrain
import reporting
import training
from benchmarks import experiments, options

RESULTS = experiments.RESULTS / "pretrain_tuning.json"
GRID = [
    *(("adamw", {"learning_rate": rate}) for rate in (2e-3, 3e-3, 5e-3, 8e-3)),
    *(
        ("adamw", {"learning_rate": rate, "scale": scale})
        for rate, scale in ((1e-2, 0.3), (2e-2, 0.15))
    ),
    ("lorenza", {"learning_rate": 1e-2}),
    ("lorenza", {"learning_rate": 2e-2}),
    ("lorenza", {"learning_rate": 5e-3, "scale": 2.0}),
    ("lorenza", {"learning_rate": 5e-3, "scale": 4.0}),
    ("lorenza", {"learning_rate": 1e-2, "update_proj_gap": 10}),
    ("lorenza", {"learning_rate": 2e-2, "scale": 0.5}),
    ("lorenza", {"learning_rate": 1e-2, "rho": 0.02}),
    ("lorenza", {"learning_rate": 1e-2, "update_proj_gap": 50}),
    ("lorenza", {"learning_rate": 2e-2, "scale": 0.5, "update_proj_gap": 10}),
    ("lorenza", {"learning_rate": 3e-2, "scale": 0.33}),
    ("lorenza", {"learning_rate": 3e-2, "scale": 0.2}),
    ("lorenza", {"learning_rate": 2e-2, "scale": 0.5, "moment_transport": "rotate"}),
    ("lorenza", {"learning_rate": 2e-2, "scale": 0.5, "moment_transport": "reset"}),
    ("lorenza", {"learning_rate": 2e-2, "scale": 0.5, "rho": 0.0}),
    ("lorenza_plus", {"learning_rate": 2e-2, "scale": 0.5, "add_back": "fira"}),
    ("lorenza_plus", {"learning_rate": 2e-2, "scale": 0.5, "add_back": "sumo"}),
    ("lorenza_plus", {"learning_rate": 2e-2, "scale": 0.25, "add_back": "fira"}),
    ("lorenza_plus", {"learning_rate": 2e-2, "scale": 0.25, "add_back": "sumo"}),
]


def adamw(learning_rate, weight_decay, scale=1.0):
    """AdamW, with LORENZA's freedom of another step for the matrices that it would project."""

    def matrices(params):
        plan = lorenza_optax.projection_plan(params, rank=1)
        projected = [path in plan.projected for path in plan.leaves]
        return jax.tree.unflatten(jax.tree.structure(params), projected)

    return optax.chain(
        optax.scale_by_adam(),
        optax.masked(optax.scale(scale), matrices),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


FACTORIES = {
    "adamw": adamw,
    "lorenza": lorenza_optax.lorenza,
    "lorenza_plus": lorenza_optax.lorenza_plus,
    "adazo_sam": lorenza_optax.adazo_sam,
}


def run_trial(name, hyperparameters, plan, data, display):
    """Trains with `name(**hyperparameters)`; what is not given is as in the main job."""
    defaults = {"weight_decay": optimizers.WEIGHT_DECAY}
    if name.startswith("lorenza"):
        defaults |= {
            "rank": plan.settings.rank,
            "update_proj_gap": plan.settings.update_proj_gap,
            "rho": plan.settings.rho,
            "scale": 1.0,
        }
    kwargs = defaults | hyperparameters
    peak = kwargs.pop("learning_rate")
    entry = optimizers.OPTIMIZERS[name]._replace(
        build=lambda schedule, settings: FACTORIES[name](schedule, **kwargs)
    )
    label = " ".join([name, *(f"{k}={v}" for k, v in hyperparameters.items())])
    with tempfile.TemporaryDirectory() as folder:
        optimizers.OPTIMIZERS[label] = entry
        result = training.train(label, peak, pretrain.problem_of(plan, data), folder, display)
        del optimizers.OPTIMIZERS[label]
    return result | {"optimizer": name}


def main():
    parser = options.parser_of("pretrain_tuning", __doc__)
    parser.add_argument("--trial", nargs="+", action="append", metavar="NAME KEY=VALUE")
    arguments = parser.parse_args()
    trials = GRID
    if arguments.trial:
        trials = []
        for name, *pairs in arguments.trial:
            parsed = {k: _parse(v) for k, v in (pair.split("=") for pair in pairs)}
            trials.append((name, parsed))

    plan = pretrain.make_plan(pretrain.parse_arguments([]))
    documents, description = corpus.read_documents(None)
    data = corpus.tokenize(documents, description, "bytes", 256, plan.seq_len)
    where = {"machine": machine.describe(), "versions": machine.versions()}
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    display = reporting.Display()
    for name, hyperparameters in trials:
        key = {"trial": [name, hyperparameters], "corpus": data.fingerprint, **where}
        if any(all(row[field] == value for field, value in key.items()) for row in stored):
            continue
        result = run_trial(name, hyperparameters, plan, data, display)
        stored.append({**key, "result": result})
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        display.note(f"{name} {hyperparameters}: {result['validation_loss']:.4f}")


def _parse(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


if __name__ == "__main__":
    main()
