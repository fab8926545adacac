"""Questions about pictures to distil on: a folder of JSON Lines and pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vtok.errors import VtokError
from vtok.photo import opened


@dataclass(frozen=True)
class Question:
    """One question about one or more pictures, and its answer."""

    images: tuple[Path, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Prompts:
    """A batch as a model takes it.

    Attributes
    ----------
    inputs : dict of str to Tensor
        Left-padded; each row ends with its answer and the end of the sequence.
    lengths : list of int
        Tokens of each answer, the end included.
    progress : float
        Of the training, in [0, 1].
    """

    inputs: dict[str, Tensor]
    lengths: list[int]
    progress: float

    @property
    def target(self) -> Tensor:
        """(A,) answer tokens, row after row."""
        ids = self.inputs["input_ids"]
        return torch.cat([row[-length:] for row, length in zip(ids, self.lengths, strict=True)])


def read(folder: str | Path) -> list[Question]:
    """The questions of a folder: ``*.jsonl`` with ``{"image": "cat.png", "question": ..., "answer": ...}`` a line
    (``"images": [...]`` for several), pictures beside them or in ``images/``; other fields are left alone.

    Raises
    ------
    VtokError
        No such folder or file, a line that is none, or a picture that is missing.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise VtokError(f"{folder} holds no .jsonl file; write a JSON object a line: image, question, answer")
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                found.append(_question(line, folder, f"{path}, line {number}"))
    if not found:
        raise VtokError(f"{folder} asks nothing: its .jsonl files are empty; write a JSON object a line")
    return found


def _question(line: str, folder: Path, where: str) -> Question:
    try:
        record = json.loads(line)
        names = [record["image"]] if "image" in record else record["images"]
        images = tuple(_picture(folder, str(name), where) for name in names)
        return Question(images, str(record["question"]), str(record["answer"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise VtokError(f"{where}: not a JSON object with image (or images), question and answer ({error})") from error


def _picture(folder: Path, name: str, where: str) -> Path:
    for path in (folder / name, folder / "images" / name):
        if path.is_file():
            return path
    raise VtokError(f"{where}: there is no picture {name} in {folder} or its images/")


class Batches(Dataset):
    """Batch number i of a seeded stream over the questions.

    Parameters
    ----------
    questions : sequence of Question
        All of them, in another order each time round.
    processor
        The model's, whose tokenizer pads on the left from here on.
    size, steps : int
        Questions in a batch, and batches.
    seed : str
        Of the order.
    """

    def __init__(self, questions: Sequence[Question], processor: Any, size: int, steps: int, seed: str) -> None:
        self.questions, self.processor, self.size, self.steps, self.seed = questions, processor, size, steps, seed
        processor.tokenizer.padding_side = "left"

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Prompts:
        return prompts(self.processor, self._chosen(step), self._progress(step))

    def _chosen(self, step: int) -> list[Question]:
        return [self._at(step * self.size + i) for i in range(self.size)]

    def _progress(self, step: int) -> float:
        return step / max(1, self.steps - 1)

    def _at(self, number: int) -> Question:
        turn, place = divmod(number, len(self.questions))
        order = list(range(len(self.questions)))
        random.Random(f"{self.seed}/{turn}").shuffle(order)
        return self.questions[order[place]]


class Singles(Batches):
    """The same, each question as a batch of its own."""

    def __getitem__(self, step: int) -> list[Prompts]:  # type: ignore[override]
        return [prompts(self.processor, [one], self._progress(step)) for one in self._chosen(step)]


def prompts(processor: Any, questions: Sequence[Question], progress: float = 1.0) -> Prompts:
    """Questions and answers through a processor."""
    end = processor.tokenizer.eos_token or ""
    texts, lengths = [], []
    for one in questions:
        asked = _asked(processor, one)
        said = (" " if asked.endswith(":") else "") + one.answer + end
        lengths.append(len(processor.tokenizer(said, add_special_tokens=False).input_ids))
        texts.append(asked + said)
    pictures = [[opened(path) for path in one.images] for one in questions]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    return Prompts(dict(inputs), lengths, progress)


def _asked(processor: Any, one: Question) -> str:
    if not processor.chat_template:
        return "\n".join([*[processor.image_token] * len(one.images), one.question])
    content = [{"type": "image"} for _ in one.images] + [{"type": "text", "text": one.question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
