"""Trains a Llama on real text, with one optimizer after the other on the same batches.

    python examples/pretrain.py                                # LORENZA beside AdamW
    python examples/pretrain.py --optimizer lorenza galore sam --steps 400
    python examples/pretrain.py --preset 60M --data my_texts --out runs/60M
    python examples/pretrain.py --resume                       # go on after an interruption

The run folder (`--out`) receives each optimizer's metrics and checkpoints, the loss curves
(`loss.png`) and the closing table (`summary.json`).
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import signal
import sys

try:
    import corpus
    import llama
    import machine
    import optimizers
    import reporting
    import training
except ModuleNotFoundError as error:
    raise SystemExit(
        f"The examples need {error.name!r}. Install lorenza_optax with its extra: "
        "pip install 'lorenza_optax[examples]', or from the source tree pip install '.[examples]'"
    ) from None

# What a resumed run may change; everything else would change its result.
FREE_ON_RESUME = {"optimizer", "out", "resume", "checkpoint_every", "eval_every"}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizer", nargs="+", default=["lorenza", "adamw"], metavar="NAME",
        help=f"one or more of {', '.join(optimizers.OPTIMIZERS)}")  # fmt: skip
    add("--preset", default="tiny", choices=llama.PRESETS, help="model size")
    add("--steps", type=_positive, default=200)
    add("--batch-size", type=_positive, default=16, help="sequences in a batch")
    add("--seq-len", type=_positive, help="tokens in a sequence (default: the preset's)")
    add("--lr", type=float, help="peak learning rate of every optimizer (default: each its own)")
    add("--rank", type=_positive, help="rank of the subspace (default: the preset's)")
    add("--update-proj-gap", type=_positive, help="steps from one subspace to the next, the "
        "papers' T (default: the preset's)")  # fmt: skip
    add("--rho", type=float, default=0.05, help="radius of the sharpness-aware perturbation")
    add("--data", help="a text file or a folder of them (default: the source text of Python's "
        "standard library)")  # fmt: skip
    add("--tokenizer", choices=("bytes", "bpe"), help="(default: the preset's)")
    add("--vocab-size", type=_positive, help="of the BPE tokenizer (default: the preset's)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/pretrain"), help="run folder")
    add("--checkpoint-every", type=_positive, default=100, help="steps between checkpoints")
    add("--eval-every", type=_positive, default=25, help="steps between validations")
    add("--resume", action="store_true", help="go on from the latest checkpoints in --out")
    arguments = parser.parse_args(argv)

    names = [name for item in arguments.optimizer for name in item.split(",") if name]
    unknown = [name for name in names if name not in optimizers.OPTIMIZERS]
    if unknown or not names:
        parser.error(
            f"--optimizer: {', '.join(unknown) or 'nothing'} is not known; "
            f"choose from {', '.join(optimizers.OPTIMIZERS)}"
        )
    arguments.optimizer = list(dict.fromkeys(names))
    if arguments.seed < 0:
        parser.error("--seed: must not be negative")

    preset = llama.PRESETS[arguments.preset]
    for field in ("seq_len", "rank", "update_proj_gap", "tokenizer"):
        if getattr(arguments, field) is None:
            setattr(arguments, field, getattr(preset, field))
    if arguments.tokenizer == "bytes":
        if arguments.vocab_size not in (None, 256):
            parser.error("--vocab-size: bytes are 256; use --tokenizer bpe for another number")
        arguments.vocab_size = 256
    elif arguments.vocab_size is None:
        # A preset made for bytes has no vocabulary size of its own for BPE.
        arguments.vocab_size = max(preset.model.vocab_size, 4096)
    return arguments


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def make_plan(arguments, preset_name=None):
    """The plan of the arguments, or what it would be with another preset."""
    preset = llama.PRESETS[preset_name or arguments.preset]
    same = preset is llama.PRESETS[arguments.preset]
    model = dataclasses.replace(
        preset.model, vocab_size=arguments.vocab_size, dtype=arguments.dtype
    )
    settings = optimizers.Settings(
        rank=arguments.rank if same else preset.rank,
        update_proj_gap=arguments.update_proj_gap,
        rho=arguments.rho,
        seed=arguments.seed,
    )
    return training.Plan(
        model=model,
        settings=settings,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        eval_every=arguments.eval_every,
        checkpoint_every=arguments.checkpoint_every,
    )


def check_memory(arguments):
    """Refuses what cannot fit, before anything is allocated."""
    available = machine.available_bytes()
    if available is None:
        return

    def need_of(preset_name):
        plan = make_plan(arguments, preset_name)
        return machine.needed_bytes(
            plan.model, plan.settings, arguments.optimizer, plan.batch_size, plan.seq_len
        )

    need = need_of(arguments.preset)
    if sum(need) <= available:
        return
    parts = ", ".join(
        f"{field.replace('_', ' ')} {reporting.size(value)}"
        for field, value in zip(need._fields, need, strict=True)
        if value
    )
    names = list(llama.PRESETS)
    smaller = names[: names.index(arguments.preset)]
    fitting = [name for name in smaller if sum(need_of(name)) <= available]
    advice = (
        f"The biggest preset that fits is --preset {fitting[-1]}; --dtype bfloat16, a smaller "
        "--batch-size or a shorter --seq-len save memory too."
        if fitting
        else "No smaller preset fits either: lower --batch-size or --seq-len."
    )
    raise SystemExit(
        f"--preset {arguments.preset} with {', '.join(arguments.optimizer)} needs about "
        f"{reporting.size(sum(need))} ({parts}), and {reporting.size(available)} are "
        f"available. {advice}"
    )


def recorded(arguments):
    return json.loads(json.dumps(vars(arguments), default=str))


def check_folder(arguments):
    """Refuses a run folder that cannot be used; changes nothing."""
    out, record = arguments.out, arguments.out / "run.json"
    if out.exists() and not out.is_dir():
        raise SystemExit(f"--out {out}: this is a file. Give a folder.")
    if not arguments.resume:
        if out.exists() and any(out.iterdir()) and not record.exists():
            raise SystemExit(
                f"--out {out}: the folder is not empty, and what is in it is not a run of this "
                "program. Give a new folder."
            )
        return
    if not record.exists():
        raise SystemExit(
            f"--resume: there is no run in {out}. Start one without --resume, or name its "
            "folder with --out."
        )
    earlier = json.loads(record.read_text())["arguments"]
    differing = [
        f"--{name.replace('_', '-')} {earlier.get(name)} (now {value})"
        for name, value in recorded(arguments).items()
        if name not in FREE_ON_RESUME and earlier.get(name) != value
    ]
    if differing:
        raise SystemExit(
            f"--resume: the run in {out} was started with {', '.join(differing)}. Resume it "
            "with the same arguments, or start a new run in another folder with --out."
        )


def prepare_folder(arguments, data, display):
    """Makes the run folder; an older run in it is continued or moved aside, never overwritten."""
    out, record = arguments.out, arguments.out / "run.json"
    if arguments.resume:
        if json.loads(record.read_text())["corpus"] != data.fingerprint:
            raise SystemExit(
                f"--resume: the text ({data.description}) is not what the run in {out} was "
                "started with. Restore it, or start a new run in another folder with --out."
            )
        return
    if out.exists() and any(out.iterdir()):
        number = 1
        while (aside := out.with_name(f"{out.name}-{number}")).exists():
            number += 1
        out.rename(aside)
        display.note(f"The earlier run in {out} was moved to {aside}.")
    out.mkdir(parents=True, exist_ok=True)
    corpus.save(data, out)
    write_json(record, {"arguments": recorded(arguments), "corpus": data.fingerprint})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")


def run(arguments, display):
    # Whatever can be refused is refused before the run folder is touched.
    check_memory(arguments)
    check_folder(arguments)
    plan, out = make_plan(arguments), arguments.out
    documents, description = corpus.read_documents(arguments.data)
    data = corpus.tokenize(
        documents,
        description,
        arguments.tokenizer,
        arguments.vocab_size,
        plan.seq_len,
        saved=out if arguments.resume else None,
    )
    prepare_folder(arguments, data, display)
    display.note(
        f"{arguments.preset}: {llama.parameter_count(plan.model):,} parameters; "
        f"{data.description}: {len(data.train):,} tokens to train on, "
        f"{len(data.validation):,} held out"
    )
    results = []
    for name in arguments.optimizer:
        peak = optimizers.LEARNING_RATES[name] if arguments.lr is None else arguments.lr
        results.append(training.train(name, peak, plan, data, out / name, display))

    metrics = {
        name: [json.loads(line) for line in (out / name / "metrics.jsonl").open()]
        for name in arguments.optimizer
    }
    reporting.plot(metrics, out / "loss.png")
    ratios = reporting.relative(results)
    summary = {
        "optimizers": {
            result["optimizer"]: result | {"relative_to_adamw": ratios[result["optimizer"]]}
            for result in results
        },
        "corpus": {
            "description": data.description,
            "fingerprint": data.fingerprint,
            "train_tokens": len(data.train),
            "validation_tokens": len(data.validation),
        },
        "seed": arguments.seed,
        "arguments": recorded(arguments),
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    write_json(out / "summary.json", summary)
    display.console.print(reporting.table(results))
    display.note(f"Curves: {out / 'loss.png'}   numbers: {out / 'summary.json'}")


def main(argv=None):
    """Returns the exit status: 0, or 130 after an interruption."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parse_arguments(argv)
    display = reporting.Display()
    # Until training installs its own handling, a request to stop is an exception.
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(arguments, display)
    except training.Interrupted as stopped:
        again = argv if "--resume" in argv else [*argv, "--resume"]
        display.note(
            f"Interrupted; saved after step {stopped.step}. Go on with\n"
            f"  python {shlex.quote(sys.argv[0])} {shlex.join(again)}"
        )
        return 130
    except KeyboardInterrupt:
        display.stop()
        display.note("Interrupted. Saved checkpoints, if there are any, go on with --resume.")
        return 130
    finally:
        display.stop()
        signal.signal(signal.SIGTERM, earlier)
    return 0


if __name__ == "__main__":
    sys.exit(main())
