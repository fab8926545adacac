"""Batches for training: scenes made on the fly, one stream a seed, the same whatever the number of workers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vtok_eval import scenes
from vtok_eval.scenes.crowd import crowd
from vtok_eval.train.labels import Labels, labels

#: how often each kind of scene is drawn
KINDS = {"mixed": 0.46, "count": 0.16, "text": 0.22, "detail": 0.16}

#: asks for a list; the tasks never ask so
LIST = "what do you see?"


@dataclass
class Turn:
    """One question about an item's pictures, in tokens."""

    task: str
    question: list[int]
    answer: list[int]


@dataclass
class Batch:
    """Items that share a number of pictures.

    Attributes
    ----------
    images : dict of str to Tensor
        What the image processor gave for all pictures, item by item.
    grids : list of list of tuple
        Rows and columns of tokens of each picture, by item.
    labels : list of Labels
        Of all pictures.
    turns : list of list of Turn
        Questions by item.
    """

    images: dict[str, Tensor]
    grids: list[list[tuple[int, int]]]
    labels: list[Labels]
    turns: list[list[Turn]]


def listed(scene: Any) -> str:
    """Everything in a scene from left to right: objects and shapes by name, signs by what they read."""
    things = sorted((thing for thing in scene.things if thing.kind != "frame"), key=lambda thing: thing.centre)
    return " ".join(thing.text or thing.name for thing in things)


class _Shown(NamedTuple):
    drawn: list[list[Any]]
    images: dict[str, Tensor]
    grids: list[tuple[int, int]]
    labels: list[Labels]


class Scenes(Dataset):
    """Batch number i of a seeded stream; the seed string starts with "train/", so no task's scene is ever drawn.

    Parameters
    ----------
    name : str
        The model: ``"nano-llava"`` or ``"nano-qwen"``.
    processor
        Its processor.
    size : int
        Pictures in a batch.
    steps : int
        Batches in the stream.
    seed : str
        Of the stream.
    questions : int
        At most so many about an item.
    pairs : float
        Share of batches whose items have two pictures.
    crowds : float
        Share of pictures that are crowded.
    lists : float
        Share of pictures of which everything is to be named, from left to right: many words to look up for one
        question.
    pixels : bool
        ``False`` leaves out what only a tower needs.
    kinds : mapping of str to float, optional
        How often each kind of scene is drawn; ``KINDS`` by default.
    rare : mapping of str to float, optional
        Of these tasks' questions only such a share is asked.
    reuse : int
        Batches that show the same scenes (the same ``images``) and ask anew: drawing is a third of a step that runs no
        tower, and a tower that is not trained runs once for all of them.
    mixed : int
        So many scenes' batches take turns, in a drawn order; 1 shows the same scenes ``reuse`` times in a row.
    """

    def __init__(
        self,
        name: str,
        processor: Any,
        size: int,
        steps: int,
        seed: str,
        questions: int = 10,
        pairs: float = 0.0,
        crowds: float = 0.0,
        lists: float = 0.0,
        pixels: bool = True,
        kinds: Mapping[str, float] | None = None,
        rare: Mapping[str, float] | None = None,
        reuse: int = 1,
        mixed: int = 1,
    ) -> None:
        self.name, self.processor, self.size, self.steps = name, processor, size, steps
        self.seed, self.questions, self.pairs, self.crowds = seed, questions, pairs, crowds
        self.lists, self.pixels, self.rare, self.reuse, self.mixed = lists, pixels, rare or {}, reuse, mixed
        self.kinds = kinds or KINDS
        self._tokens: dict[str, list[int]] = {}
        self._shown: dict[int, _Shown] = {}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        drawn, images, grids, maps = self._at(self._number(step))
        rng = random.Random(f"train/{self.seed}/{step}/questions")
        turns = []
        for own in drawn:
            if len(own) > 1:
                asked = scenes.pair_questions(own[0], own[1], rng, limit=self.questions)
            else:
                asked = scenes.questions(own[0], rng) + scenes.questions(own[0], rng)  # other words, other negatives
                asked = [qa for qa in asked if rng.random() < self.rare.get(qa.task, 1)][: self.questions]
            turns.append([Turn(qa.task, self._ids(qa.question), self._ids(qa.answer)) for qa in asked])
            if not asked or (len(own) == 1 and rng.random() < self.lists):
                turns[-1].append(Turn("list", self._ids(LIST), self._ids(listed(own[0]))))
        left = iter(grids)
        return Batch(images, [[next(left) for _ in own] for own in drawn], maps, turns)

    def _number(self, step: int) -> int:
        """Which scenes a step shows."""
        turn, place = divmod(step, self.mixed * self.reuse)
        order = list(range(self.mixed)) * self.reuse
        if self.mixed > 1:
            random.Random(f"train/{self.seed}/{turn}/order").shuffle(order)
        return turn * self.mixed + order[place]

    def _at(self, number: int) -> _Shown:
        if number not in self._shown:
            self._shown = {old: own for old, own in self._shown.items() if old // self.mixed == number // self.mixed}
            drawn = self._draw(random.Random(f"train/{self.seed}/{number}"))
            flat = [scene for own in drawn for scene in own]
            images, frames = prepared(self.name, self.processor, [scene.image for scene in flat], self.pixels)
            maps = [labels(scene, *grid, frame) for scene, (grid, frame) in zip(flat, frames, strict=True)]
            self._shown[number] = _Shown(drawn, images, [grid for grid, _ in frames], maps)
        return self._shown[number]

    def _draw(self, rng: random.Random) -> list[list[Any]]:
        """The scenes of a batch, one or two an item."""
        if rng.random() < self.pairs:
            return [list(scenes.pair(rng)) for _ in range(self.size // 2)]
        kinds, shares = list(self.kinds), list(self.kinds.values())
        return [
            [crowd(rng) if rng.random() < self.crowds else scenes.make(rng.choices(kinds, shares)[0], rng)]
            for _ in range(self.size)
        ]

    def _ids(self, text: str) -> list[int]:
        if text not in self._tokens:
            self._tokens[text] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return self._tokens[text]


def prepared(
    name: str, processor: Any, pictures: list[Any], pixels: bool = True
) -> tuple[dict[str, Tensor], list[tuple[tuple[int, int], tuple[float, float, float, float]]]]:
    """Pixels by the model's own processor, and for each picture its token grid and the part of it that it fills."""
    images: dict[str, Tensor] = {}
    if pixels:
        given = processor.image_processor(images=pictures, return_tensors="pt")
        images = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    found: list[Any] = []
    if name == "nano-qwen":
        for picture in pictures:
            rows, columns = _cells(processor.image_processor, picture)
            found.append(((rows, columns), (0.0, 0.0, float(columns), float(rows))))
        return images, found
    side = processor.image_processor.crop_size["height"] // processor.patch_size
    for picture in pictures:
        width, height = picture.size
        longest = max(width, height)
        left, top = (longest - width) / 2 * side / longest, (longest - height) / 2 * side / longest
        found.append(((side, side), (left, top, side - left, side - top)))
    return images, found


def _cells(images: Any, picture: Any) -> tuple[int, int]:
    """Rows and columns of Qwen's tokens for a picture, without its pixels."""
    factor = images.patch_size * images.merge_size
    size = images.size
    height, width = smart_resize(
        picture.height, picture.width, factor=factor, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
    )
    return height // factor, width // factor


def moved(images: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch's pixels on a device."""
    return {key: value.to(device, non_blocking=True) for key, value in images.items()}
