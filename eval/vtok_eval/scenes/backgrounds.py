"""Backgrounds: plain, gradients, noise, stripes, checks and textures, all from the caller's random stream."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from vtok_eval.scenes.vocabulary import COLOURS

Colour = tuple[int, int, int]

# plain colours without a name of their own: "" rather than a name to argue about
NEUTRAL: tuple[Colour, ...] = ((176, 178, 182), (222, 205, 170), (132, 198, 204), (96, 104, 116), (200, 220, 180))

WEIGHTS = {"plain": 8, "gradient": 3, "noise": 3, "stripes": 2, "checks": 2, "grain": 2}


@dataclass(frozen=True)
class Background:
    """A canvas, its colour's name where one colour covers it, and the colours that things must stand out from."""

    image: Image.Image
    name: str
    colours: tuple[Colour, ...]


def jitter(colour: Colour, rng: random.Random, amount: int = 10) -> Colour:
    """The colour moved by up to ``amount`` per channel."""
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


def distance(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    """How far apart two colours look, 0 to about 765: Euclidean with the "redmean" weights."""
    mean = (one[0] + two[0]) / 2
    red, green, blue = (a - b for a, b in zip(one, two, strict=True))
    return ((2 + mean / 256) * red**2 + 4 * green**2 + (2 + (255 - mean) / 256) * blue**2) ** 0.5


def _muted(rng: random.Random) -> Colour:
    """A greyish colour, light or dark, that leaves room for things to stand out."""
    level = rng.choice((rng.randint(165, 235), rng.randint(50, 95)))
    return jitter((level, level, level), rng, 24)


def _field(size: tuple[int, int], rng: random.Random, cells: int) -> Image.Image:
    """Smooth noise: ``cells`` random values a side, scaled up."""
    seed = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells))
    return seed.resize(size, Image.Resampling.BICUBIC)


def _between(one: Colour, two: Colour, mask: Image.Image) -> Image.Image:
    """``one`` where the mask is 0, ``two`` where it is 255."""
    bands = [mask.point([a + (b - a) * level // 255 for level in range(256)]) for a, b in zip(one, two, strict=True)]
    return Image.merge("RGB", bands)


def _stripes(size: tuple[int, int], rng: random.Random, both_ways: bool) -> Image.Image:
    step = rng.randint(14, 48)
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    if both_ways:
        for y in range(0, size[1], step):
            for x in range(y // step % 2 * step, size[0], 2 * step):
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=255)
        return mask
    lean = rng.choice((0, 0, 1, -1, 2)) * size[1] // 2
    upright = rng.random() < 0.5
    for start in range(-2 * sum(size), 2 * sum(size), 2 * step):
        if upright:
            points = [(start, 0), (start + step, 0), (start + step + lean, size[1]), (start + lean, size[1])]
        else:
            points = [(0, start), (0, start + step), (size[0], start + step + lean), (size[0], start + lean)]
        draw.polygon(points, fill=255)
    return mask


def background(size: tuple[int, int], rng: random.Random) -> Background:
    """A background of a random kind; ``size`` is (width, height) in pixels."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind == "plain":
        name = rng.choice([*COLOURS, "", ""])
        colour = jitter(COLOURS[name], rng) if name else jitter(rng.choice(NEUTRAL), rng, 14)
        return Background(Image.new("RGB", size, colour), name, (colour,))
    one = _muted(rng)
    two = _muted(rng) if kind == "gradient" else jitter(one, rng, 28)
    if kind == "gradient":
        mask = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(size)
    elif kind == "noise":
        mask = _field(size, rng, rng.randint(3, 9))
    elif kind == "grain":
        mask = _field(size, rng, rng.randint(40, 110))
    else:
        mask = _stripes(size, rng, kind == "checks")
    middle = tuple((a + b) // 2 for a, b in zip(one, two, strict=True))
    return Background(_between(one, two, mask), "", (one, (middle[0], middle[1], middle[2]), two))
