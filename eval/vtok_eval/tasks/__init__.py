"""Tasks: the bundled ones, folders of one's own, data sets of the Hugging Face hub; and when an answer is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from vtok.errors import VtokError
from vtok_eval.samples import Sample, Task
from vtok_eval.tasks.folder import load_folder
from vtok_eval.tasks.hub import PREFIX, load_hub
from vtok_eval.tasks.scoring import normalise, right, yes_no_f1

__all__ = ["NAMES", "limited", "load", "normalise", "right", "yes_no_f1"]

BUNDLED = Path(__file__).parents[1] / "data" / "tasks"
NAMES: tuple[str, ...] = ("objects", "exists", "count", "colour", "position", "text", "detail", "multi")


def limited(tasks: Iterable[Task], limit: int | None) -> list[Task]:
    """Tasks with at most ``limit`` samples each, or as they are without one."""
    return [replace(task, samples=_limited(task.samples, limit)) if limit else task for task in tasks]


def _limited(samples: Sequence[Sample], limit: int) -> tuple[Sample, ...]:
    """The first ``limit`` samples or fewer: each group by its share, one of each where there is room."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    chosen: set[str] = set()
    taken = dict.fromkeys(groups, 0)
    for _ in range(min(limit, len(samples))):
        # the group that is furthest behind its share is next: what a smaller limit takes, a larger one takes, too
        open_groups = [name for name, own in groups.items() if taken[name] < len(own)]
        name = min(open_groups, key=lambda name: taken[name] / len(groups[name]))
        chosen.add(groups[name][taken[name]].id)
        taken[name] += 1
    return tuple(sample for sample in samples if sample.id in chosen)


def load(
    names: str | Sequence[str] = "all", data: str | PathLike[str] | None = None, limit: int | None = None
) -> list[Task]:
    """Tasks by name, in the order asked for.

    Parameters
    ----------
    names : str or sequence of str
        ``"all"``, or names (a single text may hold several, with commas): bundled tasks (``NAMES``), tasks of the
        folder, or data sets of the hub as ``"hf:owner/name?split=test&question=question&answer=answer&image=image"``.
        ``"all"`` means all tasks of the folder where one is given, and all bundled ones otherwise.
    data : path, optional
        A folder with JSON Lines files and ``images/`` or ``images.zip``; its tasks hide bundled ones of the same name.
    limit : int, optional
        At most so many samples a task, each group (such as ``"seen"`` and ``"unseen"``) by its share.

    Raises
    ------
    VtokError
        Unknown name, broken folder (file and line are named), hub out of reach, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise VtokError(f"limit must be at least 1 sample a task, not {limit}")
    asked = names.split(",") if isinstance(names, str) else list(names)
    asked = [name.strip() for name in asked if name.strip()]
    if not asked:
        raise VtokError(f"no task is named: choose from {', '.join(NAMES)}, or all")
    own = {task.name: task for task in load_folder(Path(data))} if data is not None else {}
    expanded = [part for name in asked for part in (((*own,) if own else NAMES) if name == "all" else (name,))]
    return limited((_one(name, own) for name in dict.fromkeys(expanded)), limit)


def _one(name: str, own: dict[str, Task]) -> Task:
    if name in own:
        return own[name]
    if name.startswith(PREFIX):
        return load_hub(name)
    if name not in NAMES:
        known = ", ".join(dict.fromkeys((*own, *NAMES)))
        raise VtokError(
            f"there is no task {name!r}: choose from {known}, all, or {PREFIX}owner/name for a hub's data set"
        )
    return load_folder(BUNDLED, only=name, source="bundled")[0]
