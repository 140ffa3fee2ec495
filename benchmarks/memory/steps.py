"""A training step compiled from shapes, counted, and, of the smallest, run."""

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import tempfile
import time
import warnings
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import llama
from benchmarks import programs
from benchmarks.memory import deviceless, model
from benchmarks.memory.methods import METHODS
from lorenza_optax import memory

# This process holds no GPU memory that its children need, who each run one cell: a peak is that of
# a process. Read when JAX first looks for a GPU, and of no effect without one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# By shapes alone, RoBERTa-base, a usual subject of fine-tuning in a small rank: a BERT of these
# sizes, written as the config.json that the memory report reads.
ROBERTA = {
    "model_type": "bert",
    "vocab_size": 50_265,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "dtype": "bfloat16",
}
# The time to compile is half as long, and what XLA plans to hold is the same to the byte: LLVM's
# optimizations come after that.
FAST = {"xla_backend_optimization_level": 0}


def run(cell, display, needed):
    del display, needed
    if cell["kind"] == "count":
        return counted_roberta(cell["rank"])
    if cell.get("target"):
        return deviceless.in_child(cell)
    if not cell["steps"]:
        return measured(cell)
    # In a process of its own, whose peak is that of this cell.
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measured, cell).result()


class Program(NamedTuple):
    """A training step of (trained, opt_state, frozen, tokens), and the shapes of these."""

    tx: Any
    step: Any
    trained: Any
    opt_state: Any
    frozen: Any
    tokens: Any


def program_of(cell):
    method, preset = METHODS[cell["method"]], llama.PRESETS[cell["preset"]]
    config = dataclasses.replace(preset.model, dtype=cell["dtype"])
    lora_rank = cell["rank"] if method.is_lora else None
    loss, params = model.abstract(config, lora_rank, cell["scanned"])
    trained, frozen, join = params, [], lambda trained, frozen: trained
    if method.is_lora:
        trained, frozen, join = model.lora_split(params)
    tx = method.build(cell["rank"], cell["dtype"])

    def step(trained, opt_state, frozen, tokens):
        value, updates, opt_state = method.call(
            tx, lambda trained, batch: loss(join(trained, frozen), batch),
            trained, opt_state, tokens,
        )  # fmt: skip
        return method.apply_updates(trained, updates), opt_state, value

    batch, length = cell["batch"]
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No leaf is projected")  # 8-bit AdamW
        opt_state = jax.eval_shape(tx.init, trained)
    return Program(tx, step, trained, opt_state, frozen, tokens)


def measured(cell):
    program = program_of(cell)
    found = counted(cell, program)
    started = time.perf_counter()
    arguments, options = program[2:], FAST if jax.default_backend() == "cpu" else None
    if cell.get("target"):
        arguments, options = _placed(arguments, deviceless.sharding()), None
    lowered = jax.jit(program.step, donate_argnums=(0, 1)).lower(*arguments)
    compiled = lowered.compile(options)
    found["compile_seconds"] = round(time.perf_counter() - started, 1)
    analysis = compiled.memory_analysis()
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    found |= {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "peak": kept - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes,
        "backend_peak": getattr(analysis, "peak_memory_in_bytes", None),
    }
    if cell["steps"]:
        found["run"] = ran(cell, program, compiled)
    gigabytes = found["peak"] / 1e9
    found["summary"] = f"state {found['state'] / 1e9:.3g} GB, peak of the step {gigabytes:.3g} GB"
    return found


def _placed(shapes, sharding):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


def counted(cell, program):
    """Bytes by shapes: weights, gradients of a usual update and of one with a refresh, state."""
    trained = programs.tree_bytes(program.trained)
    found = {
        "parameters": sum(
            math.prod(leaf.shape) for leaf in jax.tree.leaves((program.trained, program.frozen))
        ),
        "weights": trained + programs.tree_bytes(program.frozen),
        "gradients": trained,
        "refresh_gradients": trained,
        "state": programs.tree_bytes(program.opt_state),
    }
    method = METHODS[cell["method"]]
    if method.is_lorenza:
        arguments = method.arguments(cell["dtype"])
        [row] = memory.memory_report(
            program.trained, cell["rank"], methods=["lorenza"], **arguments
        ).rows
        found |= {"gradients": row.gradients, "refresh_gradients": row.refresh_gradients}
        found |= {"moments": row.moments, "factors": row.factors}
    return found


def counted_roberta(rank):
    """The rows of the memory report, and LORENZA's with its embeddings projected, too."""

    def matrices(params):
        return model.matrices(params, embedding=True)

    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(ROBERTA))
        report_of = functools.partial(memory.memory_report, folder, rank, moment_dtype="bfloat16")
        rows = {row.method: row for row in report_of().rows}
        arguments = {"methods": ["lorenza"], "weight_dimension_numbers": matrices}
        [rows["lorenza_embedding"]] = report_of(**arguments).rows
        [rows["lorenza_sketch"]] = report_of(**arguments, refresh="sketch").rows
    return {
        name: {
            "weights": row.weights,
            "gradients": row.gradients,
            "refresh_gradients": row.refresh_gradients,
            "state": row.state,
        }
        for name, row in rows.items()
    } | {"summary": f"AdamW's state {rows['adamw'].state / 1e6:.0f} MB"}


def ran(cell, program, compiled):
    """What a few steps really allocate; on a GPU the allocator's peak, too."""
    device = jax.devices()[0]
    keys = iter(jax.random.split(jax.random.key(cell["seed"]), 1000))

    def array(leaf):  # one after the other: the peak shall be that of the steps
        values = 0.02 * jax.random.normal(next(keys), leaf.shape, jnp.float32)
        return (values if leaf.ndim > 1 else 1 + values).astype(leaf.dtype)

    try:
        trained, frozen = jax.tree.map(array, (program.trained, program.frozen))
        tokens = jax.random.randint(next(keys), program.tokens.shape, 0, 256, jnp.int32)
        opt_state = jax.jit(program.tx.init)(trained)
        found = {"state": _allocated(opt_state), "weights": _allocated((trained, frozen))}
        jax.block_until_ready((trained, frozen, opt_state))
        before, seconds = device.memory_stats(), []
        for _ in range(cell["steps"]):
            started = time.perf_counter()
            trained, opt_state, value = compiled(trained, opt_state, frozen, tokens)
            jax.block_until_ready((trained, opt_state, value))
            seconds.append(round(time.perf_counter() - started, 5))
        found |= {"loss": float(value), "seconds": seconds}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"out_of_memory": True}
    if before is not None:
        found["peak_before"] = before["peak_bytes_in_use"]
        found["peak"] = device.memory_stats()["peak_bytes_in_use"]
    return found


def _allocated(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
