"""Words and numbers on plates, in fonts that matplotlib carries."""

from __future__ import annotations

import random
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from vtok.errors import VtokError
from vtok_eval.scenes.backgrounds import Colour, distance, jitter
from vtok_eval.scenes.records import Box

FONTS: dict[str, tuple[str, ...]] = {
    "seen": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono"),
    "unseen": ("STIXGeneral", "STIXGeneralBol", "cmss10", "cmtt10"),
}

PLATES: tuple[Colour, ...] = (
    *((250, 250, 248), (250, 246, 222), (226, 232, 240), (255, 226, 120), (200, 230, 200)),
    *((30, 30, 34), (24, 60, 120), (20, 90, 60), (130, 24, 30)),
)
INKS: tuple[Colour, ...] = ((20, 20, 24), (20, 40, 120), (140, 20, 24), (14, 84, 50), (250, 250, 250), (255, 232, 120))

# short words that a sign could carry; none is a colour, a shape or a concept
COMMON = (
    "bank cafe taxi stop open shop exit push pull hotel park milk sale menu music food juice soup salt meat rice "
    "lunch north south east west road lane city town river lake beach hill sand wind rain snow storm sunny gold iron "
    "wood stone glass paper metal silk lamp desk table shelf floor wall roof gate mail post news film radio game team "
    "goal match race run jump swim walk ride fly sing dance read write draw play work rest sleep wake hello world "
    "happy smile good best nice fine cool warm cold fast slow high low big tiny long short new old young first last "
    "next back hour day week month year april june july mix fix max taxes quiz jazz zoo zone "
)
COMMON_WORDS: tuple[str, ...] = tuple(COMMON.split())
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
# letters drawn at random must not spell an insult
AVOIDED = (
    "neg",
    "nig",
    "fag",
    "jap",
    "kik",
    "spic",
    "cum",
    "tit",
    "sex",
    "fuc",
    "fuk",
    "dic",
    "dik",
    "rap",
    "naz",
    "hoe",
)
PATTERNS = ("cvc", "cvc", "cvcv", "cvcv", "cvcc", "vcv", "vcvc", "ccvc", "cvcvc", "cvccv")


@cache
def fonts() -> Path:
    """The folder of matplotlib's fonts."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise VtokError("scenes with text need the fonts of matplotlib, which is missing: pip install 'vtok[eval]'")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(fonts() / f"{name}.ttf", size, layout_engine=ImageFont.Layout.BASIC)


def _invented(rng: random.Random) -> str:
    word = "".join(rng.choice(CONSONANTS if place == "c" else VOWELS) for place in rng.choice(PATTERNS))
    return _invented(rng) if any(part in word for part in AVOIDED) else word


def reading(rng: random.Random) -> tuple[str, str]:
    """``("word", letters)`` in one case, 3 to 5 of them, or ``("number", digits)``, 2 to 4 without a leading zero."""
    if rng.random() < 0.3:
        digits = rng.choice((2, 3, 3, 4))
        return "number", str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    if rng.random() < 0.4:
        word = rng.choice(COMMON_WORDS)
    else:
        word = _invented(rng)
    return "word", word.upper() if rng.random() < 0.5 else word


class Sign(NamedTuple):
    """A sign in RGBA, its colour, and the boxes of its characters."""

    image: Image.Image
    paper: Colour
    letters: tuple[Box, ...]

    def at(self, x: int, y: int) -> tuple[Box, ...]:
        """The characters' boxes with the sign's top left corner there."""
        return tuple((x + x0, y + y0, x + x1, y + y1) for x0, y0, x1, y1 in self.letters)


def plate(text: str, height: int, style: str, rng: random.Random) -> Sign:
    """A sign with ``text`` whose capitals are about ``height`` pixels tall."""
    name = rng.choice(FONTS[style])
    # a capital is about 0.7 of the font size in all these faces
    font = _font(name, round(height / 0.7 / 2) * 2)
    left, top, right, bottom = font.getbbox(text)
    pad = rng.randint(height // 3, height * 2 // 3)
    paper, ink = rng.choice(PLATES), rng.choice(INKS)
    while distance(paper, ink) < 330:
        paper, ink = rng.choice(PLATES), rng.choice(INKS)
    paper = jitter(paper, rng, 6)
    size = (round(right - left) + 2 * pad, round(bottom - top) + 2 * pad)
    image = Image.new("RGBA", size, (*paper, 0))
    draw = ImageDraw.Draw(image)
    edge = {"fill": paper} if rng.random() < 0.5 else {"fill": paper, "outline": ink, "width": 2}
    draw.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), rng.choice((0, 6, pad // 2)), **edge)
    draw.text((pad - left, pad - top), text, font=font, fill=ink)
    stops = [pad - left + round(font.getlength(text[:place])) for place in range(len(text) + 1)]
    letters = tuple((int(x0), pad, int(x1), size[1] - pad) for x0, x1 in pairwise(stops))
    return Sign(image, paper, letters)
