"""Which questions are searched with, which are kept back, and the growing subsets of the search. Pure and seeded."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from vtok.errors import VtokError
from vtok_eval.samples import Sample, Task

SEEN = "seen"
LEAST = 60
"""Questions of the smallest subset, about: below, one answer moves the accuracy by more than methods differ."""
MOST_RUNGS = 4


def headline(task: Task) -> Task:
    """The samples that accuracy is about: those of group "seen" where there are groups, as in ``vtok eval``."""
    seen = tuple(sample for sample in task.samples if sample.group == SEEN)
    return replace(task, samples=seen) if seen else task


def split(tasks: Sequence[Task], share: float, seed: int) -> tuple[list[Task], list[Task]]:
    """Calibration and held-out questions, every task by the same share.

    All questions about one picture (the first, where there are several) fall on one side.

    Parameters
    ----------
    tasks : sequence of Task
        With the samples to divide.
    share : float
        Of the pictures that go to calibration, between 0 and 1.
    seed : int
        The same seed divides in the same way.

    Returns
    -------
    tuple of lists of Task
        Calibration samples in a random order, of which any first part is a fair subset; held-out samples.

    Raises
    ------
    VtokError
        A share out of range, or so few questions that a side stays empty.
    """
    if not 0 < share < 1:
        raise VtokError(f"--calibration {share:g} must be between 0 and 1: the rest checks what was found")
    rng = random.Random(seed)
    asked: dict[str, set[str]] = {}
    for task in tasks:
        for sample in task.samples:
            asked.setdefault(anchor(sample), set()).add(task.name)
    pictures = sorted(asked)
    rng.shuffle(pictures)
    # pictures that serve the same tasks stand together, so that every task is divided by the share
    pictures.sort(key=lambda name: sorted(asked[name]))
    start = rng.random()
    taken = {
        name for i, name in enumerate(pictures) if math.floor(share * (i + 1) + start) > math.floor(share * i + start)
    }
    first, rest = [], []
    for task in tasks:
        mine = [sample for sample in task.samples if anchor(sample) in taken]
        rng.shuffle(mine)
        first.append(replace(task, samples=tuple(mine)))
        rest.append(replace(task, samples=tuple(s for s in task.samples if anchor(s) not in taken)))
    for name, side in (("calibration", first), ("held-out", rest)):
        if not any(task.samples for task in side):
            raise VtokError(
                f"there are too few questions: with --calibration {share:g} none is left for the {name} side; take "
                "more samples, or another share"
            )
    return first, rest


def anchor(sample: Sample) -> str:
    """What keeps questions together."""
    return f"picture {sample.images[0]}" if sample.images else f"question {sample.task} {sample.id}"


def sizes(total: int, least: int = LEAST) -> list[int]:
    """Questions of each subset, growing by doubling up to all of them."""
    found = [total]
    while found[0] // 2 >= least and len(found) < MOST_RUNGS:
        found.insert(0, found[0] // 2)
    return found


def first(tasks: Sequence[Task], count: int) -> list[Task]:
    """About ``count`` questions, each task by its share and one at least: a smaller count takes no others."""
    total = sum(len(task.samples) for task in tasks)
    share = min(1.0, count / total) if total else 0.0
    return [replace(task, samples=task.samples[: math.ceil(share * len(task.samples) - 1e-9)]) for task in tasks]
