"""Options that ``vtok eval`` and ``vtok tune`` have in common, and what their words mean."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vtok.budget import check_keep
from vtok.errors import VtokError
from vtok.values import option_value
from vtok_eval import tasks
from vtok_eval.harness.loading import DTYPES
from vtok_eval.samples import Task

Model = Annotated[
    str, typer.Option(help="An embedded model (nano-llava), a folder, a geometry (random weights) or a hub id.")
]
Methods = Annotated[
    str,
    typer.Option(
        help='Names with commas between; + composes: "fastv,divprune+random_deep"; name=method is a row with options '
        'of its own: "fastv,late=fastv" with "-o late.k=5"; or "all".'
    ),
]
Tasks = Annotated[str, typer.Option(help='Names with commas between, or "all".')]
Data = Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")]
Out = Annotated[Path, typer.Option(help="Folder for everything; a run that was stopped goes on there.")]
Limit = Annotated[int | None, typer.Option(help="Only so many samples of each task.")]
BatchSize = Annotated[int, typer.Option(help="Questions at a time; changes no answer.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, or cuda:1; the first GPU if there is one.")]
Clock = Annotated[str, typer.Option(help="wall, or cpu: processor time, for a machine that others use.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer.")]
Instruction = Annotated[
    bool | None, typer.Option(help="Ask for a single word or phrase behind each question; not by default for nano.")
]


def names(text: str, option: str) -> list[str]:
    """What stands between commas, each once.

    Raises
    ------
    VtokError
        Nothing does; ``option`` is named.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise VtokError(f"{option} is empty; give at least one")
    return list(dict.fromkeys(parts))


def named_tasks(text: str, data: Path | None) -> list[Task]:
    """The tasks of ``--tasks``."""
    return tasks.load(names(text, "--tasks"), data)


def budgets(text: str) -> list[int | float]:
    """The budgets of ``--keep``.

    Raises
    ------
    VtokError
        Something that is none.
    """
    return [_budget(part) for part in names(text, "--keep")]


def _budget(text: str) -> int | float:
    try:
        keep = float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise VtokError(f"--keep {text} is no budget; give tokens (64) or a share of them (0.25)") from None
    return check_keep(keep)


def method_options(given: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Method name, or row and method name, -> options, of ``--option method.name=value``.

    Raises
    ------
    VtokError
        Another form.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in given or ():
        path, sign, value = text.partition("=")
        method, dot, name = path.rpartition(".")
        if not (sign and dot and method and name):
            raise VtokError(f"--option {text} is not of the form method.name=value, such as fastv.k=3")
        found.setdefault(method, {})[name] = option_value(value)
    return found


def precision(dtype: str) -> torch.dtype:
    """The type of ``--dtype``.

    Raises
    ------
    VtokError
        An unknown one.
    """
    if dtype not in DTYPES:
        raise VtokError(f"dtype {dtype!r} is unknown; take {', '.join(DTYPES)}")
    return DTYPES[dtype]


def typed(command: str) -> str:
    """The command line as a user would type it again, also where it was ``python -m vtok_eval``."""
    given = sys.argv[1:]
    behind = given[1:] if given[:1] == [command] else given
    return " ".join(["vtok", command, *map(shlex.quote, behind)])


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """A block that Ctrl-C stops with a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; what was answered is in {out}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
