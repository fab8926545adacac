"""Scenes with exact truth, for the bundled tasks and for training.

``make`` draws a picture, ``questions`` and ``pair_questions`` ask about it, all from a ``random.Random`` of the caller.
The bundled tasks seed it with strings that begin with ``"task/"``; training must use ``"train/"``: streams of different
seed strings differ, so that no training scene is a test scene.
"""

from __future__ import annotations

from vtok_eval.scenes.ask import pair_questions, questions
from vtok_eval.scenes.generate import KINDS, make, pair
from vtok_eval.scenes.records import QA, Scene, Thing
from vtok_eval.scenes.vocabulary import COLOURS, CONCEPTS, SHAPES, words

__all__ = [
    "COLOURS",
    "CONCEPTS",
    "KINDS",
    "QA",
    "SHAPES",
    "Scene",
    "Thing",
    "make",
    "pair",
    "pair_questions",
    "questions",
    "words",
]
