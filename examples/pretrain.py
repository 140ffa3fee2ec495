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
import statistics
import sys
from typing import NamedTuple

try:
    import jax

    import command_line
    import corpus
    import llama
    import machine
    import optimizers
    import run_folder
    import run_record
    import training
except ModuleNotFoundError as error:
    raise SystemExit(
        f"The examples need {error.name!r}. Install lorenza_optax with its extra: "
        "pip install 'lorenza_optax[examples]', or from the source tree pip install '.[examples]'"
    ) from None

VALIDATION_BATCHES = 16


class Plan(NamedTuple):
    """A model and how long it is trained on which batches."""

    model: llama.LlamaConfig
    settings: optimizers.Settings
    steps: int
    batch_size: int
    seq_len: int
    seed: int
    eval_every: int
    checkpoint_every: int


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, positive = parser.add_argument, run_record.positive
    add("--preset", default="tiny", choices=llama.PRESETS, help="model size")
    add("--steps", type=positive, default=200)
    add("--batch-size", type=positive, default=16, help="sequences in a batch")
    add("--seq-len", type=positive, help="tokens in a sequence (default: the preset's)")
    add("--rank", type=positive, help="rank of the subspace (default: the preset's)")
    add("--update-proj-gap", type=positive, help="steps from one subspace to the next, the "
        "papers' T (default: the preset's)")  # fmt: skip
    add("--data", help="a text file or a folder of them or of zips (default: the source text "
        "of Python's standard library)")  # fmt: skip
    add("--tokenizer", choices=("bytes", "bpe"), help="(default: the preset's)")
    add("--vocab-size", type=positive, help="of the BPE tokenizer (default: the preset's)")
    command_line.add_common(parser, out="runs/pretrain", checkpoint_every=100, eval_every=25)
    arguments = parser.parse_args(argv)

    command_line.check_common(parser, arguments)
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
    return Plan(
        model=model,
        settings=settings,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        eval_every=arguments.eval_every,
        checkpoint_every=arguments.checkpoint_every,
    )


def problem_of(plan, data):
    """What `training.train` takes, of a plan and a `corpus.Corpus`."""
    loss = llama.loss_of(plan.model)
    evaluated = jax.jit(loss)
    held_out = corpus.validation_batches(
        data.validation, VALIDATION_BATCHES, plan.batch_size, plan.seq_len
    )

    def batch_at(step):
        return corpus.train_batch(data.train, plan.seed, step, plan.batch_size, plan.seq_len)

    def evaluate(params):
        return {
            "validation_loss": statistics.fmean(
                float(evaluated(params, batch)) for batch in held_out
            )
        }

    return training.Problem(
        loss=loss,
        abstract_params=llama.abstract(plan.model)[1],
        init=lambda: llama.init(plan.model, plan.seed),
        batch_at=batch_at,
        evaluate=evaluate,
        tokens_per_step=plan.batch_size * plan.seq_len,
        settings=plan.settings,
        steps=plan.steps,
        eval_every=plan.eval_every,
        checkpoint_every=plan.checkpoint_every,
    )


def check_memory(arguments):
    """Refuses what cannot fit, before anything is allocated."""
    available = machine.available_bytes()

    def need_of(preset_name):
        plan = make_plan(arguments, preset_name)
        return machine.needed_bytes(
            plan.model, plan.settings, arguments.optimizer, plan.batch_size, plan.seq_len
        )

    shortage = machine.shortage(need_of(arguments.preset), available)
    if shortage is None:
        return
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
        f"--preset {arguments.preset} with {', '.join(arguments.optimizer)} {shortage} {advice}"
    )


def run(arguments, display):
    # Whatever can be refused is refused before the run folder is touched.
    check_memory(arguments)
    run_record.check(arguments)
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
    text = run_record.Data("text", data.description, data.fingerprint)
    run_folder.prepare(arguments, text, display)
    if not arguments.resume:
        corpus.save(data, out)
    display.note(
        f"{arguments.preset}: {llama.parameter_count(plan.model):,} parameters; "
        f"{data.description}: {len(data.train):,} tokens to train on, "
        f"{len(data.validation):,} held out"
    )
    results = run_folder.train_all(arguments, problem_of(plan, data), "pretraining", display)
    run_folder.conclude(
        arguments,
        results,
        {
            "corpus": {
                "description": data.description,
                "fingerprint": data.fingerprint,
                "train_tokens": len(data.train),
                "validation_tokens": len(data.validation),
            }
        },
        display,
        title="After training, on held-out text",
        loss_unit="nats per token",
    )


def main(argv=None):
    """Returns the exit status: 0, or 130 after an interruption."""
    return command_line.run(parse_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
