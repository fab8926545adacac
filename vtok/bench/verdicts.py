"""Figures against the bars they have to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Verdict:
    """A figure and its bar.

    Attributes
    ----------
    what, measure : str
        Of what, and in which unit.
    value, limit : float
        What was measured, and what is asked for.
    at_most : bool
        The limit is from above.
    """

    what: str
    measure: str
    value: float
    limit: float
    at_most: bool

    @property
    def holds(self) -> bool:
        """Whether the bar is reached."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def as_dict(self) -> dict[str, str | float | bool]:
        """For JSON."""
        return {
            "what": self.what, "measure": self.measure, "value": self.value, "limit": self.limit,
            "at_most": self.at_most, "holds": self.holds,
        }  # fmt: skip


def show(found: Sequence[Verdict], console: Console) -> None:
    """A table, if there is anything to say."""
    if not found:
        return
    table = Table("bar", "figure", "", "limit", "of what", "", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for verdict in found:
        sign, style = "<=" if verdict.at_most else ">=", None if verdict.holds else "red"
        numbers = (f"{verdict.value:.3g}", sign, f"{verdict.limit:g}")
        table.add_row(verdict.what, *numbers, verdict.measure, "holds" if verdict.holds else "MISSED", style=style)
    console.print(table)
