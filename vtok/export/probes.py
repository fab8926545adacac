"""Questions for the parity check: asked of the model and of what was exported of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtok.errors import VtokError
from vtok.geometry import inputs_of

#: installed packages register questions: (processor, config, name, count) -> sequence of Probe
GROUP = "vtok.samples"
QUESTION = "Describe the picture."
DRAWN = (448, 336)


@dataclass(frozen=True)
class Probe:
    """One question about one picture, by its words or by the tensors that a model takes.

    Attributes
    ----------
    picture : PIL.Image or None
        RGB.
    prompt : str
        As the processor takes it, with one placeholder for the picture.
    inputs : mapping of str to Tensor
        Instead of both, where there is no processor: keyword arguments of the model, batch 1.
    judge : callable or None
        Says of an answer's text whether it is right.
    """

    picture: Image.Image | None = None
    prompt: str = ""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    judge: Callable[[str], bool] | None = None

    def tensors(self, processor: Any) -> dict[str, Tensor]:
        """What the model takes: the inputs, or what the processor makes of picture and words.

        Raises
        ------
        VtokError
            There is no processor and no inputs.
        """
        if self.inputs:
            return dict(self.inputs)
        if processor is None:
            raise VtokError("a question in words needs the model's processor; give it, or questions with inputs")
        return dict(processor(images=[self.picture], text=[self.prompt], return_tensors="pt"))


def find(
    model: Any, processor: Any = None, *, name: str = "", count: int = 100, size: tuple[int, int] | None = None
) -> tuple[list[Probe], str]:
    """Questions for a model, and where they are from.

    Those that an installed package registers come first (``vtok_eval`` has 100 and more with truths). Without one,
    and without a processor, drawn pictures are asked about.

    Parameters
    ----------
    model : PreTrainedModel
        For its config.
    processor : ProcessorMixin, optional
        With a tokenizer.
    name : str
        Of the model, for packages that know it.
    count : int
        How many.
    size : tuple of int, optional
        Width and height in pixels that every picture is brought to.

    Raises
    ------
    VtokError
        ``count`` below 1.
    """
    if count < 1:
        raise VtokError(f"the parity check needs at least 1 question, not {count}")
    if processor is None:
        pictures = [drawn(number, size or DRAWN) for number in range(count)]
        return [Probe(inputs=inputs_of(model, one, seed=i)) for i, one in enumerate(pictures)], "drawn pictures"
    for entry in entry_points(group=GROUP):
        found = list(entry.load()(processor, model.config, name, count))
        if found:
            return [resized(probe, size) for probe in found[:count]], entry.name
    text = prompt_of(processor, QUESTION)
    return [Probe(drawn(number, size or DRAWN), text) for number in range(count)], "drawn pictures"


def prompt_of(processor: Any, question: str) -> str:
    """A question about one picture by the processor's chat template; without one, the placeholder stands above it."""
    if not processor.chat_template:
        return f"{processor.image_token}\n{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def drawn(number: int, size: tuple[int, int]) -> Image.Image:
    """Picture of a number: coarse seeded noise, smoothed, of ``size`` (width, height) in pixels."""
    noise = torch.randint(256, (6, 8, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC)


def resized(probe: Probe, size: tuple[int, int] | None) -> Probe:
    """The same question about its picture at a size (width, height); as it is without one."""
    if size is None or probe.picture is None or probe.picture.size == size:
        return probe
    return Probe(probe.picture.resize(size, Image.Resampling.BICUBIC), probe.prompt, probe.inputs, probe.judge)


def save(probes: Sequence[Probe], folder: Path) -> None:
    """Write questions into a folder, for another process; who judges the answers stays here."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, probe in enumerate(probes):
        if probe.picture is not None:
            probe.picture.save(folder / f"{number}.png")
        if probe.inputs:
            tensors = {key: value.contiguous() for key, value in probe.inputs.items()}
            save_file(tensors, folder / f"{number}.safetensors")
    (folder / "prompts.json").write_text(json.dumps([probe.prompt for probe in probes]), encoding="utf-8")


def load(folder: Path) -> list[Probe]:
    """What ``save`` wrote."""
    probes = []
    for number, prompt in enumerate(json.loads((folder / "prompts.json").read_text(encoding="utf-8"))):
        picture, tensors = folder / f"{number}.png", folder / f"{number}.safetensors"
        probes.append(
            Probe(
                Image.open(picture).convert("RGB") if picture.is_file() else None,
                prompt,
                load_file(tensors) if tensors.is_file() else {},
            )
        )
    return probes
