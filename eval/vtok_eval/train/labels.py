"""Which object, colour and character every visual token looks at: the truth that the scene generator knows anyway."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
    next : Tensor
        (rows, columns) the second character in reading order where two have their centres in one cell, else 0.
    centre : Tensor
        (rows, columns) bool: cells that the centre of a thing or of a character lies in.
    order : Tensor
        (rows, columns) number of the character in its word, counted from 1; 0 where there is none.
    framed : Tensor
        (rows, columns) bool: cells inside a frame.
    small : Tensor
        (rows, columns) 1 for a thing without extent, 0 for a quarter of the picture's longer side and above.
    """

    thing: Tensor
    colour: Tensor
    character: Tensor
    next: Tensor
    centre: Tensor
    order: Tensor
    framed: Tensor
    small: Tensor

    def present(self) -> Tensor:
        """(len(THINGS),) 1 where some token looks at such a thing."""
        found = torch.zeros(len(THINGS))
        found[self.thing.unique()] = 1
        found[0] = 0
        return found

    def near(self) -> Tensor:
        """(rows, columns) bool: cells of things and characters at most two cells from a centre, centres included."""
        around = functional.max_pool2d(self.centre.float()[None], 5, 1, 2)[0] > 0
        return around & ((self.thing > 0) | (self.character > 0) | self.centre)

    def window(self, top: int, left: int, rows: int, columns: int) -> Labels:
        """The labels of a part of the grid."""
        part = (slice(top, top + rows), slice(left, left + columns))
        return Labels(*(getattr(self, field.name)[part] for field in fields(self)))


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
    after, order = torch.zeros(2, rows, columns, dtype=torch.long)
    centre, framed = torch.zeros(2, rows, columns, dtype=torch.bool)
    small = torch.zeros(rows, columns)

    def on_grid(box: Sequence[float]) -> tuple[float, float, float, float]:
        return x0 + box[0] * across, y0 + box[1] * down, x0 + box[2] * across, y0 + box[3] * down

    for item in scene.things:
        box = on_grid(item.box)
        if item.kind == "frame":
            framed |= covered(box, rows, columns)
            continue
        name = "text" if item.kind == "text" else item.name
        inside = covered(box, rows, columns)
        thing[inside] = _THING[name]
        small[inside] = max(0.0, 1 - 4 * item.size / max(width, height))
        if not item.letters:
            centre[middle(box, rows, columns)] = True
        # an object's own colours have no name; a shape's colour has
        colour[inside] = _COLOUR[item.colour] if item.kind == "shape" and item.colour else IGNORE
        for number, (letter, part) in enumerate(zip((item.text or "").lower(), item.letters, strict=True), 1):
            under = covered(on_grid(part), rows, columns)
            character[under], order[under] = _CHARACTER[letter], number
        # where two centres share a cell the first is its character, whoever came last
        for number, (letter, part) in enumerate(zip((item.text or "").lower(), item.letters, strict=True), 1):
            cell = middle(on_grid(part), rows, columns)
            (after if centre[cell] else character)[cell] = _CHARACTER[letter]
            order[cell] = order[cell] if centre[cell] else number
            centre[cell] = True
    return Labels(thing, colour, character, after, centre, order, framed, small)


def covered(box: Sequence[float], rows: int, columns: int) -> Tensor:
    """(rows, columns) bool: cells that a box covers to two fifths, at least the one its centre lies in."""
    x0, y0, x1, y1 = box
    across = _overlap(x0, x1, columns)
    down = _overlap(y0, y1, rows)
    inside = down[:, None] * across > 0.4
    inside[middle(box, rows, columns)] = True
    return inside


def middle(box: Sequence[float], rows: int, columns: int) -> tuple[int, int]:
    """Row and column of the cell that a box's centre lies in."""
    row, column = int((box[1] + box[3]) / 2), int((box[0] + box[2]) / 2)
    return min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)


def _overlap(low: float, high: float, cells: int) -> Tensor:
    start = torch.arange(cells)
    return (torch.clamp(start + 1, max=high) - torch.clamp(start, min=low)).clamp(min=0)
