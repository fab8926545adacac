"""When an answer is right: exact match after normalisation, and F1 of "yes"."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from vtok_eval.samples import Sample

ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}

_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "`": "'", "\u00b4": "'"})
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# a point stays in 1.5 and .5, an apostrophe in don't
_STOPS = re.compile(r"\.(?!\d)|(?<=[^\W\d])\.|(?<!\w)'|'(?!\w)")


def _mark(character: str) -> str:
    """A space for punctuation and symbols, but for points and apostrophes."""
    return " " if unicodedata.category(character)[0] in "PS" and character not in ".'" else character


def normalise(text: str) -> str:
    """Lower case without punctuation and articles, number words as digits, single spaces: as VQA scores answers.

    What is nothing but articles or punctuation stays, for it may be meant: ``"A."`` becomes ``"a"``, the letter of a
    choice, and ``"+"`` stays.
    """
    text = text.translate(_QUOTES)
    for _ in range(2):
        text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(unicodedata.normalize("NFKC", text).translate(_QUOTES).split())
    plain = _STOPS.sub(" ", "".join(map(_mark, _THOUSANDS.sub("", text))))
    words = [NUMBERS.get(word, word) for word in plain.split()]
    return " ".join([word for word in words if word not in ARTICLES] or words) or text


def right(answer: str, sample: Sample) -> bool:
    """Whether an answer is the sample's, or one of those it accepts. An empty answer is wrong.

    Of an answer to a yes/no question the first word counts, as POPE reads it: ``"Yes, there is."`` says yes.
    """
    said = normalise(answer)
    truths = {normalise(truth) for truth in (sample.answer, *sample.accepted)}
    if truths <= {"yes", "no"}:
        said = said.split(" ", 1)[0]
    return bool(said) and said in truths


def yes_no_f1(pairs: Iterable[tuple[str, str]]) -> float | None:
    """F1 of "yes" over (answer, truth) pairs, 0 to 1; None where no truth is yes."""
    said_and_true = [(normalise(said).split(" ", 1)[0] == "yes", normalise(true) == "yes") for said, true in pairs]
    both = sum(said and true for said, true in said_and_true)
    if not any(true for _, true in said_and_true):
        return None
    return 2 * both / sum(said + true for said, true in said_and_true)
