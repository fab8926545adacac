"""What answers depend on, for the fingerprint of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import transformers

import vtok
from vtok_eval.harness.cells import Entry
from vtok_eval.harness.prompts import Prompts
from vtok_eval.harness.store import fingerprint
from vtok_eval.samples import Task

WHOLE = 2**26
"""Bytes of weights up to which all are hashed; of larger models 1024 evenly spaced values of every tensor."""


def weights(model: Any) -> str:
    """Digest of a model's weights, and how much of them it covers."""
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().flatten()
        if size > WHOLE and flat.numel() > 1024:
            flat = flat[torch.linspace(0, flat.numel() - 1, 1024, device=flat.device, dtype=torch.float64).long()]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] + ("" if size <= WHOLE else " (sampled)")


def settings(model: Any, prompts: Prompts, generation: Any, tasks: Sequence[Task], entries: Sequence[Entry]) -> Any:
    """Everything that decides an answer: common to all, by task, and by entry."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path",)}
    tokenizer = prompts.processor.tokenizer
    images: Any = getattr(prompts.processor, "image_processor", None)
    return {
        "common": {
            "model": fingerprint(config),
            "weights": weights(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "attention": str(getattr(model.config, "_attn_implementation", "")),
            "processor": fingerprint(images.to_dict() if hasattr(images, "to_dict") else None),
            "vocabulary": fingerprint(sorted(tokenizer.get_vocab().items())),
            "chat template": fingerprint(prompts.fingerprint()["chat_template"]),
            "instruction": prompts.instruction,
            "generation": generation.to_diff_dict(),
            "vtok": vtok.__version__,
            "transformers": transformers.__version__,
        },
        "tasks": {task.name: _task(task) for task in tasks},
        "entries": {entry.id: entry.fingerprint() for entry in entries if entry.status != "refused"},
    }


def _task(task: Task) -> dict[str, Any]:
    """A task without a fingerprint of its own is known by its questions and the names of its pictures."""
    own = task.fingerprint or fingerprint([[s.id, s.images, s.question, s.answer, s.accepted] for s in task.samples])
    return {"data": own, "instruction": task.instruction, "metric": task.metric}
