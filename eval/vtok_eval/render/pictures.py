"""Kept tokens over some pictures of the run: the same samples for every method, at one budget."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vtok.errors import VtokError
from vtok.protocol import Part
from vtok.show import fit_of, overlay
from vtok_eval.render.results import Entry, Run, lines
from vtok_eval.samples import Sample, Task

SAMPLES, METHODS = 4, 13
SIDE, QUALITY = 264, 70
"""Longer side of a picture in pixels, and its quality as WebP: about 8 KB each."""


@dataclass(frozen=True)
class Tile:
    """One picture: the plain model's view, or what an entry kept.

    Attributes
    ----------
    entry : Entry
        Whose answer it is.
    data : str
        The picture as a data URI.
    answer : str
        What the model said.
    correct : bool
        Whether that is right.
    kept : int
        Tokens that are left.
    """

    entry: Entry
    data: str
    answer: str
    correct: bool
    kept: int


@dataclass(frozen=True)
class Scene:
    """One sample and its tiles."""

    sample: Sample
    tiles: tuple[Tile, ...]


def scenes(run: Run, folder: Path, tasks: Sequence[Task]) -> tuple[float | None, list[Scene]]:
    """The budget and the samples to show; nothing without pictures or without ``samples.jsonl``.

    A sample tells most where methods disagree about it: the one with the most even vote of every task is taken, and of
    these the most even ones.
    """
    keep = run.keeps[min(len(run.keeps) - 1, max(0, len(run.keeps) - 2))] if run.keeps else None
    if keep is None or not tasks:
        return keep, []
    shown = [entry for entry in run.at(keep) if entry.reached][:METHODS]
    records = _records(folder, [*([run.plain] if run.plain else []), *shown])
    known = {(task.name, sample.id): (task, sample) for task in tasks for sample in task.samples}
    votes: dict[str, tuple[float, tuple[str, str]]] = {}
    for place, found in records.items():
        if place not in known or len(found) < 2:
            continue
        right = [bool(found[entry.id].get("correct")) for entry in shown if entry.id in found]
        even = min(sum(right), len(right) - sum(right)) / max(1, len(right))
        even += 0.25 * bool(run.plain and found.get(run.plain.id, {}).get("correct"))
        even -= 0.2 * (len(known[place][1].images) > 1)
        if place[0] not in votes or even > votes[place[0]][0]:
            votes[place[0]] = (even, place)
    made = []
    for _, place in sorted(votes.values(), key=lambda vote: -vote[0]):
        scene = _scene(run, shown, records[place], *known[place])
        if scene is not None:
            made.append(scene)
        if len(made) == SAMPLES:
            break
    return keep, made


def _records(folder: Path, entries: Sequence[Entry]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    wanted = {entry.id for entry in entries}
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for line in lines(folder):
        if line.get("entry") in wanted and not line.get("error"):
            place = (str(line.get("task")), str(line.get("sample")))
            found.setdefault(place, {})[str(line["entry"])] = line
    return found


def _scene(
    run: Run, shown: Sequence[Entry], found: Mapping[str, Mapping[str, Any]], task: Task, sample: Sample
) -> Scene | None:
    try:
        pictures = [task.picture(name) for name in sample.images]
    except VtokError:
        return None
    tiles = []
    for entry in [*([run.plain] if run.plain else []), *shown]:
        record = found.get(entry.id)
        made = record and _drawn(record, pictures, str(run.model.get("family")), plain=entry is run.plain)
        if record and made:
            data, kept = made
            tiles.append(Tile(entry, data, str(record.get("answer", "")), bool(record.get("correct")), kept))
    return Scene(sample, tuple(tiles)) if len(tiles) > 1 else None


def _drawn(
    record: Mapping[str, Any], pictures: Sequence[Image.Image], family: str, plain: bool
) -> tuple[str, int] | None:
    from vtok_eval.harness.bits import unpack  # the harness imports this package

    masks, counts = record.get("kept") or (), record.get("tokens") or ()
    if not len(masks) == len(counts) == len(pictures):
        return None
    made, total = [], 0
    for place, (mask, n, picture) in enumerate(zip(masks, counts, pictures, strict=True)):
        rectangles = parts(record, place, n, picture, family)
        if rectangles is None:
            return None
        try:
            kept = unpack(mask, n)
        except VtokError:
            return None
        total += len(kept)
        fit = fit_of(family, rectangles)
        drawn = overlay(picture, rectangles, kept, fit=fit, longest=SIDE)
        if plain and len(rectangles) == 1:  # as it is: lines around every token would only cover it
            drawn = _bare(picture, drawn.size, fit)
        made.append(drawn)
    return _uri(_beside(made)), total


def parts(
    record: Mapping[str, Any], place: int, tokens: int, picture: Image.Image, family: str
) -> tuple[Part, ...] | None:
    """The rectangles that a picture's token indices count through.

    As the line says (``"parts"``: per image a list of [height, width, newlines, per row]), or else one rectangle:
    square for LLaVA-1.5, of the picture's shape for Qwen. ``None`` where that leads nowhere.
    """
    listed = record.get("parts")
    if listed:
        return tuple(Part(*numbers) for numbers in listed[place])
    if family == "llava":
        side = math.isqrt(tokens)
        return (Part(side, side),) if tokens and side * side == tokens else None
    if not family.startswith("qwen"):
        return None
    wide = math.log(picture.width / picture.height)
    shapes = [(tokens // width, width) for width in range(1, tokens + 1) if tokens % width == 0]
    height, width = min(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0]) - wide), default=(1, 10**9))
    return (Part(height, width),) if abs(math.log(width / height) - wide) < 0.7 else None


def _bare(picture: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    if fit == "crop":
        return ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    if fit == "pad":
        return ImageOps.pad(picture.convert("RGB"), size, Image.Resampling.LANCZOS, color=(128, 128, 128))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    if len(pictures) == 1:
        return pictures[0]
    gap = 4
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(p.height for p in pictures)), (255, 255, 255))
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + gap
    return canvas


def _uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
