"""A random model that answers something, questions with pictures of noise, and a run that a test can kill."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from vtok.errors import VtokError
from vtok_eval.harness import evaluate
from vtok_eval.harness.letters import processor_of
from vtok_eval.samples import Sample, Task

from .. import models

KINDS = {"llava": "Llava", "qwen2_5_vl": "Qwen2_5_VL"}
FAMILIES = tuple(KINDS)
QUICK: dict[str, Any] = {"max_new_tokens": 2, "time_samples": 0, "report": False, "progress": False}
METHODS = ("fastv", "flowcut", "todre", "random", "downsample")


def build(family: str) -> tuple[Any, Any]:
    """(model, processor): four layers, pictures of 64 tokens (llava) or of 16 to 24 (qwen), one token a byte."""
    settings = models._config(family, 4, 4)
    settings["text_config"]["vocab_size"] = 320
    config = getattr(transformers, f"{KINDS[family]}Config")(**settings)
    model = getattr(transformers, f"{KINDS[family]}ForConditionalGeneration")._from_config(config)
    models._randomize(model, 0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = models.PAD
    return model.eval(), processor_of(model)


def picture(name: str) -> Image.Image:
    """Smooth noise; names that hold "broken" do not open, those with "wide" are wider."""
    if "broken" in name:
        raise VtokError(f"the picture {name} cannot be read")
    noise = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((168, 112) if "wide" in name else (112, 112), Image.Resampling.BICUBIC)


def task(name: str = "colour", count: int = 5, broken: int | None = None) -> Task:
    """Questions of different lengths; every second one shares its picture, every fifth has two."""
    samples = []
    for i in range(count):
        images = (f"{i // 2}wide" if i % 3 == 2 else f"{i // 2}",) if i % 5 != 4 else (f"{i}", f"{i + 1}")
        images = ("broken",) if i == broken else images
        group = "unseen" if i % 4 == 3 else "seen"
        samples.append(
            Sample(f"{name}-{i}", name, images, f"{'what ' * (i % 3)}{i}?", "yes" if i % 2 else "no", group=group)
        )
    return Task(name, tuple(samples), picture, metric="yes/no" if name == "exists" else "accuracy", fingerprint=name)


def judge(answer: str, sample: Sample) -> bool:
    """Right or wrong by a coin that depends on every letter of the answer."""
    return zlib.crc32(f"{sample.id} {answer}".encode()) % 3 > 0


def run(family: str, out: Path, **changes: Any) -> dict[str, Any]:
    """A small evaluation with everything that can be changed."""
    built = changes.pop("built", None) or build(family)
    methods, keeps = changes.pop("methods", METHODS), changes.pop("keeps", [0.25])
    tasks = changes.pop("tasks", [task("colour"), task("exists", 4)])
    with torch.no_grad():
        return evaluate(*built, methods, keeps, tasks, out, **{"judge": judge, "name": family, **QUICK, **changes})


def slow(pause: float) -> Callable[[str, Sample], bool]:
    """``judge`` at a pace at which a test can stop it."""

    def late(answer: str, sample: Sample) -> bool:
        time.sleep(pause)
        return judge(answer, sample)

    return late


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Path(sys.argv[2]), judge=slow(0.05), batch_size=2)
