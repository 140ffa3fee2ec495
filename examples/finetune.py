"""Fine-tunes a pretrained checkpoint, with one optimizer after the other on the same batches.

    python examples/finetune.py --task rte --data-dir glue                # MiniLM-L6
    python examples/finetune.py --task stsb --data-dir glue --train-examples 500 --epochs 10
    python examples/finetune.py --task cola --data-dir glue --checkpoint my_bert
    python examples/finetune.py --task gsm8k --data-dir data --checkpoint my_llama --steps 500

Four tasks of GLUE with a BERT encoder, scored with the task's own metric on its development set;
and instruction tuning on GSM8K with a decoder of Llama's or Qwen2's kind, scored by exact match of
the numbers that it answers. A checkpoint is a folder as the Hugging Face hub has them. The run
folder (`--out`) is as `pretrain.py`'s.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

try:
    import jax
    import numpy as np

    import batches
    import bert
    import command_line
    import decoder
    import glue
    import gsm8k
    import hub_files
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

EVALUATION_BATCH = 64
DECODER_MAX_LEN = 512


class Subject(NamedTuple):
    """A model on a task."""

    description: str
    loss: Callable
    abstract_params: Any
    init: Callable
    train: dict  # arrays with one row for each example
    max_len: int
    evaluate: Callable
    metrics: tuple[str, ...]
    loss_unit: str
    score: Callable = lambda params: {}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, positive = parser.add_argument, run_record.positive
    add("--task", required=True, choices=(*glue.TASKS, "gsm8k"))
    add("--data-dir", required=True, help="the folder with the task's folder in it")
    add("--checkpoint", metavar="FOLDER", help="config.json, safetensors and tokenizer.json "
        "(default: all-MiniLM-L6-v2 from its package; gsm8k has none)")  # fmt: skip
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help="(default: by --epochs)")
    length.add_argument("--epochs", type=positive, default=3)
    add("--batch-size", type=positive, default=16, help="examples in a batch")
    add("--max-len", type=positive, help="tokens of an example (default: the task's)")
    add("--train-examples", type=positive, metavar="N",
        help="train on so many, drawn by --seed (default: all)")  # fmt: skip
    add("--rank", type=positive, default=8, help="rank of the subspace")
    add("--update-proj-gap", type=positive, default=50, help="steps from one subspace to the "
        "next, the papers' T")  # fmt: skip
    add("--max-new-tokens", type=positive, default=256, help="of an answer (gsm8k)")
    add("--score-examples", type=positive, default=200, help="test questions to answer (gsm8k)")
    command_line.add_common(parser, out="runs/finetune", checkpoint_every=200, eval_every=50)
    arguments = parser.parse_args(argv)
    command_line.check_common(parser, arguments)
    if arguments.task == "gsm8k" and arguments.checkpoint is None:
        parser.error("--checkpoint: gsm8k needs the folder of a Llama or a Qwen2")
    return arguments


def settings_of(arguments):
    return optimizers.Settings(
        arguments.rank, arguments.update_proj_gap, arguments.rho, arguments.seed
    )


def encoder(arguments):
    """BERT on a task of GLUE."""
    task = glue.TASKS[arguments.task]
    max_len = arguments.max_len or task.max_len
    config, files = bert.read_config(
        arguments.checkpoint, num_labels=len(task.labels) or 1, dtype=arguments.dtype
    )
    if max_len > config.max_positions:
        raise SystemExit(f"--max-len {max_len}: the model has {config.max_positions} positions.")
    dataset = glue.load(arguments.task, arguments.data_dir)
    examples = batches.subset(dataset.train, arguments.train_examples, arguments.seed)
    train, dev = (glue.tokenize(files.tokenizer, e, max_len) for e in (examples, dataset.dev))
    loss, logits = bert.loss_of(config), bert.logits_of(config)
    measured = jax.jit(lambda params, batch: (loss(params, batch), logits(params, batch)))

    def evaluate(params):
        parts = batches.in_order(dev, EVALUATION_BATCH)
        losses, scores = zip(*(measured(params, part) for part in parts), strict=True)
        sizes = [batches.size(part) for part in parts]
        scores = np.concatenate(scores)
        predictions = scores.argmax(axis=1) if task.labels else scores[:, 0]
        return {
            "validation_loss": np.average(losses, weights=sizes).item(),
            **{name: glue.METRICS[name](dev["labels"], predictions) for name in task.metrics},
        }

    return Subject(
        f"{arguments.checkpoint or hub_files.PACKAGE} on {task.folder}: {len(examples):,} examples "
        f"to train on, {len(dataset.dev):,} of the development set",
        loss,
        bert.abstract(config)[1],
        lambda: bert.read_parameters(files, config, arguments.seed),
        train,
        max_len,
        evaluate,
        task.metrics,
        "nats" if task.labels else "squared error",
    )


def instructed_decoder(arguments):
    """A Llama or a Qwen2 on GSM8K."""
    max_len = arguments.max_len or DECODER_MAX_LEN
    config, files = decoder.read_config(arguments.checkpoint, arguments.dtype)
    ends, tokenizer = decoder.end_tokens(files), files.tokenizer
    need = machine.needed_bytes(
        config, settings_of(arguments), arguments.optimizer, arguments.batch_size, max_len
    )
    if shortage := machine.shortage(need, machine.available_bytes()):
        raise SystemExit(
            f"{files.folder} with {', '.join(arguments.optimizer)} {shortage} A smaller "
            "--batch-size, --max-len or --dtype bfloat16 saves memory."
        )
    dataset = gsm8k.load(arguments.data_dir)
    examples = batches.subset(dataset.train, arguments.train_examples, arguments.seed)
    train, left_out = gsm8k.tokenize(tokenizer, examples, ends, max_len)
    held_out, _ = gsm8k.tokenize(tokenizer, dataset.validation, ends, max_len)
    test = dataset.test[: arguments.score_examples]
    # Some are answered twice, so that all batches have one size and decoding is compiled once.
    count = -(-len(test) // arguments.batch_size) * arguments.batch_size
    twice = [test[i % len(test)] for i in range(count)]
    prompts = gsm8k.prompts(tokenizer, twice, ends)
    loss = decoder.loss_of(config)
    measured = jax.jit(loss)
    generate = decoder.greedy_of(config, arguments.max_new_tokens, ends)

    def evaluate(params):
        parts = batches.in_order(held_out, arguments.batch_size)
        weights = [part["is_answer"].sum() for part in parts]
        losses = [measured(params, part) for part in parts]
        return {"validation_loss": np.average(losses, weights=weights).item()}

    def score(params):
        answers = []
        for part in batches.in_order(prompts, arguments.batch_size):
            new_BxM = np.asarray(generate(params, part["tokens"], part["lengths"]))
            answers += gsm8k.answers(tokenizer, new_BxM, ends)
        return {"exact_match": gsm8k.exact_match(test, answers[: len(test)])}

    return Subject(
        f"{arguments.checkpoint} ({llama.parameter_count(config):,} parameters) on GSM8K: "
        f"{batches.size(train):,} examples to train on ({left_out:,} longer than "
        f"{max_len} tokens left out), {batches.size(held_out):,} to validate, {len(test):,} "
        "questions to answer",
        loss,
        llama.abstract(config)[1],
        lambda: decoder.read_parameters(files, config),
        train,
        max_len,
        evaluate,
        ("exact_match",),
        "nats per token of the answer",
        score,
    )


def fingerprint(data):
    hashed = hashlib.sha256()
    for name, column in sorted(data.items()):
        hashed.update(f"{name} {column.shape}".encode() + column.tobytes())
    return hashed.hexdigest()


def run(arguments, display):
    # Whatever can be refused is refused before the run folder is touched.
    run_record.check(arguments)
    build = instructed_decoder if arguments.task == "gsm8k" else encoder
    subject = build(arguments)
    data = run_record.Data("data", subject.description, fingerprint(subject.train))
    count = batches.size(subject.train)
    steps = arguments.steps or -(-arguments.epochs * count // arguments.batch_size)
    run_folder.prepare(arguments, data, display)
    display.note(f"{subject.description}; {steps:,} steps")
    problem = training.Problem(
        loss=subject.loss,
        abstract_params=subject.abstract_params,
        init=subject.init,
        batch_at=lambda step: batches.train_batch(
            subject.train, arguments.seed, step, arguments.batch_size
        ),
        evaluate=subject.evaluate,
        tokens_per_step=arguments.batch_size * subject.max_len,
        settings=settings_of(arguments),
        steps=steps,
        eval_every=arguments.eval_every,
        checkpoint_every=arguments.checkpoint_every,
        score=subject.score,
    )
    results = run_folder.train_all(arguments, problem, "fine_tuning", display)
    run_folder.conclude(
        arguments,
        results,
        {"data": data._asdict() | {"train_examples": count}, "steps": steps},
        display,
        title=f"After fine-tuning on {arguments.task}",
        loss_unit=subject.loss_unit,
        metrics=subject.metrics,
    )


def main(argv=None):
    """Returns the exit status: 0, or 130 after an interruption."""
    return command_line.run(parse_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
