"""What vtok_eval registers under ``vtok.pictures``: scenes to train tokenizers on, photographs to measure them with."""

from __future__ import annotations

import random
from functools import lru_cache, partial

from PIL import Image

from vtok.demo import photograph
from vtok.errors import VtokError
from vtok.tokenizers.data import Pictures
from vtok_eval import scenes as drawn
from vtok_eval.scenes.crowd import crowd

#: scikit-image's own: a person, coffee, a cat, a rocket, galaxies, tissue, an eye's retina
PHOTOGRAPHS = ("astronaut", "coffee", "cat", "rocket", "hubble_deep_field", "immunohistochemistry", "retina")
#: of each: the largest square in the middle, and smaller ones anywhere
CUTS = 8
SHARES = (0.4, 0.9)


def scenes(part: str, seed: int) -> Pictures:
    """Scenes without an end, drawn by number; every sixth is crowded.

    What is held out, and what all of them are, comes from streams of its own, so no training scene is among them.
    """
    return Pictures("scenes", partial(_scene, f"{'train' if part == 'train' else 'held-out'}/tokenizer/{seed}"))


def _scene(stream: str, number: int) -> Image.Image:
    rng = random.Random(f"{stream}/{number}")
    if number % 6 == 5:
        return crowd(rng).image
    return drawn.make(rng.choice(drawn.KINDS), rng).image


def photographs(part: str, seed: int) -> Pictures:
    """Cuts of the photographs in scikit-image's wheel, to measure with.

    Raises
    ------
    VtokError
        They are to be trained on, or scikit-image is missing.
    """
    if part == "train":
        raise VtokError("the photographs are there to measure with; train on scenes, or on a folder of your own")
    return Pictures("photographs", partial(_cut, seed), CUTS * len(PHOTOGRAPHS), _named)


def _cut(seed: int, number: int) -> Image.Image:
    name, cut = PHOTOGRAPHS[number // CUTS], number % CUTS
    photo = _photograph(name)
    rng = random.Random(f"cut/{seed}/{number}")
    side = min(photo.size) * (rng.uniform(*SHARES) if cut else 1.0)
    left, top = ((length - side) * (rng.random() if cut else 0.5) for length in photo.size)
    return photo.crop((round(left), round(top), round(left + side), round(top + side)))


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _photograph(name: str) -> Image.Image:
    return photograph(name).convert("RGB")


def _named(number: int) -> str:
    return f"{PHOTOGRAPHS[number // CUTS]} {number % CUTS + 1}"
