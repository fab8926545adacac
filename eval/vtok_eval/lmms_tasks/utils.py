"""What the YAML files beside this one call: the bundled tasks with the prompts and the scoring of ``vtok eval``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from vtok_eval import tasks
from vtok_eval.samples import Sample, Task

SEEN = "seen"


def rows(dataset: Any) -> Any:
    """The task that a split is named after, in place of the split's own row."""
    import datasets

    name = str(dataset.split)
    task, _ = bundled(name)
    grouped = any(sample.group == SEEN for sample in task.samples)
    made = [
        {
            "task": name,
            "id": sample.id,
            "images": list(sample.images),
            "question": sample.question,
            "instruction": task.instruction,
            "answer": sample.answer,
            "scored_as": "accuracy" if not grouped or sample.group == SEEN else "unseen",
        }
        for sample in task.samples
    ]
    return datasets.Dataset.from_list(made)


@functools.cache
def bundled(name: str) -> tuple[Task, dict[str, Sample]]:
    """A task, and its samples by id."""
    task = tasks.load([name])[0]
    return task, {sample.id: sample for sample in task.samples}


def pictures(doc: Mapping[str, Any]) -> list[Any]:
    """PIL images of a row, in order."""
    task, _ = bundled(doc["task"])
    return [task.picture(name) for name in doc["images"]]


def question(doc: Mapping[str, Any]) -> str:
    """The question and the instruction; vtok takes the instruction off again for models trained without it."""
    return "\n".join(filter(None, (doc["question"], doc["instruction"])))


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Right or wrong, as ``accuracy`` or, for styles that no embedded model was trained on, as ``unseen``."""
    task, samples = bundled(doc["task"])
    sample = samples[doc["id"]]
    answer = results[0] if results else ""
    found: dict[str, Any] = {doc["scored_as"]: float(tasks.right(answer, sample))}
    if task.metric == "yes/no" and doc["scored_as"] == "accuracy":
        found["f1"] = [answer, sample.answer]
    return found


def f1(pairs: Sequence[Sequence[str]]) -> float:
    """F1 of "yes" over (answer, truth) pairs; 0 where no truth is yes."""
    return tasks.yes_no_f1([(said, true) for said, true in pairs]) or 0.0
