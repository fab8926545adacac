"""What a scene is: its picture, the things in it with their boxes, and the questions that they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """One thing in a picture.

    Attributes
    ----------
    name : str
        A concept, a shape, ``"word"`` or ``"number"``, or ``"frame"``.
    kind : str
        ``"object"``, ``"shape"``, ``"text"`` or ``"frame"``.
    colour : str or None
        Of a shape or a frame.
    box : tuple of int
        ``(x0, y0, x1, y1)``, pixels, the visible extent; ``x1`` and ``y1`` are outside.
    text : str or None
        What a ``"text"`` thing reads, as it is drawn.
    letters : tuple of box
        Where its characters are.
    """

    name: str
    kind: str
    colour: str | None
    box: Box
    text: str | None = None
    letters: tuple[Box, ...] = ()

    @property
    def centre(self) -> tuple[float, float]:
        """``(x, y)``, pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def size(self) -> int:
        """The longer side of the box, pixels."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True)
class Scene:
    """A picture (RGB) and all that is known about it.

    Attributes
    ----------
    background : str
        A colour's name, or empty where no single colour stands out.
    style : str
        ``"seen"``, or ``"unseen"``: pictures (in a ``"text"`` scene letters too) of a style kept for testing.
    kind : str
        One of ``KINDS``.
    """

    image: Image.Image
    things: tuple[Thing, ...]
    background: str
    style: str
    kind: str

    def named(self, kind: str) -> list[Thing]:
        """Things of a kind, in the order they were drawn."""
        return [thing for thing in self.things if thing.kind == kind]

    def names(self) -> set[str]:
        """Concepts in the picture."""
        return {thing.name for thing in self.things if thing.kind == "object"}


@dataclass(frozen=True)
class QA:
    """A task's question with its answer (lower case), other right answers, and notes such as the kind of negative."""

    task: str
    question: str
    answer: str
    accepted: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
