"""Crowded scenes: as many named things as fit. They ask nothing; a vision tower learns four times faster from them."""

from __future__ import annotations

import random

from vtok_eval.scenes.generate import SIZES, Canvas
from vtok_eval.scenes.lettering import plate, reading
from vtok_eval.scenes.records import Scene, Thing


def crowd(rng: random.Random, size: tuple[int, int] | None = None) -> Scene:
    """A scene of about seventeen objects, some shapes and signs, of kind ``"crowd"``.

    Parameters
    ----------
    rng : random.Random
        The same state gives the same scene.
    size : tuple of int, optional
        (width, height), pixels; drawn as ``make`` draws it by default.
    """
    if size is None:
        size = (336, 336) if rng.random() < 0.6 else rng.choice(SIZES)
    canvas = Canvas("seen", size, rng)
    for _ in range(rng.randint(0, 3)):
        kind, text = reading(rng)
        sign = plate(text, round(rng.randint(20, 40) * canvas.scale), "seen", rng)
        box = canvas.layout.place(sign.image.size, 0) if canvas.stands_out(sign.paper, 110) else None
        if box is not None:
            canvas.paste(sign.image, box)
            canvas.things.append(Thing(kind, "text", None, box, text, sign.at(*box[:2])))
    canvas.add_shapes(rng.randint(0, 4))
    # half of them as small as what scenes of kind "detail" ask about, which are too few to learn from
    ranges = ((24, 40), (30, 84))
    sides = sorted((round(rng.randint(*ranges[i % 2]) * canvas.scale) for i in range(22)), reverse=True)
    for (name, style), side in zip(canvas.concepts(len(sides)), sides, strict=True):
        canvas.add_object(name, style, side, zoned=0)
    return canvas.scene("crowd")
