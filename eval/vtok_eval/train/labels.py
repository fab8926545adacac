"""Which object, colour and character every visual token looks at: the truth that the scene generator knows anyway."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok_eval import scenes

#: classes of the three label maps; 0 is "nothing", IGNORE takes no part in a loss
THINGS = ("", *scenes.CONCEPTS, *scenes.SHAPES, "text")
COLOURS = ("", *scenes.COLOURS)
CHARACTERS = ("", *string.ascii_lowercase, *string.digits)
IGNORE = -100

_THING = {name: number for number, name in enumerate(THINGS)}
_COLOUR = {name: number for number, name in enumerate(COLOURS)}
_CHARACTER = {name: number for number, name in enumerate(CHARACTERS)}


@dataclass
class Labels:
    """Truth for the tokens of one picture.

    Attributes
    ----------
    thing, colour, character : Tensor
        (rows, columns) class of each token's cell; ``IGNORE`` where it is not defined.
    """

    thing: Tensor
    colour: Tensor
    character: Tensor

    def present(self) -> Tensor:
        """(len(THINGS),) 1 where some token looks at such a thing."""
        found = torch.zeros(len(THINGS))
        found[self.thing.unique()] = 1
        found[0] = 0
        return found

    def window(self, top: int, left: int, rows: int, columns: int) -> Labels:
        """The labels of a part of the grid."""
        part = (slice(top, top + rows), slice(left, left + columns))
        return Labels(self.thing[part], self.colour[part], self.character[part])


def labels(scene: Any, rows: int, columns: int, frame: Sequence[float]) -> Labels:
    """Label maps of a scene on a token grid.

    Parameters
    ----------
    scene : vtok_eval.scenes.Scene
        With boxes in pixels of its own picture.
    rows, columns : int
        The token grid.
    frame : sequence of float
        (x0, y0, x1, y1): the part of the grid that the picture fills, in cells.
    """
    width, height = scene.image.size
    x0, y0, x1, y1 = frame
    across, down = (x1 - x0) / width, (y1 - y0) / height
    thing = torch.zeros(rows, columns, dtype=torch.long)
    colour = torch.full((rows, columns), _COLOUR.get(scene.background, IGNORE), dtype=torch.long)
    character = torch.zeros(rows, columns, dtype=torch.long)

    def on_grid(box: Sequence[float]) -> tuple[float, float, float, float]:
        return x0 + box[0] * across, y0 + box[1] * down, x0 + box[2] * across, y0 + box[3] * down

    for item in scene.things:
        box = on_grid(item.box)
        if item.kind == "frame":
            continue
        name = "text" if item.kind == "text" else item.name
        inside = covered(box, rows, columns)
        thing[inside] = _THING[name]
        # an object's own colours have no name; a shape's colour has
        colour[inside] = _COLOUR[item.colour] if item.kind == "shape" and item.colour else IGNORE
        for letter, part in zip((item.text or "").lower(), item.letters, strict=True):
            character[covered(on_grid(part), rows, columns)] = _CHARACTER[letter]
    return Labels(thing, colour, character)


def covered(box: Sequence[float], rows: int, columns: int) -> Tensor:
    """(rows, columns) bool: cells that a box covers to two fifths, at least the one its centre lies in."""
    x0, y0, x1, y1 = box
    across = _overlap(x0, x1, columns)
    down = _overlap(y0, y1, rows)
    inside = down[:, None] * across > 0.4
    row, column = int((y0 + y1) / 2), int((x0 + x1) / 2)
    inside[min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)] = True
    return inside


def _overlap(low: float, high: float, cells: int) -> Tensor:
    start = torch.arange(cells)
    return (torch.clamp(start + 1, max=high) - torch.clamp(start, min=low)).clamp(min=0)
