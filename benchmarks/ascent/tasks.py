"""The two trajectories that are measured along: the main job, and a fine-tuning run."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import batches
import bert
import corpus
import glue
import llama
import lorenza_optax
import optimizers
import pretrain

BATCH_SIZE, RANK, UPDATE_PROJ_GAP = 16, 8, 50
# Fine-tuning on SST-2, 60 steps, mean loss of the last 20: 3e-4 0.49, 1e-3 0.40, 3e-3 0.40.
LEARNING_RATE = 1e-3


class Task(NamedTuple):
    """A model, its batches, and LORENZA on it."""

    title: str
    loss: Callable[..., Any]
    params: Any
    batch_at: Callable[[int], Any]
    learning_rate: float
    settings: optimizers.Settings
    steps: int
    every: int  # steps between measurements

    @property
    def schedule(self):
        return optimizers.learning_rate_schedule(self.learning_rate, self.steps)

    def optimizer(self):
        """LORENZA as in the main job, keeping the singular values that scaled probes need.

        These are a choice of arguments beside the published ascent, so it is given gradients at
        that ascent's point, and perturbs nothing by itself.
        """
        keeping = functools.partial(lorenza_optax.lorenza, scale_probes=True)
        return optimizers.lorenza(self.schedule, self.settings, keeping)

    def checkpoints(self):
        """Steps to measure at: not those of a refresh, whose subspace is just being replaced."""
        steps = range(self.every, self.steps, self.every)
        return [step for step in steps if step % self.settings.update_proj_gap]


def main_job(arguments):
    options = {"--steps": arguments.steps or 200, "--rho": arguments.rho, "--seed": arguments.seed}
    plan = pretrain.make_plan(
        pretrain.parse_arguments([str(part) for pair in options.items() for part in pair])
    )
    documents, description = corpus.read_documents(None)
    data = corpus.tokenize(documents, description, "bytes", 256, plan.seq_len)
    return Task(
        "Pre-training: tiny Llama, Python's source text",
        llama.loss_of(plan.model),
        llama.init(plan.model, plan.seed),
        lambda step: corpus.train_batch(data.train, plan.seed, step, plan.batch_size, plan.seq_len),
        optimizers.OPTIMIZERS["lorenza"].pretraining,
        plan.settings,
        plan.steps,
        # Ages of the subspace (T = 20) of 5, 10 and 15 steps.
        arguments.every or 25,
    )


def fine_tuning(name, arguments):
    config, params, tokenizer = bert.load_checkpoint(None, num_labels=2, seed=arguments.seed)
    examples = glue.load(name, arguments.data_dir).train
    tokens = glue.tokenize(tokenizer, examples, glue.TASKS[name].max_len)
    return Task(
        f"Fine-tuning: MiniLM-L6, {glue.TASKS[name].folder}",
        bert.loss_of(config),
        params,
        lambda step: batches.train_batch(tokens, arguments.seed, step, BATCH_SIZE),
        LEARNING_RATE,
        optimizers.Settings(RANK, UPDATE_PROJ_GAP, arguments.rho, arguments.seed),
        arguments.steps or 150,
        # Ages of the subspace (T = 50) of 10, 20, 30 and 40 steps.
        arguments.every or 20,
    )


TASKS = {
    "main_job": main_job,
    "sst2": functools.partial(fine_tuning, "sst2"),
    "rte": functools.partial(fine_tuning, "rte"),
}
