"""The bundled tasks: which scenes, which of their questions, and how they are stored.

``objects``, ``exists``, ``colour``, ``position`` and ``multi`` ask about one pool of mixed scenes; ``count``, ``text``
and ``detail`` have scenes of their own. Every stream of random numbers is seeded with a string that begins with
``"task/"``, which training never uses.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtok_eval.scenes.ask import pair_questions, questions
from vtok_eval.scenes.generate import make
from vtok_eval.scenes.records import QA, Scene

TASKS: tuple[str, ...] = ("objects", "exists", "count", "colour", "position", "text", "detail", "multi")
SOURCES = {"count": "count", "text": "text", "detail": "detail"}
NUMBERS = {"seen": 160, "unseen": 40}


@dataclass(frozen=True)
class Picture:
    """A scene under the name of its file."""

    name: str
    scene: Scene


@dataclass(frozen=True)
class Candidate:
    """A question that could be chosen."""

    pictures: tuple[Picture, ...]
    qa: QA


# the classes that a task is balanced over, and how many of each for one of another
Key = Callable[[QA], tuple[str, float]]
KEYS: dict[str, Key] = {
    "objects": lambda qa: (str(qa.meta.get("where")), 3.0 if "where" not in qa.meta else 1.0),
    "exists": lambda qa: (str(qa.meta.get("negative")), 3.0 if qa.answer == "yes" else 1.0),
    "count": lambda qa: (qa.answer, 1.0),
    "colour": lambda qa: (f"{qa.meta['of']} {qa.answer}", 2.0 if qa.meta["of"] == "shape" else 1.0),
    "position": lambda qa: (qa.answer, 1.0 if qa.meta["kind"] == "where" else 1.25),
    "text": lambda qa: (str(qa.meta["kind"]), 2.0 if qa.meta["kind"] == "word" else 1.0),
    "detail": lambda qa: (str(qa.meta["kind"]), 1.0),
    "multi": lambda qa: (f"{qa.meta['kind']} {qa.answer}", 1.0),
}


def scenes(kind: str, style: str, number: int, seed: int) -> Iterator[Picture]:
    """The scenes of one kind and style; counts take turns from 1 to 6, questions of detail scenes take turns, too."""
    for place in range(number):
        rng = random.Random(f"task/{seed}/{kind}/{style}/{place}")
        while True:
            scene = make(kind, rng, style)
            details = {qa.meta["kind"] for qa in questions(scene, rng) if qa.task == "detail"}
            if kind == "detail" and ("smallest", "frame")[place % 2] not in details:
                continue
            if kind == "count" and sum(t.name == scene.things[0].name for t in scene.things) != place % 6 + 1:
                continue
            break
        yield Picture(f"{kind}-{style}-{place:03d}.webp", scene)


def candidates(task: str, pictures: Sequence[Picture], rng: random.Random) -> list[Candidate]:
    """All questions of a task about these pictures, shuffled."""
    if task != "multi":
        found = [Candidate((p,), qa) for p in pictures for qa in questions(p.scene, rng) if qa.task == task]
    else:
        pairs = [(one, two) for place, one in enumerate(pictures) for two in pictures[:place]]
        rng.shuffle(pairs)
        alike = [pair for pair in pairs if pair[0].scene.names() & pair[1].scene.names()]
        pairs = [*alike, *pairs[: 10 * len(pictures)]]
        found = [Candidate(pair, qa) for pair in pairs for qa in pair_questions(pair[0].scene, pair[1].scene, rng)]
    rng.shuffle(found)
    return found


def balanced(found: Sequence[Candidate], number: int, key: Key) -> list[Candidate]:
    """``number`` of the candidates: classes by their weights, pictures and answers as evenly as can be.

    A picture that offers little is taken before one that offers much, which leaves more pictures for the rest.
    """
    offers = Counter(picture.name for candidate in found for picture in candidate.pictures)
    left: dict[str, list[Candidate]] = defaultdict(list)
    weights: dict[str, float] = {}
    for candidate in found:
        name, weights[name] = key(candidate.qa)
        left[name].append(candidate)
    taken: Counter[str] = Counter()
    pictures: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    chosen: list[Candidate] = []
    while len(chosen) < number and left:
        name = min(sorted(left), key=lambda name: taken[name] / weights[name])
        best = min(
            left[name],
            key=lambda c: (
                sum(pictures[picture.name] for picture in c.pictures),
                answers[c.qa.answer],
                sum(offers[picture.name] for picture in c.pictures),
            ),
        )
        left[name].remove(best)
        if not left[name]:
            del left[name]
        taken[name] += 1
        answers[best.qa.answer] += 1
        pictures.update(picture.name for picture in best.pictures)
        chosen.append(best)
    return chosen


def _line(task: str, group: str, place: int, candidate: Candidate) -> str:
    record = {
        "id": f"{task}-{group}-{place:03d}",
        "task": task,
        "images": [picture.name for picture in candidate.pictures],
        "question": candidate.qa.question,
        "answer": candidate.qa.answer,
        "accepted": list(candidate.qa.accepted),
        "group": group,
        "meta": dict(candidate.qa.meta),
    }
    return json.dumps(record)


def truth(picture: Picture) -> str:
    """The picture's line in ``scenes.jsonl``."""
    scene = picture.scene
    things = [{key: value for key, value in vars(thing).items() if value} for thing in scene.things]
    record = {"image": picture.name, "size": scene.image.size, "background": scene.background, "things": things}
    return json.dumps(record)


def encoded(scene: Scene) -> bytes:
    """The picture as WebP."""
    buffer = io.BytesIO()
    scene.image.save(buffer, "WEBP", quality=90, method=4, use_sharp_yuv=True)
    return buffer.getvalue()


def write(out: Path, seed: int, numbers: dict[str, int] | None = None) -> None:
    """Write ``<task>.jsonl``, ``images.zip`` and ``scenes.jsonl`` (what is where in each picture) to a folder.

    The same seed gives the same questions byte for byte, and with the same libraries the same pictures.

    Parameters
    ----------
    numbers : dict, optional
        Samples a task, and pictures a kind, for the groups ``"seen"`` and ``"unseen"``.
    """
    out.mkdir(parents=True, exist_ok=True)
    numbers = numbers or NUMBERS
    pools = {
        (kind, group): list(scenes(kind, group, number, seed))
        for kind in ("mixed", "count", "text", "detail")
        for group, number in numbers.items()
    }
    for task in TASKS:
        lines = []
        for group, number in numbers.items():
            rng = random.Random(f"task/{seed}/questions/{task}/{group}")
            found = candidates(task, pools[SOURCES.get(task, "mixed"), group], rng)
            chosen = balanced(found, number, KEYS[task])
            # any beginning of the file is a fair sample of it
            rng.shuffle(chosen)
            lines += [_line(task, group, place, candidate) for place, candidate in enumerate(chosen)]
        (out / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    pictures = [picture for pool in pools.values() for picture in pool]
    (out / "scenes.jsonl").write_text("".join(truth(picture) + "\n" for picture in pictures))
    with zipfile.ZipFile(out / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for picture in sorted(pictures, key=lambda picture: picture.name):
            archive.writestr(zipfile.ZipInfo(picture.name, (1980, 1, 1, 0, 0, 0)), encoded(picture.scene))
