"""What a benchmark promises: measured numbers beside their limits."""

from typing import NamedTuple

import rich.table


class Bar(NamedTuple):
    section: str
    claim: str
    value: float
    sign: str  # "<=" or ">="
    limit: float

    @property
    def holds(self):
        return self.value <= self.limit if self.sign == "<=" else self.value >= self.limit


def bars_table(bars, title="Bars"):
    made = rich.table.Table(title=title)
    for heading in ("section", "bar", "measured", "limit", "holds"):
        made.add_column(heading, justify="right" if heading in ("measured", "limit") else "left")
    for bar in bars:
        sign = {"<=": "≤", ">=": "≥"}[bar.sign]
        holds = "yes" if bar.holds else "[bold red]NO[/]"
        made.add_row(bar.section, bar.claim, f"{bar.value:.3g}", f"{sign} {bar.limit:g}", holds)
    return made


def stored(bars):
    """As the JSON files keep them."""
    return [{**bar._asdict(), "holds": bool(bar.holds)} for bar in bars]
