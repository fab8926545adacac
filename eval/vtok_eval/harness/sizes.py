"""How many visual tokens the pictures of some tasks have, before any runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from vtok.protocol import Adapter
from vtok_eval.harness.prompts import Prompts
from vtok_eval.samples import Task

FIXED = ("llava",)
"""Families whose pictures all have the same number of tokens."""


def token_sizes(prompts: Prompts, adapter: Adapter, tasks: Sequence[Task]) -> list[int]:
    """Visual tokens that the pictures have, each number once.

    Every picture of every task is opened, whatever the limit, because budgets that depend on the largest picture must
    not change with the limit; broken ones are passed over.
    """
    sizes: set[tuple[int, int]] = set()
    for task in tasks:
        for name in dict.fromkeys(name for sample in task.samples for name in sample.images):
            try:
                sizes.add(task.picture(name).size)
            # a task may bring any function that opens pictures; what it raises is reported when its question comes up
            except Exception:
                continue
            if adapter.family in FIXED:
                return sorted({_tokens(prompts, adapter, size) for size in sizes})
    return sorted({_tokens(prompts, adapter, size) for size in sizes})


def _tokens(prompts: Prompts, adapter: Adapter, size: tuple[int, int]) -> int:
    given: Any = prompts.processor.image_processor(images=Image.new("RGB", size), return_tensors="pt")
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor) and key != "batch_num_images"}
    return adapter.media("image", tensors)[0].length
