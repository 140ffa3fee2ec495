"""The main job with moments in float32, bfloat16 and int8, on the same batches.

    python -m benchmarks.int8_moments
    python -m benchmarks.int8_moments --quick --out /tmp/int8   # tiny sizes: does it run?

Trains the tiny Llama of examples/pretrain.py with LORENZA once for each dtype and seed, and writes
int8_moments.json (curves, results, bars, machine, versions) and int8_moments.png (the curves of
the first seed) to benchmarks/results; a quick run writes only where --out says. Exits with 1 if
the moments are not kept as they should be, or a bar does not hold.
"""

import functools
import json
import pathlib
import statistics
import sys
import tempfile

import corpus
import llama
import lorenza_optax
import machine
import optimizers
import pretrain
import reporting
import training
from benchmarks import experiments, options
from benchmarks.bars import Bar, bars_table, stored
from lorenza_optax.memory import memory_report

DTYPES = ("float32", "bfloat16", "int8")
QUICK = ["--preset", "nano", "--steps", "6", "--batch-size", "2", "--eval-every", "3"]
# By how much the validation loss may be above that of float32 moments, the mean over seeds; seeds 0
# and 1 of the main job differ by 0.06.
LOSS_MARGIN = 0.02
# 8 bits and the scales; norms and other small arrays stay in float32.
INT8_SHARE = 0.27


def main():
    parser = options.parser_of("int8_moments", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON and the plot")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out is None:
        parser.error("--quick writes no results of its own: name a folder with --out")
    out = experiments.RESULTS if arguments.out is None else arguments.out
    out.mkdir(parents=True, exist_ok=True)
    size, display = QUICK if arguments.quick else [], reporting.Display()

    documents, description = corpus.read_documents(None)
    plan = pretrain.make_plan(pretrain.parse_arguments(size))
    data = corpus.tokenize(documents, description, "bytes", 256, plan.seq_len)
    runs = []
    for seed in arguments.seeds:
        plan = pretrain.make_plan(pretrain.parse_arguments([*size, "--seed", str(seed)]))
        for dtype in DTYPES:
            runs.append(train(dtype, plan, data, display))
            display.note(f"{dtype}, seed {seed}: {runs[-1]['result']['validation_loss']:.4f}")

    kept = {dtype: _report(dtype, plan).moments for dtype in DTYPES}
    bars = [] if arguments.quick else bars_of(runs, kept)
    summary = {
        "runs": runs,
        "moment_bytes": kept,
        "bars": stored(bars),
        "plan": {"steps": plan.steps, **plan.settings._asdict(), "seeds": arguments.seeds},
        "corpus": data.fingerprint,
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    (out / "int8_moments.json").write_text(json.dumps(summary, indent=1) + "\n")
    first = [run for run in runs if run["seed"] == arguments.seeds[0]]
    curves = {f"{run['moment_dtype']} moments": run["metrics"] for run in first}
    reporting.plot(curves, out / "int8_moments.png", "nats per token")
    display.console.print(bars_table(bars))
    if not all(bar.holds for bar in bars):
        sys.exit(1)


def train(dtype, plan, data, display):
    """One training run of the main job with the moments in a dtype."""
    label = f"lorenza, {dtype} moments"
    build = functools.partial(_build, dtype)
    optimizers.OPTIMIZERS[label] = optimizers.OPTIMIZERS["lorenza"]._replace(build=build)
    with tempfile.TemporaryDirectory() as folder:
        rate = optimizers.OPTIMIZERS["lorenza"].pretraining
        result = training.train(label, rate, pretrain.problem_of(plan, data), folder, display)
        lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    del optimizers.OPTIMIZERS[label]
    expected = _report(dtype, plan).state + 4  # the schedule's count
    if result["optimizer_state_bytes"] != expected:
        sys.exit(f"{label}: {result['optimizer_state_bytes']} bytes of state, not {expected}")
    for field in ("seconds_per_step", "mean_seconds_per_step"):
        del result[field]  # not what this measures: nothing is run in turns, or on a quiet machine
    fields = ("step", "loss", "validation_loss")
    metrics = [{k: v for k, v in json.loads(line).items() if k in fields} for line in lines]
    return {"moment_dtype": dtype, "seed": plan.seed, "result": result, "metrics": metrics}


def _build(dtype, learning_rate, settings):
    factory = functools.partial(lorenza_optax.lorenza, moment_dtype=dtype)
    return optimizers.lorenza(learning_rate, settings, factory)


def _report(dtype, plan):
    _, params = llama.abstract(plan.model)
    rank, rho = plan.settings.rank, plan.settings.rho
    report = memory_report(params, rank, methods=["lorenza"], rho=rho, moment_dtype=dtype)
    return report.rows[0]


def bars_of(runs, kept):
    mean = {
        dtype: statistics.fmean(
            run["result"]["validation_loss"] for run in runs if run["moment_dtype"] == dtype
        )
        for dtype in DTYPES
    }
    above = {dtype: mean[dtype] - mean["float32"] for dtype in DTYPES}
    share = kept["int8"] / kept["float32"]
    return [
        Bar("loss", "bfloat16 above float32", above["bfloat16"], "<=", LOSS_MARGIN),
        Bar("loss", "int8 above float32", above["int8"], "<=", LOSS_MARGIN),
        Bar("loss", "float32 has learned", mean["float32"], "<=", 2.5),
        Bar("memory", "int8 moments / float32 moments", share, "<=", INT8_SHARE),
    ]


if __name__ == "__main__":
    main()
