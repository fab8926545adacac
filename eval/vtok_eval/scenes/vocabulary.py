"""What scenes can contain: concepts with their categories, colours, shapes, and the words of questions and answers."""

from __future__ import annotations

import json
from pathlib import Path

SPRITES = Path(__file__).parents[1] / "data" / "sprites"

_TABLE: dict[str, dict] = json.loads((SPRITES / "concepts.json").read_text())

CONCEPTS: tuple[str, ...] = tuple(sorted(_TABLE))
CATEGORIES: dict[str, str] = {name: _TABLE[name]["category"] for name in CONCEPTS}

# drawn twice as often as the others, so that "popular" negatives mean what they mean in POPE
POPULAR: tuple[str, ...] = tuple(name for name in CONCEPTS if _TABLE[name]["popular"])

# what one might see inside the picture of something else: never asked for beside it
INSIDE: dict[str, frozenset[str]] = {
    "bread": frozenset({"hamburger"}),
    "carrot": frozenset({"snowman"}),
    "cheese": frozenset({"hamburger", "pizza"}),
    "door": frozenset({"castle", "house", "tent"}),
    "fire": frozenset({"candle", "rocket", "volcano"}),
    "fish": frozenset({"shark", "whale"}),
    "hat": frozenset({"snowman"}),
    "ship": frozenset({"sailboat"}),
    "snowflake": frozenset({"snowman"}),
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (24, 24, 26),
    "blue": (38, 88, 212),
    "brown": (122, 74, 38),
    "green": (44, 140, 60),
    "pink": (246, 136, 184),
    "purple": (126, 48, 164),
    "red": (216, 38, 40),
    "white": (248, 248, 248),
    "yellow": (246, 212, 48),
}
SHAPES: tuple[str, ...] = ("arrow", "circle", "cross", "diamond", "heart", "square", "star", "triangle")

# what each question may say; {a} is the noun with its article, {one} and {two} are bare nouns
TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": ("what object is in the picture?", "what is in this picture?", "which object does the picture show?"),
    "object at": ("what is {place}?", "what object is {place}?", "what do you see {place}?"),
    "exists": ("is there {a} in the picture?", "does the picture show {a}?", "can you see {a}?"),
    "count": (
        "how many times does the {one} appear?",
        "how many times can you see the {one}?",
        "how many times is the {one} in the picture?",
    ),
    "colour": ("what colour is the {one}?", "which colour does the {one} have?", "what is the colour of the {one}?"),
    "left or right": ("is the {one} left or right of the {two}?", "is the {one} to the left or right of the {two}?"),
    "above or below": ("is the {one} above or below the {two}?", "does the {one} sit above or below the {two}?"),
    "where": ("where is the {one}?", "in which part of the picture is the {one}?"),
    "word": ("what word is written?", "what does the sign say?", "read the word."),
    "number": ("what number is written?", "which number is on the sign?", "read the number."),
    "smallest": ("what is the smallest object?", "which object is the smallest?", "name the smallest object."),
    "frame": ("what is inside the red frame?", "what object is in the red frame?", "what does the red frame show?"),
    "which has": ("which picture has {a}, the first or the second?", "is {a} in the first or the second picture?"),
    "both have": ("do both pictures have {a}?", "is there {a} in both pictures?"),
    "more": (
        "which picture has more objects, the first or the second?",
        "are there more objects in the first or the second picture?",
    ),
}
PLACES: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right", "center")
SIDES: tuple[str, ...] = ("left", "right", "top", "bottom")
ANSWERS: tuple[str, ...] = (
    *("yes", "no", "left", "right", "above", "below", "first", "second"),
    *PLACES,
    *("1", "2", "3", "4", "5", "6"),
)


def article(name: str) -> str:
    """A concept with its article: ``"a dog"``, ``"an apple"``, ``"bread"``."""
    return f"{_TABLE[name]['article']} {name}".strip()


def place_phrase(place: str) -> str:
    """``"in the top left"``, ``"on the left"``, ``"at the top"``."""
    if place in PLACES:
        return f"in the {place}"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def words() -> list[str]:
    """Every lower-case word that questions and answers can contain, sorted; strings to be read are left out.

    Punctuation is cut off: ``?``, ``.`` and ``,`` occur besides.
    """
    texts = [template for group in TEMPLATES.values() for template in group]
    texts += [place_phrase(place) for place in (*PLACES, *SIDES)]
    texts += [*ANSWERS, *CONCEPTS, *COLOURS, *SHAPES, "a", "an", "background"]
    found = {word.strip("?.,") for text in texts for word in text.split()}
    return sorted(word for word in found if "{" not in word)
