"""Scenes: pictures of objects, shapes and text with exact truth, a few milliseconds each."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageEnhance

from vtok.errors import VtokError
from vtok_eval.scenes.backgrounds import Background, background, distance, jitter
from vtok_eval.scenes.layout import Layout
from vtok_eval.scenes.lettering import plate, reading
from vtok_eval.scenes.records import Box, Scene, Thing
from vtok_eval.scenes.shapes import shape
from vtok_eval.scenes.sprites import STYLES, sprite
from vtok_eval.scenes.vocabulary import COLOURS, CONCEPTS, POPULAR, SHAPES

KINDS: tuple[str, ...] = ("mixed", "count", "text", "detail")
SIZES: tuple[tuple[int, int], ...] = ((448, 336), (336, 448), (392, 392), (448, 448))
FRAME = (222, 24, 32)

# colours that stand out from fewer backgrounds are drawn more often, so that none is a good guess
RARE = {"brown": 5.0, "purple": 3.0, "green": 2.5, "black": 1.5, "white": 1.3, "pink": 1.4}

_POOL = (*CONCEPTS, *POPULAR)


def _turned(image: Image.Image, side: int, angle: float) -> Image.Image:
    """RGBA scaled to a longer side of ``side`` pixels, turned, cropped; transparent pixels lend no colour to edges."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.convert("RGBa").resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    image = image.convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 40)).getbbox())


class Canvas:
    """A scene in the making."""

    def __init__(self, style: str, size: tuple[int, int], rng: random.Random) -> None:
        self.rng, self.style = rng, style
        self.back: Background = background(size, rng)
        self.image = self.back.image
        self.layout = Layout(size, rng)
        self.things: list[Thing] = []
        # letters and small things shrink with the picture wherever a model resizes it: they grow with it here
        self.scale = max(size) / 336

    def stands_out(self, colour: tuple[float, ...], least: float) -> bool:
        return all(distance(colour, other) >= least for other in self.back.colours)

    def shows(self, name: str, style: str) -> bool:
        return self.stands_out(sprite(style, name).rim, 120)

    def suits(self, include: Sequence[str]) -> bool:
        """Whether each of the concepts stands out in one style at least."""
        return all(any(self.shows(name, style) for style in STYLES[self.style]) for name in include)

    def paste(self, image: Image.Image, box: Box) -> None:
        self.image.paste(image, box[:2], image)

    def concepts(self, number: int, include: Sequence[str] = ()) -> list[tuple[str, str]]:
        """Distinct concepts that stand out here, each with a picture style: (name, style)."""
        chosen: dict[str, str] = {}
        for name in include:
            styles = self.rng.sample(STYLES[self.style], len(STYLES[self.style]))
            chosen[name] = next((style for style in styles if self.shows(name, style)), styles[0])
        while len(chosen) < number:
            name, style = self.rng.choice(_POOL), self.rng.choice(STYLES[self.style])
            if name not in chosen and self.shows(name, style):
                chosen[name] = style
        return list(chosen.items())

    def add_object(self, name: str, style: str, side: int, zoned: float = 0.6) -> Thing | None:
        image = sprite(style, name).image
        if self.rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        alpha = image.getchannel("A")
        image = ImageEnhance.Brightness(image.convert("RGB")).enhance(self.rng.uniform(0.88, 1.1))
        image = ImageEnhance.Contrast(image).enhance(self.rng.uniform(0.88, 1.1))
        image.putalpha(alpha)
        image = _turned(image, side, self.rng.uniform(-20, 20))
        box = self.layout.place(image.size, zoned)
        if box is None:
            return None
        self.paste(image, box)
        thing = Thing(name, "object", None, box)
        self.things.append(thing)
        return thing

    def add_shapes(self, number: int) -> None:
        names = self.rng.sample(SHAPES, number)
        colours = [name for name in COLOURS if self.stands_out(COLOURS[name], 220)]
        # weighted and without repeats: the largest of u ** (1 / weight)
        colours.sort(key=lambda colour: -(self.rng.random() ** (1 / RARE.get(colour, 1))))
        for name, colour in zip(names, colours, strict=False):
            angle = self.rng.choice((0, 0, 90, 180, 270)) if name == "arrow" else 0
            angle += self.rng.randint(-14, 14)
            image = shape(name, self.rng.randint(44, 100), angle, jitter(COLOURS[colour], self.rng))
            box = self.layout.place(image.size)
            if box is not None:
                self.paste(image, box)
                self.things.append(Thing(name, "shape", colour, box))

    def scene(self, kind: str) -> Scene:
        return Scene(self.image, tuple(self.things), self.back.name, self.style, kind)


def _mixed(canvas: Canvas, include: Sequence[str]) -> None:
    rng = canvas.rng
    number = max(rng.choices((1, 2, 3, 4, 5), (30, 25, 20, 15, 10))[0], len(include))
    largest = 140 if number < 4 else 110
    sides = sorted((rng.randint(56, largest) for _ in range(number)), reverse=True)
    for (name, style), side in zip(canvas.concepts(number, include), sides, strict=False):
        canvas.add_object(name, style, side)
    canvas.add_shapes(rng.choices((0, 1, 2, 3), (35, 30, 20, 15))[0])


def _count(canvas: Canvas, include: Sequence[str]) -> None:
    rng = canvas.rng
    chosen = canvas.concepts(1 + rng.choices((0, 1, 2, 3), (30, 30, 20, 20))[0], include)
    name, style = chosen[0]
    styles = STYLES[canvas.style] if rng.random() < 0.3 else (style,)
    for side in sorted((rng.randint(44, 90) for _ in range(rng.randint(1, 6))), reverse=True):
        canvas.add_object(name, rng.choice(styles), side, zoned=0)
    for other, style in chosen[1:]:
        canvas.add_object(other, style, rng.randint(44, 90), zoned=0)


def _text(canvas: Canvas, include: Sequence[str]) -> None:
    rng = canvas.rng
    kind, text = reading(rng)
    height = round(rng.randint(22, 48) * canvas.scale)
    sign = plate(text, height, canvas.style, rng)
    while sign.image.width > canvas.image.width - 8 or not canvas.stands_out(sign.paper, 110):
        height -= 2 * (sign.image.width > canvas.image.width - 8)
        sign = plate(text, height, canvas.style, rng)
    box = canvas.layout.place(sign.image.size)
    if box is None:
        raise AssertionError("an empty canvas has room for a sign")
    canvas.paste(sign.image, box)
    canvas.things.append(Thing(kind, "text", None, box, text, sign.at(*box[:2])))
    for name, style in canvas.concepts(max(rng.randint(0, 3), len(include)), include):
        canvas.add_object(name, style, rng.randint(56, 120))


def _detail(canvas: Canvas, include: Sequence[str]) -> None:
    rng = canvas.rng
    framed = rng.random() < 0.5 and canvas.stands_out(FRAME, 200)
    chosen = canvas.concepts(rng.randint(4, 7), include)
    rng.shuffle(chosen)
    small, others = chosen[0], chosen[1:]
    sides = sorted((rng.randint(60, 116) for _ in others), reverse=True)
    side = round(rng.randint(24, 36) * canvas.scale)
    target = 0 if framed and rng.random() < 0.75 else rng.randint(1, len(others)) if framed and others else None
    for place, ((name, style), pixels) in enumerate([(small, side), *zip(others, sides, strict=True)]):
        thing = canvas.add_object(name, style, pixels, zoned=0.2)
        if thing is not None and place == target:
            _frame(canvas, thing)


def _frame(canvas: Canvas, thing: Thing) -> None:
    margin = 8
    x0, y0, x1, y1 = thing.box
    box = (max(0, x0 - margin), max(0, y0 - margin), x1 + margin, y1 + margin)
    box = (box[0], box[1], min(canvas.image.width, box[2]), min(canvas.image.height, box[3]))
    if any(b[0] < box[2] and box[0] < b[2] and b[1] < box[3] and box[1] < b[3] for b in canvas.layout.taken[:-1]):
        return
    ImageDraw.Draw(canvas.image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=FRAME, width=3)
    canvas.layout.taken[-1] = box
    canvas.things.append(Thing("frame", "frame", "red", box))


_MAKERS = {"mixed": _mixed, "count": _count, "text": _text, "detail": _detail}


def make(
    kind: str,
    rng: random.Random,
    style: str = "seen",
    size: tuple[int, int] | None = None,
    include: Sequence[str] = (),
) -> Scene:
    """A new scene, the same for the same state of ``rng``.

    Parameters
    ----------
    kind : str
        One of ``KINDS``.
    style : str
        ``"seen"`` or ``"unseen"``: which pictures, and in a text scene which fonts.
    size : tuple of int, optional
        (width, height), pixels; drawn from ``(336, 336)`` (60%) and ``SIZES`` by default.
    include : sequence of str
        Concepts that must be in the picture (in a count scene the first is the one to count).

    Raises
    ------
    VtokError
        Where a name is unknown.
    """
    if kind not in _MAKERS:
        raise VtokError(f"there is no scene kind {kind!r}: choose from {', '.join(KINDS)}")
    if style not in STYLES:
        raise VtokError(f"there is no style {style!r}: choose from {', '.join(STYLES)}")
    if unknown := [name for name in include if name not in CONCEPTS]:
        raise VtokError(f"no picture of {', '.join(unknown)}: scenes.CONCEPTS lists what there is")
    if size is None:
        size = (336, 336) if rng.random() < 0.6 else rng.choice(SIZES)
    canvas = Canvas(style, size, rng)
    while not canvas.suits(include):
        canvas = Canvas(style, size, rng)
    _MAKERS[kind](canvas, include)
    return canvas.scene(kind)


def pair(rng: random.Random, style: str = "seen", size: tuple[int, int] | None = None) -> tuple[Scene, Scene]:
    """Two mixed scenes for ``pair_questions``; every other pair has a concept in common."""
    first = make("mixed", rng, style, size)
    shared = [rng.choice(sorted(first.names()))] if rng.random() < 0.5 and first.names() else []
    return first, make("mixed", rng, style, size, shared)
