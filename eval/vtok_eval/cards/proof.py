"""Whether a card says what its committed numbers say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtok_eval.cards.facts import CARD, README, RESULTS, read
from vtok_eval.cards.text import render
from vtok_eval.render.results import Run
from vtok_eval.render.words import MINUS

# no part of a word (Qwen2.5, LLaVA-1.5, fp16), of a link or of a longer number
_NUMBER = re.compile(r"(?<![\w./])(?<![A-Za-z]-)\d[\d,]*(?:\.\d+)*(?:e[+-]?\d+)?(?![\w/])")


def unproven(folder: Path) -> list[str]:
    """What in a card is not in the files beside it; nothing where all is.

    Every number has to be a number of ``card.json`` or ``results.json``, rounded as it is printed, or to stand in one
    of their texts; and the card has to be the text that these two files give.

    Parameters
    ----------
    folder : Path
        With ``README.md``, ``card.json`` and, where something was evaluated, ``results.json``.

    Returns
    -------
    list of str
        Numbers, and "text" where the card differs from what ``vtok card`` would write.

    Raises
    ------
    VtokError
        ``card.json`` is missing or damaged.
    """
    facts = read(folder)
    card = (folder / README).read_text(encoding="utf-8").replace(MINUS, "-")
    files = [folder / name for name in (CARD, RESULTS) if (folder / name).is_file()]
    known, words = set(), set()
    for value in (value for path in files for value in _leaves(json.loads(path.read_text(encoding="utf-8")))):
        if isinstance(value, str):
            words.update(_NUMBER.findall(value))
        else:
            known.add(abs(float(value)))
    if facts.results is not None:
        known.add(float(Run(facts.results).samples))  # the tasks' together
    found = [number for number in dict.fromkeys(_NUMBER.findall(card)) if not _known(number, known, words)]
    same = (folder / README).read_text(encoding="utf-8") == render(facts)
    return found if same else [*found, "text"]


def _known(literal: str, known: set[float], words: set[str]) -> bool:
    if literal in words:
        return True
    plain = literal.replace(",", "")
    try:
        value = float(plain)
    except ValueError:  # a version
        return False
    if "e" in plain:
        return any(f"{number:.2e}" == plain for number in known)
    digits = len(plain.partition(".")[2])
    if digits == 0:  # counts are whole; a rounded share or time would match too easily
        return any(abs(number - value) < 0.05 or abs(100 * number - value) < 1e-6 for number in known) or (
            value >= 100 and any(round(number) == value for number in known)
        )
    return any(f"{number:.{digits}f}" == plain or f"{100 * number:.{digits}f}" == plain for number in known)


def _leaves(tree: Any) -> Iterator[str | int | float]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _leaves(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value)
    elif isinstance(tree, str | int | float) and not isinstance(tree, bool):
        yield tree
