"""Pictures of what was kept: dropped patches fade, merged patches share a colour. Pillow only."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vtok.errors import VtokError
from vtok.protocol import Part
from vtok.report import Report

FITS = ("auto", "crop", "pad", "stretch")
PAPER, INK, FADE, LINE = (255, 255, 255), (34, 34, 40), (24, 26, 34), (255, 255, 255)
GAP = 12
SMALLEST, LARGEST = 448, 896  # longer side of a panel in pixels; many tokens may make it larger

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Panel:
    """One rectangle of tokens over one picture.

    Attributes
    ----------
    part : Part
        The rectangle.
    start : int
        Index of its first token.
    picture : PIL.Image
        What the rectangle saw, in RGB; every cell covers a whole number of its pixels.
    """

    part: Part
    start: int
    picture: Image.Image

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of a cell in pixels."""
        return self.picture.width // self.part.width, self.picture.height // self.part.height

    def cells(self) -> Iterator[tuple[int, int, int]]:
        """(token, column, row) of every cell; newline tokens have none."""
        step = self.part.width + (self.part.newlines if self.part.per_row else 0)
        for row in range(self.part.height):
            for column in range(self.part.width):
                yield self.start + row * step + column, column, row


def show(
    image: Image.Image | Sequence[Image.Image],
    report: Report,
    sample: int = 0,
    image_index: int = 0,
    stages: bool = False,
    *,
    fit: str = "auto",
) -> Image.Image:
    """Draw what a prefill kept over the picture it saw.

    Dropped patches are dark and grey, kept ones are clear with a thin border, merged patches share one colour a group
    (the dot marks the patch whose place the merged token takes). An any-resolution image shows its thumbnail beside the
    tile grid, a video its frames side by side.

    Parameters
    ----------
    image : PIL.Image or sequence of PIL.Image
        The picture, or the frames of a video (one picture stands for all frames).
    report : Report
        Of the prefill, from ``vtok.report(model)``.
    sample : int
        Batch row.
    image_index : int
        Which image of that sample.
    stages : bool
        Draw every stage side by side, with captions.
    fit : str
        How the model's processor brought the picture to the token grid: ``"crop"`` (centre crop), ``"pad"``,
        ``"stretch"``, or ``"auto"``: what the family's own processor does.

    Returns
    -------
    PIL.Image
        A new RGB picture.

    Raises
    ------
    VtokError
        No such sample or image, or something that is no picture.
    """
    parts = _entry(report.parts, sample, image_index)
    if fit not in FITS:
        raise VtokError(f"fit={fit!r} is unknown; take one of {', '.join(map(repr, FITS))}")
    panels = _panels(_pictures(image), parts, fit_of(report.family, parts) if fit == "auto" else fit)
    groups = _entry(report.groups, sample, image_index)
    final = set(_entry(report.kept, sample, image_index).tolist())
    if not stages:
        return _row([_draw(panel, final, groups) for panel in panels])
    rows, captions = [], []
    for number, stage in enumerate(report.stages):
        kept = set(_entry(stage.kept, sample, image_index).tolist())
        last = number == len(report.stages) - 1
        rows.append(_row([_draw(panel, kept, groups if last else None) for panel in panels]))
        where = stage.site if stage.layer is None else f"{stage.site}, before layer {stage.layer}"
        captions.append(f"{where}: {len(kept)} tokens")
    if not rows:
        rows, captions = [_row([_draw(panel, final, groups) for panel in panels])], [f"all {len(final)} tokens"]
    return sheet(rows, captions, columns=4 if len(panels) == 1 else 1)


def overlay(
    image: Image.Image | Sequence[Image.Image],
    parts: Sequence[Part],
    kept: Iterable[int],
    groups: Sequence[Sequence[int]] | None = None,
    *,
    fit: str = "stretch",
    longest: int | None = None,
) -> Image.Image:
    """Draw kept tokens over one picture without a report: what ``show`` does, from indices and rectangles.

    Parameters
    ----------
    image
        As for ``show``.
    parts : sequence of Part
        The rectangles that the indices count through.
    kept : iterable of int
        Token indices that are left.
    groups : sequence of sequences of int, optional
        For every kept token, ascending, the tokens that were merged into it.
    fit : str
        As for ``show``, but for ``"auto"``.
    longest : int, optional
        Longer side of a rectangle in pixels, about: cells are whole pixels, six at least.

    Returns
    -------
    PIL.Image
        As ``show`` gives it.

    Raises
    ------
    VtokError
        Something that is no picture.
    """
    panels = _panels(_pictures(image), parts, fit, longest)
    return _row([_draw(panel, set(kept), groups) for panel in panels])


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, width: int = 480) -> Image.Image:
    """Pictures in rows on white paper, each above its caption.

    Parameters
    ----------
    pictures : sequence of PIL.Image
        Of any size; those wider or taller than ``width`` are shrunk to it, keeping their shape.
    captions : sequence of str
        One a picture.
    columns : int
        Most pictures in a row.
    width : int
        Of a column in pixels; a single column takes the pictures as they are.

    Raises
    ------
    VtokError
        No picture, or not as many captions as pictures.
    """
    if not pictures or len(pictures) != len(captions):
        raise VtokError(f"{len(pictures)} pictures and {len(captions)} captions make no sheet; give one caption each")
    columns = max(1, min(columns, len(pictures)))
    if columns > 1:
        pictures = [picture.copy() for picture in pictures]
        for picture in pictures:
            picture.thumbnail((width, width), Image.Resampling.LANCZOS)
    across = max(picture.width for picture in pictures)
    font = ImageFont.load_default(size=max(12, min(20, across // 26)))
    captions = [_shorten(caption, font, across) for caption in captions]
    line = int(font.getbbox("Ag")[3]) + GAP
    rows = [list(range(i, min(i + columns, len(pictures)))) for i in range(0, len(pictures), columns)]
    heights = [max(pictures[i].height for i in row) + line for row in rows]
    canvas = Image.new("RGB", (columns * (across + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1)), PAPER)
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = GAP + column * (across + GAP)
            canvas.paste(pictures[i], (left + (across - pictures[i].width) // 2, top))
            middle = left + across // 2
            draw.text((middle, top + height - line + GAP // 2), captions[i], fill=INK, font=font, anchor="ma")
        top += height + GAP
    return canvas


# -- which picture lies under which rectangle ---------------------------------------------------------------------


def _entry(table: Sequence[Sequence[Any]], sample: int, image_index: int) -> Any:
    if not 0 <= sample < len(table):
        raise VtokError(f"there is no sample {sample}: the report holds samples 0 to {len(table) - 1}")
    row = table[sample]
    if not 0 <= image_index < len(row):
        held = f"images 0 to {len(row) - 1}" if row else "no image"
        raise VtokError(f"there is no image {image_index} in sample {sample}: it holds {held}")
    return row[image_index]


def _pictures(image: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    found = [image] if isinstance(image, Image.Image) else list(image) if isinstance(image, Sequence) else []
    if not found or not all(isinstance(picture, Image.Image) for picture in found):
        raise VtokError(
            f"vtok.show needs a PIL picture or a list of frames, not {type(image).__name__}; open files with "
            "PIL.Image.open, make pictures of arrays with PIL.Image.fromarray"
        )
    return [picture.convert("RGB") for picture in found]


def fit_of(family: str, parts: Sequence[Part]) -> str:
    """How a family's own processor brings a picture to ``parts``: LLaVA-1.5's crops, OneVision's pads an image that has
    others beside it, all else is resized whole."""
    if family == "llava":
        return "crop"
    return "pad" if family == "llava_onevision" and len(parts) == 1 else "stretch"


def _panels(
    pictures: Sequence[Image.Image], parts: Sequence[Part], fit: str, longest: int | None = None
) -> list[Panel]:
    starts = [sum(part.length for part in parts[:i]) for i in range(len(parts))]
    drawn = [i for i, part in enumerate(parts) if part.height > 1 or len(parts) == 1]  # a prefix token has no place
    drawn = drawn or list(range(len(parts)))
    anyres = len(parts) == 2 and parts[1].per_row
    video = len(drawn) > 1 and not anyres
    if len(pictures) > 1 and not video:
        raise VtokError(f"{len(pictures)} pictures were given for one image; only a video takes a list of frames")
    panels = []
    for place, i in enumerate(drawn):
        picture = pictures[place * len(pictures) // len(drawn)]
        panels.append(Panel(parts[i], starts[i], _place(picture, parts[i], fit, longest)))
    return panels


def _place(picture: Image.Image, part: Part, fit: str, longest: int | None = None) -> Image.Image:
    """The picture as a rectangle of tokens saw it, with whole cells. Stretched pictures keep their own aspect here: it
    is the cells that are not square."""
    ratio = part.width / part.height
    width, height = float(picture.width), float(picture.height)
    if fit == "crop":
        width, height = min(width, height * ratio), min(height, width / ratio)
    elif fit == "pad":
        width, height = max(width, height * ratio), max(height, width / ratio)
    longer = max(width, height)
    scale = (longest or min(max(longer, SMALLEST), LARGEST)) / longer
    across = max(6, round(width * scale / part.width)) * part.width
    down = max(6, round(height * scale / part.height)) * part.height
    if fit == "crop":
        return ImageOps.fit(picture, (across, down), Image.Resampling.LANCZOS)
    if fit == "pad":
        return ImageOps.pad(picture, (across, down), Image.Resampling.LANCZOS, color=(128, 128, 128))
    return picture.resize((across, down), Image.Resampling.LANCZOS)


# -- drawing ------------------------------------------------------------------------------------------------------


def _draw(panel: Panel, kept: set[int], groups: Sequence[Sequence[int]] | None) -> Image.Image:
    """One rectangle: ``kept`` tokens are clear; members of merged ``groups`` take their group's colour."""
    owner, standing = _owners(kept, groups)
    clear = Image.new("L", (panel.part.width, panel.part.height), 0)
    tint = Image.new("L", clear.size, 0)
    colours = Image.new("RGB", clear.size)
    for token, column, row in panel.cells():
        clear.putpixel((column, row), 255 * (token in kept or token in owner))
        if token in owner:
            tint.putpixel((column, row), 255)
            colours.putpixel((column, row), _colour(owner[token]))
    size = panel.picture.size
    grown = [layer.resize(size, Image.Resampling.NEAREST) for layer in (clear, tint, colours)]
    grey = ImageOps.grayscale(panel.picture).convert("RGB")
    canvas = Image.composite(panel.picture, Image.blend(grey, Image.new("RGB", size, FADE), 0.68), grown[0])
    # colour over grey: over the photo's own hues two cells of one group would look different
    canvas = Image.composite(Image.blend(grey, grown[2], 0.55), canvas, grown[1])
    _borders(canvas, panel, kept, owner, standing)
    return canvas


def _owners(kept: set[int], groups: Sequence[Sequence[int]] | None) -> tuple[dict[int, int], set[int]]:
    """Group number of every merged token, and the tokens that stand for these groups."""
    owner: dict[int, int] = {}
    standing: set[int] = set()
    number = 0
    for token, members in zip(sorted(kept), groups or (), strict=False):
        if len(members) > 1:
            owner.update(dict.fromkeys(members, number))
            standing.add(token)
            number += 1
    return owner, standing


def _colour(number: int) -> RGB:
    """Steps of the golden angle around the colour circle, in three strengths: neighbours in number are far apart."""
    hue = (0.55 + number * (3 - math.sqrt(5)) / 2) % 1.0
    saturation, value = ((0.85, 1.0), (0.55, 1.0), (0.9, 0.75))[number % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _borders(canvas: Image.Image, panel: Panel, kept: set[int], owner: Mapping[int, int], standing: set[int]) -> None:
    """A faint line around every kept cell, a clear one along the rim of kept areas and of groups."""
    width, height = panel.cell
    lines = Image.new("L", canvas.size, 0)
    pen, marks = ImageDraw.Draw(lines), ImageDraw.Draw(canvas)
    # group number of merged cells, -1 of cells that stand for themselves; dropped ones are missing
    area = {(x, y): owner.get(token, -1) for token, x, y in panel.cells() if token in owner or token in kept}
    for (column, row), group in area.items():
        left, top = column * width, row * height
        right, bottom = left + width - 1, top + height - 1
        if group < 0:
            pen.rectangle((left, top, right, bottom), outline=70)
    for (column, row), group in area.items():
        left, top = column * width, row * height
        right, bottom = left + width - 1, top + height - 1
        edges = {
            (column - 1, row): (left, top, left, bottom),
            (column + 1, row): (right, top, right, bottom),
            (column, row - 1): (left, top, right, top),
            (column, row + 1): (left, bottom, right, bottom),
        }
        for neighbour, edge in edges.items():
            if area.get(neighbour, -2) != group:
                if group < 0:
                    pen.line(edge, fill=190)
                else:
                    marks.line(edge, fill=_colour(group))
    for token, column, row in panel.cells():
        if token in standing and min(width, height) >= 10:
            middle, centre = column * width + width // 2, row * height + height // 2
            radius = min(6, min(width, height) // 5)
            box = (middle - radius, centre - radius, middle + radius, centre + radius)
            marks.ellipse(box, fill=PAPER, outline=INK)
    canvas.paste(Image.new("RGB", canvas.size, LINE), mask=lines)


def _row(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side; long videos wrap so that the whole stays near a screen's shape."""
    if len(pictures) == 1:
        return pictures[0]
    columns = min(len(pictures), 4) if len(pictures) > 6 else len(pictures)
    across, down = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = math.ceil(len(pictures) / columns)
    canvas = Image.new("RGB", (columns * (across + GAP) - GAP, rows * (down + GAP) - GAP), PAPER)
    for i, picture in enumerate(pictures):
        column, row = i % columns, i // columns
        canvas.paste(picture, (column * (across + GAP), row * (down + GAP) + (down - picture.height) // 2))
    return canvas


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while len(text) > 4 and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text
