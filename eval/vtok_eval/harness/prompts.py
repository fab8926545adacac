"""Questions and pictures to model inputs, by the model's own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from vtok.errors import VtokError
from vtok_eval.samples import Sample, Task

ATTRIBUTE = "vtok_instruction"
"""Of a model's config: ``False`` where the model was trained on bare questions."""


class Prompts:
    """Builds prompts through the processor's chat template (pictures first, then the text).

    Parameters
    ----------
    processor : ProcessorMixin
        Of the model, with a tokenizer.
    instruction : bool
        Put the task's instruction behind every question.

    Raises
    ------
    VtokError
        The processor has no tokenizer.
    """

    def __init__(self, processor: Any, instruction: bool = True) -> None:
        if not hasattr(processor, "tokenizer"):
            raise VtokError(
                f"{type(processor).__name__} has no tokenizer; give the model's processor, as AutoProcessor loads it"
            )
        self.processor, self.instruction = processor, instruction
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def text(self, task: Task, sample: Sample) -> str:
        """The prompt of a sample, one placeholder a picture."""
        question = sample.question
        if self.instruction and task.instruction:
            question = f"{question}\n{task.instruction}"
        content = [{"type": "image"}] * len(sample.images) + [{"type": "text", "text": question}]
        return self.rendered([{"role": "user", "content": content}])

    def rendered(self, turns: Sequence[Mapping[str, Any]]) -> str:
        """Turns of a chat by the processor's template; without one, placeholders and texts line by line.

        Parameters
        ----------
        turns : sequence of mappings
            ``{"role": "user", "content": [...]}`` with ``{"type": "image"}`` and ``{"type": "text", "text": ...}``.
        """
        if self.processor.chat_template:
            return self.processor.apply_chat_template(turns, add_generation_prompt=True)
        parts = [part for turn in turns for part in turn["content"]]
        return "\n".join(self.processor.image_token if part["type"] == "image" else part["text"] for part in parts)

    def inputs(self, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Any:
        """Left-padded inputs of a batch.

        Parameters
        ----------
        texts : sequence of str
            What ``text`` gave.
        pictures : sequence of sequences of PIL.Image
            Of every sample.
        """
        images = [list(own) for own in pictures]
        return self.processor(
            images=images if any(images) else None,
            text=list(texts),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    def answers(self, tokens: Any) -> list[str]:
        """Generated tokens (B, L) as text, without special tokens and outer blanks."""
        return [text.strip() for text in self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def fingerprint(self) -> dict[str, Any]:
        """What decides the text of a prompt."""
        return {"chat_template": self.processor.chat_template or "", "instruction": self.instruction}


def takes_instruction(model: Any, name: str) -> bool:
    """Whether a model wants the instruction: all but those trained on bare questions."""
    return bool(getattr(model.config, ATTRIBUTE, not name.startswith("nano-")))
