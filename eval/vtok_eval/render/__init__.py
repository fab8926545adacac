"""Reports of a run: a page to open, plots for a README, tables for a model card.

``write(folder)`` makes them from ``results.json`` and, for pictures, ``samples.jsonl`` and the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vtok_eval.render import figures
from vtok_eval.render.markdown import page_markdown, summary_markdown, tasks_markdown
from vtok_eval.render.page import page
from vtok_eval.render.results import Entry, Run, read
from vtok_eval.samples import Task

__all__ = ["Entry", "Run", "read", "summary_markdown", "tasks_markdown", "write"]


def write(folder: str | Path, tasks: Sequence[Task] | None = None) -> dict[str, Path]:
    """Write ``report.html``, ``results.md``, ``pareto.png`` and ``curves.png`` beside ``results.json``.

    Parameters
    ----------
    folder : str or Path
        Where ``vtok eval`` left its results. ``samples.jsonl`` may be missing; then no pictures are shown.
    tasks : sequence of Task, optional
        Open the pictures; without them none are shown.

    Returns
    -------
    dict
        File name to path. The same results make the same bytes.

    Raises
    ------
    VtokError
        No ``results.json``, one of another schema, or no matplotlib.
    """
    folder = Path(folder)
    run = read(folder)
    texts = {"report.html": page(run, folder, tasks or ()), "results.md": page_markdown(run)}
    made = {}
    for name, text in texts.items():
        made[name] = folder / name
        made[name].write_text(text, encoding="utf-8")
    made["pareto.png"] = figures.pareto(run, folder / "pareto.png")
    made["curves.png"] = figures.curves(run, folder / "curves.png")
    return made
