"""The picture of a card: what each of its settings keeps of one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

import vtok
from vtok.export import probes, source
from vtok.method import get
from vtok.progress import progress
from vtok.show import sheet, show
from vtok_eval.cards.facts import label
from vtok_eval.render.words import budget


def kept(name: str, settings: Sequence[Mapping[str, Any]], bar: bool = True) -> tuple[Image.Image, str]:
    """The model's first question, drawn once for each setting; and what the picture shows.

    Parameters
    ----------
    name : str
        A model as ``vtok export`` takes it.
    settings : sequence of mapping
        ``methods``, ``keep`` and ``positions`` of each.

    Raises
    ------
    VtokError
        The model is not there any more, or a setting does not fit it.
    """
    model, processor = source.load(name)
    (question,), origin = probes.find(model, processor, name=name, count=1)
    picture = question.picture or probes.drawn(0, probes.DRAWN)
    drawn, captions = [picture], ["the picture"]
    with progress("draw", len(settings), bar) as advance, torch.no_grad():
        for one in settings:
            chain = [get(method["name"], **_tuples(method["options"])) for method in one["methods"]]
            with vtok.compressed(model, chain, keep=one["keep"], positions=one["positions"]):
                model(**question.tensors(processor), logits_to_keep=1)
                drawn.append(show(picture, vtok.report(model)))
            captions.append(f"{label(one)} at {budget(one['keep'])}")
            advance(1)
    return sheet(drawn, captions, columns=min(4, len(drawn)), width=320), f"What is kept of a picture ({origin})."


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
