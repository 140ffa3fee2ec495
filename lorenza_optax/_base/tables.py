"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

__all__ = ["format_table"]


def format_table(rows: Iterable[Sequence[str]], numeric: Collection[int]) -> str:
    """Rows, the first of which is the heading, as aligned columns; numeric ones to the right."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)
