"""What a memory report holds, and how it prints."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from lorenza_optax._base.tables import format_table
from lorenza_optax._memory.memory_of import MethodMemory

__all__ = ["LargestModel", "MemoryReport", "StepMemory", "parse_bytes"]

UNITS = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """The bytes that "24GB" (10⁹) or "80 GiB" (2³⁰) stand for; a bare number is bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    factor = units.get((match.group(2) or "B").lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"memory must be a number of bytes with one of the units {', '.join(UNITS)}, such as"
            f" '24GB', got {text!r}."
        )
    return int(float(match.group(1)) * factor)


_LEGEND = """\
total: weights, state (moments, factors, other state) and the larger gradients; activations and
  other temporaries, and accumulators, come on top.
lorenza: gradients as update takes them itself from value_fn; those from jax.grad or
  perturbed_value_and_grad are as large as the weights. accumulators: subspace_value_and_grad's.
galore: optax.contrib.galore, which projects all 2-D leaves, embeddings too, on the longer side.
lora: adapters of r (m + n) on the leaves that lorenza projects; nothing else is trained.
adamw, galore, lora: moments in the dtype of the weights, as Optax keeps them."""


class StepMemory(NamedTuple):
    """XLA's own account of a compiled function, in bytes.

    Attributes:
      arguments: What it reads.
      outputs: What it returns.
      aliased: The part of the outputs that takes the place of donated arguments.
      temporaries: What it holds besides while it runs.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int


class LargestModel(NamedTuple):
    """The deepest model of a width whose training fits; with 0 layers none does."""

    num_layers: int
    parameters: int
    total: int


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Rows of bytes; prints as a table.

    Attributes:
      name: What was asked about.
      parameters: Number of parameters.
      rows: One a method and rank.
      memory: The memory that it shall fit into, in bytes, if one was given.
      largest: For each row the deepest model of this width that fits into ``memory``; empty
        without it, or where only a tree is known.
      step: XLA's account of ``step_fn``; None if there was none or the backend does not say.
    """

    name: str
    parameters: int
    rows: tuple[MethodMemory, ...]
    memory: int | None = None
    largest: tuple[LargestModel, ...] = ()
    step: StepMemory | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; all numbers are exact."""
        rows: list[dict[str, Any]] = []
        for index, row in enumerate(self.rows):
            rows.append({**row._asdict(), "state": row.state, "total": row.total})
            if self.memory is not None:
                rows[-1]["fits"] = row.total <= self.memory
            if self.largest:
                rows[-1]["largest"] = self.largest[index]._asdict()
        step = None if self.step is None else self.step._asdict()
        return {"name": self.name, "parameters": self.parameters, "memory": self.memory,
                "rows": rows, "step": step}  # fmt: skip

    def __str__(self) -> str:
        unit = largest_unit(max(row.total for row in self.rows))
        fields = [field for field in MethodMemory._fields if field not in ("method", "rank")]
        heading = ["method", "rank", *(field.replace("_", " ") for field in fields), "total"]
        if self.memory is not None:
            heading.append("fits")
        if self.largest:
            heading.append("largest that fits")
        table = [heading]
        for index, row in enumerate(self.rows):
            values = [*(getattr(row, field) for field in fields), row.total]
            cells = [row.method, "-" if row.rank is None else str(row.rank)]
            cells += [shown(value, unit) for value in values]
            if self.memory is not None:
                cells.append("yes" if row.total <= self.memory else "no")
            if self.largest:
                largest = self.largest[index]
                size = f"{largest.num_layers} layers, {largest.parameters / 1e6:,.0f}M parameters"
                cells.append(size if largest.num_layers else "none of this width")
            table.append(cells)
        asked = "" if self.memory is None else f"; to fit into {self.memory:,} bytes"
        title = f"{self.name}: {self.parameters:,} parameters; columns in {unit}{asked}"
        parts = [title, format_table(table, range(1, 3 + len(fields))), _LEGEND]
        if self.largest:
            parts.append("The largest model has the given widths and another number of layers.")
        if self.step is not None:
            named = (f"{k} {shown(v, unit)}" for k, v in self.step._asdict().items())
            parts.append(f"The compiled step, in {unit}: {', '.join(named)}.")
        return "\n".join(parts)


def largest_unit(value: int) -> str:
    """The largest decimal unit in which a number of bytes is at least 1."""
    decimal = ("TB", "GB", "MB", "kB")
    return next((unit for unit in decimal if value >= UNITS[unit]), "B")


def shown(value: int, unit: str) -> str:
    return f"{value:,}" if unit == "B" else f"{value / UNITS[unit]:,.3f}"
