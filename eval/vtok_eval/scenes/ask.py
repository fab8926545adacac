"""Questions about scenes: asked only where one answer is right beyond doubt, and so that guessing does not pay."""

from __future__ import annotations

import random
from collections.abc import Iterator

from vtok_eval.scenes.records import QA, Scene, Thing
from vtok_eval.scenes.vocabulary import (
    CATEGORIES,
    CONCEPTS,
    INSIDE,
    PLACES,
    POPULAR,
    SIDES,
    TEMPLATES,
    article,
    place_phrase,
)

# shares of width and height: a thing is in a corner, in the centre, or nowhere that has a name
EDGE, MIDDLE, APART = 0.38, 0.09, 0.2
CENTRE_ACCEPTED = ("centre", "middle", "in the center", "the center")


def _ask(kind: str, rng: random.Random, **slots: str) -> str:
    return rng.choice(TEMPLATES[kind]).format(**slots)


def spot(thing: Thing, size: tuple[int, int]) -> tuple[float, float]:
    """The centre of a thing as shares of width and height."""
    return thing.centre[0] / size[0], thing.centre[1] / size[1]


def place(thing: Thing, size: tuple[int, int]) -> str | None:
    """The part of the picture that a thing is in, one of ``PLACES``, or None between them."""
    across, down = spot(thing, size)
    if abs(across - 0.5) < MIDDLE and abs(down - 0.5) < MIDDLE:
        return "center"
    if min(across, 1 - across) < EDGE and min(down, 1 - down) < EDGE:
        return f"{'top' if down < 0.5 else 'bottom'} {'left' if across < 0.5 else 'right'}"
    return None


def _towards(where: str, across: float, down: float) -> float:
    """How far into a side or corner a spot is: above 0.5 means on that half in every direction that is named."""
    shares = {"left": 1 - across, "right": across, "top": 1 - down, "bottom": down}
    return min(shares[word] for word in where.split())


def alone_at(where: str, scene: Scene) -> Thing | None:
    """The one thing in a place or on a side, with room to the next; None where there is none or more."""
    spots = [(thing, *spot(thing, scene.image.size)) for thing in scene.things if thing.kind != "frame"]
    if where == "center":
        near = [thing for thing, across, down in spots if abs(across - 0.5) < APART and abs(down - 0.5) < APART]
        return near[0] if len(near) == 1 and place(near[0], scene.image.size) == "center" else None
    near = [thing for thing, across, down in spots if _towards(where, across, down) > 0.44]
    if where in PLACES:
        near = [thing for thing in near if place(thing, scene.image.size) != "center"]
    if len(near) != 1 or _towards(where, *spot(near[0], scene.image.size)) < 1 - EDGE:
        return None
    return near[0]


def _objects(scene: Scene, rng: random.Random) -> Iterator[QA]:
    things = [thing for thing in scene.things if thing.kind != "frame"]
    if len(things) == 1 and things[0].kind == "object":
        yield QA("objects", _ask("object", rng), things[0].name)
    found = [(where, alone_at(where, scene)) for where in (*PLACES, *SIDES)]
    known = [(where, thing.name) for where, thing in found if thing is not None and thing.kind == "object"]
    for where, name in rng.sample(known, min(3, len(known))):
        yield QA("objects", _ask("object at", rng, place=place_phrase(where)), name, meta={"where": where})


def doubtful(name: str, present: set[str]) -> bool:
    """Whether one could argue that a thing is part of another that is in the picture, such as a snowman's hat."""
    return bool(INSIDE.get(name, frozenset()) & present)


def negative(kind: str, present: set[str], rng: random.Random) -> str | None:
    """A concept that is not in the picture: any, a frequent one, or one of a category that is in it (as POPE's)."""
    pools = {"random": CONCEPTS, "popular": POPULAR}
    near = {CATEGORIES[name] for name in present}
    pool = pools.get(kind) or [name for name in CONCEPTS if CATEGORIES[name] in near]
    pool = [name for name in pool if name not in present and not doubtful(name, present)]
    return rng.choice(pool) if pool else None


def _exists(scene: Scene, rng: random.Random) -> Iterator[QA]:
    present = scene.names()
    if not present:
        return
    for name in rng.sample(sorted(present), min(2, len(present))):
        yield QA("exists", _ask("exists", rng, a=article(name)), "yes")
        kind = rng.choice(("random", "popular", "adversarial"))
        absent = negative(kind, present, rng)
        if absent is not None:
            yield QA("exists", _ask("exists", rng, a=article(absent)), "no", meta={"negative": kind})


def _count(scene: Scene, rng: random.Random) -> Iterator[QA]:
    if scene.kind == "count" and scene.things:
        name = scene.things[0].name
        number = sum(thing.name == name for thing in scene.things)
        if doubtful(name, scene.names()):
            return
        yield QA("count", _ask("count", rng, one=name), str(number))


def _colour(scene: Scene, rng: random.Random) -> Iterator[QA]:
    for thing in scene.named("shape"):
        yield QA("colour", _ask("colour", rng, one=thing.name), thing.colour or "", meta={"of": "shape"})
    if scene.background:
        yield QA("colour", _ask("colour", rng, one="background"), scene.background, meta={"of": "background"})


def _position(scene: Scene, rng: random.Random) -> Iterator[QA]:
    things = [thing for thing in scene.things if thing.kind in ("object", "shape")]
    if scene.kind == "count" or not things:
        return
    known = [(thing, where) for thing in things if (where := place(thing, scene.image.size))]
    for thing, where in rng.sample(known, min(2, len(known))):
        accepted = CENTRE_ACCEPTED if where == "center" else (f"in the {where}",)
        yield QA("position", _ask("where", rng, one=thing.name), where, accepted, {"kind": "where"})
    pairs = [(one, two) for one in things for two in things if one is not two]
    rng.shuffle(pairs)
    asked = {"left or right": 0, "above or below": 0}
    for one, two in pairs:
        spots = spot(one, scene.image.size), spot(two, scene.image.size)
        for axis, kind in enumerate(asked):
            gap = spots[0][axis] - spots[1][axis]
            if abs(gap) >= APART and asked[kind] < 1:
                asked[kind] += 1
                answer = kind.split(" or ")[gap > 0]
                question = _ask(kind, rng, one=one.name, two=two.name)
                yield QA("position", question, answer, meta={"kind": kind})


def _text(scene: Scene, rng: random.Random) -> Iterator[QA]:
    for thing in scene.named("text"):
        yield QA("text", _ask(thing.name, rng), (thing.text or "").lower(), meta={"kind": thing.name})


def _detail(scene: Scene, rng: random.Random) -> Iterator[QA]:
    if scene.kind != "detail":
        return
    objects = sorted(scene.named("object"), key=lambda thing: thing.size)
    if len(objects) > 1 and objects[0].size * 1.3 < objects[1].size:
        meta = {"kind": "smallest", "pixels": objects[0].size}
        yield QA("detail", _ask("smallest", rng), objects[0].name, meta=meta)
    for frame in scene.named("frame"):
        x0, y0, x1, y1 = frame.box
        inside = [thing for thing in objects if x0 <= thing.centre[0] < x1 and y0 <= thing.centre[1] < y1]
        meta = {"kind": "frame", "pixels": inside[0].size}
        yield QA("detail", _ask("frame", rng), inside[0].name, meta=meta)


_ASKERS = (_objects, _exists, _count, _colour, _position, _text, _detail)


def questions(scene: Scene, rng: random.Random, limit: int | None = None) -> list[QA]:
    """Questions of all single-picture tasks that this scene can serve, shuffled; at most ``limit``."""
    asked = [qa for asker in _ASKERS for qa in asker(scene, rng)]
    rng.shuffle(asked)
    return asked[:limit]


def pair_questions(first: Scene, second: Scene, rng: random.Random, limit: int | None = None) -> list[QA]:
    """Questions of the task ``"multi"``: which picture has a thing, do both have it, which has more; shuffled."""
    asked: list[QA] = []
    one, two = first.names(), second.names()
    shared = sorted(one & two)
    single = sorted(name for name in one ^ two if not doubtful(name, one if name in two else two))
    for name in rng.sample(single, min(2, len(single))):
        answer = "first" if name in one else "second"
        meta = {"kind": "which has"}
        asked.append(QA("multi", _ask("which has", rng, a=article(name)), answer, (f"the {answer}",), meta))
    # a "no" beside every "yes", about the same two pictures: neither answer can be guessed from how alike they are
    if shared and single:
        for name, answer in ((rng.choice(shared), "yes"), (rng.choice(single), "no")):
            asked.append(QA("multi", _ask("both have", rng, a=article(name)), answer, meta={"kind": "both have"}))
    objects = len(first.named("object")) - len(second.named("object"))
    everything = len(first.things) - len(second.things)
    if abs(objects) >= 2 and objects * everything > 0:
        answer = "first" if objects > 0 else "second"
        asked.append(QA("multi", _ask("more", rng), answer, (f"the {answer}",), {"kind": "more"}))
    rng.shuffle(asked)
    return asked[:limit]
