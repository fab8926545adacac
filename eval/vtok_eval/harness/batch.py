"""Samples as model inputs: those whose pictures open, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vtok.errors import VtokError
from vtok_eval.harness.answers import Answers, identity
from vtok_eval.harness.cells import Entry
from vtok_eval.harness.counts import Seen
from vtok_eval.samples import Sample, Task

GREY = (128, 128, 128)


@dataclass
class Batch:
    """Some samples of a task.

    Attributes
    ----------
    answers : Answers
        The model.
    task : Task
        Theirs.
    samples : list of Sample
        Those that can be asked.
    texts : list of str
        Their prompts.
    pictures : list of list of PIL.Image
        Theirs.
    broken : list of (Sample, str)
        Those that cannot, and why.
    """

    answers: Answers
    task: Task
    samples: list[Sample] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    pictures: list[list[Image.Image]] = field(default_factory=list)
    broken: list[tuple[Sample, str]] = field(default_factory=list)
    _made: dict[bool, tuple[Any, list[bytes]]] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: Answers, task: Task, samples: Sequence[Sample]) -> Batch:
        """Open the pictures of samples."""
        made = cls(answers, task)
        for sample in samples:
            try:
                pictures = [task.picture(name) for name in sample.images]
            # a task may bring any function that opens pictures; one that does not open must not end a run of hours
            except Exception as error:
                made.broken.append((sample, sentence(error)))
                continue
            made.samples.append(sample)
            made.pictures.append(pictures)
            made.texts.append(answers.prompts.text(task, sample))
        return made

    def ask(self, entry: Entry) -> list[tuple[str, Seen]]:
        """Answers of ``samples``, and what the decoder saw of their pictures."""
        inputs, keys = self._inputs(entry.blank)
        return self.answers.ask(entry, inputs, [len(own) for own in self.pictures], keys)

    def _inputs(self, blank: bool) -> tuple[Any, list[bytes]]:
        """Model inputs and the identity of every picture, made once for all entries."""
        if blank not in self._made:
            pictures = [[grey(one) for one in own] for own in self.pictures] if blank else self.pictures
            keys = [identity(one) for own in pictures for one in own]
            self._made[blank] = self.answers.inputs(self.texts, pictures), keys
        return self._made[blank]

    def singles(self) -> list[Batch]:
        """One batch for each of ``samples``."""
        parts = zip(self.samples, self.texts, self.pictures, strict=True)
        return [Batch(self.answers, self.task, [one], [text], [own]) for one, text, own in parts]


def inputs_of(answers: Answers, task: Task, sample: Sample) -> dict[str, Any] | None:
    """Model inputs of one sample; ``None`` where its pictures do not open or the processor does not take them."""
    try:
        pictures = [task.picture(name) for name in sample.images]
        return dict(answers.inputs([answers.prompts.text(task, sample)], [pictures]))
    # whatever it is, it is reported with the sample's answers, and the others are timed all the same
    except Exception:
        return None


def grey(picture: Image.Image) -> Image.Image:
    """An empty picture of the same size."""
    return Image.new("RGB", picture.size, GREY)


def sentence(error: BaseException) -> str:
    """What went wrong, on one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, VtokError) else f"{type(error).__name__}: {text}"[:500]
