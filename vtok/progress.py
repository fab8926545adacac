"""A progress bar for whatever takes longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE = 2.0


@contextmanager
def progress(title: str, total: int, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on standard error that appears only when the work takes longer than ``PATIENCE`` seconds.

    Parameters
    ----------
    title : str
        What is being done.
    total : int
        Number of steps.
    enabled : bool
        ``False`` shows nothing.

    Yields
    ------
    advance : callable
        Call it with the number of steps just done.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal))
    task = bar.add_task(title, total=total)
    start = time.monotonic()
    shown = False

    def advance(steps: int = 1) -> None:
        nonlocal shown
        bar.advance(task, steps)
        if not shown and time.monotonic() - start > PATIENCE:
            shown = True
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
