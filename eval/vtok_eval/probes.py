"""What vtok_eval registers under ``vtok.samples``: questions of the bundled tasks for the parity check of exports."""

from __future__ import annotations

from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vtok.export.probes import Probe
from vtok_eval import tasks
from vtok_eval.harness.prompts import Prompts, takes_instruction
from vtok_eval.samples import Sample, Task


def bundled(processor: Any, config: Any, name: str, count: int) -> list[Probe]:
    """Questions about one picture each, the tasks in turn.

    Parameters
    ----------
    processor : ProcessorMixin
        Of the model.
    config : PretrainedConfig
        Of the model: whether it was trained with instructions behind its questions.
    name : str
        Of the model, or its folder.
    count : int
        At most so many.
    """
    prompts = Prompts(processor, takes_instruction(SimpleNamespace(config=config), Path(name).name))
    lists = [[(task, sample) for sample in task.samples if len(sample.images) == 1] for task in tasks.load("all")]
    turns = [pair for pair in chain.from_iterable(zip_longest(*lists)) if pair is not None]
    return [_probe(prompts, task, sample) for task, sample in turns[:count]]


def _probe(prompts: Prompts, task: Task, sample: Sample) -> Probe:
    (image,) = sample.images
    return Probe(task.picture(image), prompts.text(task, sample), judge=partial(_right, sample))


def _right(sample: Sample, answer: str) -> bool:
    return tasks.right(answer, sample)
