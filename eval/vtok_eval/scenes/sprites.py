"""Pictures of concepts in three styles, read from one sheet a style, which ``vtok_eval.scenes.sheets`` makes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageChops, ImageFilter, ImageStat

from vtok.errors import VtokError
from vtok_eval.scenes.vocabulary import CONCEPTS, SPRITES

STYLES: dict[str, tuple[str, ...]] = {"seen": ("google", "twitter"), "unseen": ("fluent",)}

COLUMNS = 13
# the seen styles come at 64 px; fluent, scaled down from 256, keeps a little more for its soft shading
CELLS = {"google": 64, "twitter": 64, "fluent": 96}


@dataclass(frozen=True)
class Sprite:
    """A cut-out picture (RGBA, cropped to what is visible) and the mean colour of its rim, which must stand out."""

    image: Image.Image
    rim: tuple[float, float, float]


@cache
def _sheet(style: str) -> Image.Image:
    path = SPRITES / f"{style}.webp"
    if not path.exists():
        raise VtokError(f"{path} is missing: reinstall vtok, or make it with python -m vtok_eval.scenes.sheets")
    with Image.open(path) as sheet:
        return sheet.convert("RGBA")


@cache
def sprite(style: str, name: str) -> Sprite:
    """The picture of a concept in ``"google"``, ``"twitter"`` or ``"fluent"`` style; decoded once."""
    cell = CELLS[style]
    row, column = divmod(CONCEPTS.index(name), COLUMNS)
    image = _sheet(style).crop((column * cell, row * cell, (column + 1) * cell, (row + 1) * cell))
    solid = image.getchannel("A").point(lambda alpha: 255 * (alpha > 40))
    image, solid = image.crop(solid.getbbox()), solid.crop(solid.getbbox())
    padded = Image.new("L", (solid.width + 8, solid.height + 8))
    padded.paste(solid, (4, 4))
    inner = padded.filter(ImageFilter.MinFilter(9)).crop((4, 4, 4 + solid.width, 4 + solid.height))
    red, green, blue = ImageStat.Stat(image.convert("RGB"), ImageChops.subtract(solid, inner)).mean
    return Sprite(image, (red, green, blue))
