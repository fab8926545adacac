"""Coloured shapes, drawn at four times their size and scaled down for smooth edges."""

from __future__ import annotations

from functools import cache
from math import cos, pi, sin

from PIL import Image, ImageDraw

FINE = 4
STAR = [(0.5 + r * sin(k * pi / 5), 0.5 - r * cos(k * pi / 5)) for k in range(10) for r in [0.5 if k % 2 == 0 else 0.2]]
HEART = [
    (0.5 + 16 * sin(t) ** 3 / 34, 0.47 - (13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 34)
    for t in (k * pi / 40 for k in range(80))
]
POLYGONS: dict[str, list[tuple[float, float]]] = {
    "arrow": [(0, 0.36), (0.52, 0.36), (0.52, 0.1), (1, 0.5), (0.52, 0.9), (0.52, 0.64), (0, 0.64)],
    "cross": [
        *((0.34, 0), (0.66, 0), (0.66, 0.34), (1, 0.34), (1, 0.66), (0.66, 0.66)),
        *((0.66, 1), (0.34, 1), (0.34, 0.66), (0, 0.66), (0, 0.34), (0.34, 0.34)),
    ],
    "diamond": [(0.5, 0), (0.84, 0.5), (0.5, 1), (0.16, 0.5)],
    "heart": HEART,
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "star": STAR,
    "triangle": [(0.5, 0.06), (1, 0.94), (0, 0.94)],
}


@cache
def _stencil(name: str, size: int, angle: int) -> Image.Image:
    big = Image.new("L", (size * FINE, size * FINE))
    draw = ImageDraw.Draw(big)
    if name == "circle":
        draw.ellipse((0, 0, size * FINE - 1, size * FINE - 1), fill=255)
    else:
        draw.polygon([(x * size * FINE, y * size * FINE) for x, y in POLYGONS[name]], fill=255)
    if angle:
        big = big.rotate(angle, expand=True)
    return big.resize((-(-big.width // FINE), -(-big.height // FINE)), Image.Resampling.BOX)


def shape(name: str, size: int, angle: int, colour: tuple[int, int, int]) -> Image.Image:
    """A filled shape, ``size`` pixels before it is turned by ``angle`` degrees: RGBA, cropped to what is visible."""
    # even sizes and every third degree: the stencils of a long run fit the cache
    stencil = _stencil(name, size // 2 * 2, angle // 3 * 3)
    image = Image.new("RGBA", stencil.size, (*colour, 0))
    image.putalpha(stencil)
    return image.crop(stencil.point(lambda alpha: 255 * (alpha > 40)).getbbox())
