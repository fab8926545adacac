"""A question with its truth, and a set of them: what every source of data becomes, and all that the harness sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

INSTRUCTION = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Sample:
    """One question about one or more pictures.

    Attributes
    ----------
    id : str
        Unique within its task.
    task : str
        The task's name.
    images : tuple of str
        Names that ``Task.picture`` opens, in the order of the prompt.
    question, answer : str
        The prompt's text and the truth.
    accepted : tuple of str
        Further answers that are right.
    group : str
        Reported apart: ``"seen"``, or ``"unseen"`` for a picture style that no embedded model was trained on.
    meta : mapping
        Whatever the source adds, such as ``{"negative": "adversarial"}``.
    """

    id: str
    task: str
    images: tuple[str, ...]
    question: str
    answer: str
    accepted: tuple[str, ...] = ()
    group: str = "seen"
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Samples of one kind and the pictures that they name.

    Attributes
    ----------
    name : str
        Shown in tables.
    samples : tuple of Sample
        In a fixed order.
    picture : callable
        Opens a picture by name: RGB. Raises ``VtokError`` where it is missing or broken.
    metric : str
        ``"accuracy"`` (exact match after normalisation), or ``"yes/no"`` (the same, and F1 of "yes" besides).
    instruction : str
        Put behind the question for models that were not trained on bare questions.
    source : str
        Where the data is from, for the report.
    fingerprint : str
        Of questions, truths and pictures; a changed task never reuses cached answers.
    """

    name: str
    samples: tuple[Sample, ...]
    picture: Callable[[str], Image.Image]
    metric: str = "accuracy"
    instruction: str = INSTRUCTION
    source: str = "bundled"
    fingerprint: str = ""
