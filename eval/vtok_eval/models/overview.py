"""``python -m vtok_eval.models.overview``: the README's table of accuracies, from the results beside the cards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from vtok.cli import alone
from vtok.errors import VtokError
from vtok_eval.models.nano import NANO
from vtok_eval.render.markdown import table
from vtok_eval.render.results import Entry, Run, read
from vtok_eval.render.words import NONE, budget, percent, tokens

BEGIN, END = "<!-- accuracies: python -m vtok_eval.models.overview -->", "<!-- end -->"


def overview(runs: Sequence[Run]) -> str:
    """A row a method, a column a model and budget: accuracy in percent; who keeps most in the mean comes first.

    Parameters
    ----------
    runs : sequence of Run
        Results of the models; a method or budget that one of them lacks leaves a dash.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.names))
    cells = [(run, keep) for run in runs for keep in run.keeps]
    heads = ["method", *(f"{run.model['name']} {budget(keep)}" for run, keep in cells)]
    rows = [
        ["plain", *(percent(run.plain.accuracy()) if run.plain else NONE for run, _ in cells)],
        *([name, *(_cell(run.named(name, keep)) for run, keep in cells)] for name in sorted(names, key=_order(runs))),
        ["grey picture", *(percent(run.blank.accuracy()) if run.blank else NONE for run, _ in cells)],
    ]
    return "\n".join(table(heads, rows))


def _cell(entry: Entry | None) -> str:
    if entry is None or entry.accuracy() is None:
        return NONE
    return percent(entry.accuracy()) + ("" if entry.reached else f" ({tokens(entry.tokens)})")


def _order(runs: Sequence[Run]) -> Callable[[str], float]:
    """Sorts methods by what they lose in the mean over all budgets that they reach, those that reach none last."""

    def lost(name: str) -> float:
        own = [run.named(name, keep) for run in runs for keep in run.keeps]
        kept = [entry.retention() or 0.0 for entry in own if entry is not None and entry.reached]
        return 1 - sum(kept) / len(kept) if kept else 2.0

    return lost


def command(
    readme: Annotated[Path, typer.Argument(help="File with the marks of the table.")] = Path("README.md"),
    cards: Annotated[Path, typer.Option(help="Folder of cards.")] = Path("model_cards"),
) -> None:
    """Write the table of accuracies between its marks."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or END not in text.split(BEGIN)[1]:
        raise VtokError(f"{readme} has no place for the table; mark it with {BEGIN} and {END}")
    before, after = text.split(BEGIN)
    made = overview([read(cards / name) for name in NANO])
    readme.write_text(f"{before}{BEGIN}\n{made}\n{END}{after.split(END, 1)[1]}", encoding="utf-8")
    typer.echo(f"wrote {readme}")


if __name__ == "__main__":
    alone(command)
