"""``python -m vtok_eval.harness.again FIRST SECOND``: does a run that was made again say the same?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.cli import alone
from vtok.errors import VtokError
from vtok_eval.harness.store import SAMPLES, Key, key_of, read
from vtok_eval.render import results
from vtok_eval.render.markdown import table
from vtok_eval.render.words import percent

#: points of the share of the random ceiling by which medians of two runs on one machine may differ
POINTS = 3.0
SHARE = ("timing", "share", "median")


@dataclass
class Same:
    """What two runs say of one entry.

    Attributes
    ----------
    entry : str
        ``"divprune@64"``.
    asked : int
        Questions that both answered.
    answers, kept : int
        Of these, such that were answered otherwise, and such of which other tokens stayed.
    shares : tuple of (float or None)
        Of the random ceiling's speed: the first run's median and the second's.
    """

    entry: str
    asked: int = 0
    answers: int = 0
    kept: int = 0
    shares: tuple[float | None, float | None] = (None, None)

    @property
    def apart(self) -> float | None:
        """Points between the two shares; ``None`` where a run was not timed."""
        first, second = self.shares
        return None if first is None or second is None else 100 * abs(first - second)


def compare(first: Path, second: Path) -> list[Same]:
    """Entries that two folders of ``vtok eval`` share.

    Raises
    ------
    VtokError
        A folder without results, or no question that both answered.
    """
    lines, entries = _lines(first), _entries(first)
    other, others = _lines(second), _entries(second)
    found = {name: Same(name) for name in entries if name in others}
    for key in lines.keys() & other.keys():
        if (same := found.get(key[0])) is not None:
            one, two = lines[key], other[key]
            same.asked += 1
            same.answers += one["answer"] != two["answer"]
            same.kept += one.get("kept") != two.get("kept")
    if not any(same.asked for same in found.values()):
        raise VtokError(f"{first} and {second} answered no question in common; give two runs of one model")
    for name, same in found.items():
        same.shares = entries[name].number(*SHARE), others[name].number(*SHARE)
    return [same for same in found.values() if same.asked]


def _lines(folder: Path) -> dict[Key, dict[str, Any]]:
    return {key_of(line): line for line in read(folder / SAMPLES)}


def _entries(folder: Path) -> dict[str, results.Entry]:
    try:
        return {entry.id: entry for entry in results.read(folder).entries}
    except VtokError as error:
        raise VtokError(f"{folder} holds no results of vtok eval to compare: {error}") from None


def page(found: list[Same]) -> str:
    """A markdown table, a row an entry."""
    rows = [
        [
            *(same.entry, str(same.asked), str(same.answers), str(same.kept)),
            *(percent(share) for share in same.shares),
            percent(None if same.apart is None else same.apart / 100),
        ]
        for same in found
    ]
    heads = ["entry", "questions", "other answers", "other tokens", "of random, %", "again", "points apart"]
    return "\n".join(table(heads, rows))


def command(
    first: Annotated[Path, typer.Argument(help="Folder that vtok eval wrote.")],
    second: Annotated[Path, typer.Argument(help="Folder of the run that was made again.")],
    within: Annotated[float, typer.Option(help="Points that shares of the ceiling may be apart.")] = POINTS,
) -> None:
    """Compare two runs question by question, and how much of the possible speed each entry reached. Ends with 1 where
    an answer or a kept token differs, or a share by more than --within."""
    found = compare(first, second)
    typer.echo(page(found))
    other = sum(same.answers + same.kept > 0 for same in found)
    off = [same.entry for same in found if (same.apart or 0) > within]
    typer.echo(f"\n{len(found)} entries; {other} with other answers or tokens; {len(off)} over {within:g} points off")
    if other or off:
        raise typer.Exit(1)


if __name__ == "__main__":
    alone(command)
