"""How much memory training takes, from shapes alone: ``python -m lorenza_optax.memory``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from lorenza_optax._base.checks import check_choice, check_int
from lorenza_optax._memory.memory_of import METHODS, MethodMemory, shapes_of
from lorenza_optax._memory.model_shapes import (
    MODEL_DTYPES,
    PRESETS,
    ModelSizes,
    abstract_params,
    find_model,
)
from lorenza_optax._memory.report import LargestModel, MemoryReport, StepMemory, parse_bytes

__all__ = ["LargestModel", "MemoryReport", "StepMemory", "memory_report", "step_memory"]


def memory_report(
    params: Any,
    rank: int | Sequence[int] = 128,
    *,
    methods: str | Sequence[str] = tuple(METHODS),
    memory: int | str | None = None,
    dtype: str | None = None,
    step_fn: Callable[..., Any] | None = None,
    step_args: Sequence[Any] = (),
    **lorenza_arguments: Any,
) -> MemoryReport:
    """The memory of training, method by method and rank by rank, with nothing allocated.

    Weights, gradients and state are exact to the byte: they are counted on the shapes that the
    optimizers' own ``init`` gives under ``jax.eval_shape``; LORENZA's gradients on those of
    ``update(..., value_fn=...)`` for a loss that uses projected leaves in matrix products. What
    depends on the program, the activations foremost, is in no row; XLA tells it for one step in
    ``step_fn``.

    Args:
      params: A tree of arrays or ``jax.ShapeDtypeStruct``; or a preset, one of "60M", "130M",
        "350M", "1B", "7B" (the Llamas of the GaLore paper); or the path of a Hugging Face
        ``config.json`` or of its folder, for the model types llama, qwen2 and bert (an encoder
        with its pooler).
      rank: The rank r of all leaves, or several such ranks, each for a row of its own.
      methods: Which to count, one or several: "adamw", Optax's; "galore",
        ``optax.contrib.galore`` by its own rule, which projects all 2-D leaves and compresses
        the longer side; "lora", adapters of r (m + n) on the leaves that LORENZA projects, with
        AdamW on them and all else frozen; "lorenza".
      memory: A memory to fit into, in bytes or as "24GB", "80GiB".
      dtype: Of the parameters of a preset (None for float32) or a config (None for its own).
      step_fn: A training step, jitted (with its donations) or not, that is compiled for
        ``step_args`` to see its temporaries.
      step_args: Its arguments; shapes will do.
      **lorenza_arguments: Further arguments of :func:`lorenza`, such as ``rho=0.0``,
        ``refresh="sketch"``, ``moment_dtype="int8"`` or ``weight_dimension_numbers``.

    Returns:
      A :class:`MemoryReport`; ``print`` it, or take its ``rows`` and ``as_dict()``.

    Raises:
      ValueError, TypeError: For an unknown preset or method, a config that cannot be read, and
        as :func:`lorenza`.

    Examples:
      >>> from lorenza_optax.memory import memory_report
      >>> report = memory_report("60M", rank=128, dtype="bfloat16", moment_dtype="bfloat16")
      >>> for row in report.rows:
      ...     print(f"{row.method:8}{row.state:12,}{row.accumulators:12,}")
      adamw    232,294,404 116,147,200
      galore    44,271,624 116,147,200
      lora      56,623,108  28,311,552
      lorenza  135,563,309  74,466,304

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024

      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021
    """
    ranks = _ranks(rank)
    methods = [methods] if isinstance(methods, str) else methods
    for method in methods:
        check_choice("method", method, tuple(METHODS))
    sizes = None
    if isinstance(params, (str, os.PathLike)):
        sizes = find_model(params, dtype)
        name, shapes = f"{sizes.name}, {sizes.dtype}", abstract_params(sizes)
    else:
        if dtype is not None:
            raise ValueError("dtype is for presets and configs: a tree of parameters has its own.")
        name, shapes = "parameters", shapes_of(params)
    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    if limit is not None:
        check_int("memory", limit, 1)

    def count(shapes: Any) -> tuple[MethodMemory, ...]:
        chosen = [(m, None) for m in methods if m == "adamw"]
        chosen += [(m, r) for m in methods if m != "adamw" for r in ranks]
        return tuple(METHODS[m](shapes, r, lorenza_arguments) for m, r in chosen)

    return MemoryReport(
        name=name,
        parameters=_size(shapes),
        rows=count(shapes),
        memory=limit,
        largest=() if limit is None or sizes is None else _largest(sizes, limit, count),
        step=None if step_fn is None else step_memory(step_fn, *step_args),
    )


def _ranks(rank: Any) -> list[int]:
    """One rank or several as a list, checked."""
    if callable(rank) or isinstance(rank, Mapping):
        raise TypeError(
            "rank must be an int or several of them, each for all leaves and a row of the report,"
            f" got {type(rank).__name__}: ranks by leaf, which lorenza takes, have no row."
        )
    several = isinstance(rank, Iterable) and not isinstance(rank, str)
    ranks: list[Any] = list(rank) if several else [rank]
    for one in ranks:
        check_int("rank", one, 1)
    return [int(one) for one in ranks]


def _size(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _largest(
    sizes: ModelSizes, memory: int, count: Callable[[Any], tuple[MethodMemory, ...]]
) -> tuple[LargestModel, ...]:
    """The deepest model for each row. Layers are alike: each takes what the second one does."""
    models = [abstract_params(dataclasses.replace(sizes, num_layers=n)) for n in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model itself has been warned of
        counted = zip(*map(count, models), strict=True)
    first, more = _size(models[0]), _size(models[1]) - _size(models[0])
    found = []
    for one, two in counted:
        layer = two.total - one.total
        layers = 1 + (memory - one.total) // layer if one.total <= memory else 0
        beyond = layers - 1
        found.append(
            LargestModel(layers, first + beyond * more, one.total + beyond * layer)
            if layers
            else LargestModel(0, 0, 0)
        )
    return tuple(found)


def step_memory(step_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> StepMemory | None:
    """XLA's account of a function's memory, by compiling it for arguments or their shapes.

    Args:
      step_fn: The function; one that ``jax.jit`` made keeps its donations.
      *args: Its arguments, arrays or ``jax.ShapeDtypeStruct``.
      **kwargs: Likewise.

    Returns:
      The bytes, or None where the backend does not say.

    Raises:
      Exception: Whatever tracing or compiling the function raises.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from lorenza_optax.memory import step_memory
      >>> step = jax.jit(lambda x: x @ x, donate_argnums=0)
      >>> used = step_memory(step, jax.ShapeDtypeStruct((64, 64), jnp.float32))
      >>> print(used.arguments, used.outputs)
      16384 16384
    """
    jitted: Any = step_fn if hasattr(step_fn, "lower") else jax.jit(step_fn)
    analysis = jitted.lower(*args, **kwargs).compile().memory_analysis()
    if analysis is None:
        return None
    return StepMemory(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lorenza_optax.memory", description="The memory of training, from shapes."
    )
    add = parser.add_argument
    add("model", nargs="?", default="7B", help="a preset (" + ", ".join(PRESETS) + ") or the path "
        "of a Hugging Face config.json or its folder (default: %(default)s)")  # fmt: skip
    add("--rank", type=int, nargs="+", help="default: the width by 32, 16, 8 and 4")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--dtype", choices=MODEL_DTYPES, help="of the weights")
    add("--memory", help="to fit into, such as 24GB (10^9 bytes) or 80GiB")
    add("--json", action="store_true", help="exact bytes, for machines")
    lorenza = parser.add_argument_group("arguments of lorenza")
    for name in ("rho", "ascent", "proj_type", "refresh", "factor_dtype", "moment_dtype"):
        flag = "--" + name.replace("_", "-")
        lorenza.add_argument(
            flag, dest=name, type=float if name == "rho" else str, default=argparse.SUPPRESS
        )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: prints a report, or exits with a message that says what is wrong."""
    parser = _parser()
    arguments = vars(parser.parse_args(argv))
    model, rank = arguments.pop("model"), arguments.pop("rank")
    methods, as_json = arguments.pop("method"), arguments.pop("json")
    try:
        if rank is None:
            width = find_model(model).hidden_size
            rank = [max(1, width // part) for part in (32, 16, 8, 4)]
        report = memory_report(model, rank, methods=methods, **arguments)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(report.as_dict(), indent=2) if as_json else report)


if __name__ == "__main__":
    # Shapes need no accelerator, whose memory JAX would take for itself.
    jax.config.update("jax_platforms", "cpu")
    main(sys.argv[1:])
