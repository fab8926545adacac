"""Scenes: the same seed gives the same picture, what is said of a picture is true of it, and guessing does not pay."""

from __future__ import annotations

import json
import random
import zipfile
from collections import Counter

import pytest
from PIL import Image, ImageChops, ImageDraw, ImageStat

from vtok.errors import VtokError
from vtok_eval import scenes
from vtok_eval.scenes import ask, bundle, sheets, vocabulary
from vtok_eval.scenes.backgrounds import distance
from vtok_eval.scenes.lettering import AVOIDED, COMMON_WORDS, FONTS, reading
from vtok_eval.scenes.sprites import STYLES, sprite
from vtok_eval.tasks import BUNDLED

pytest.importorskip("matplotlib")


def some(kind, number, style="seen", seed="test"):
    for place in range(number):
        rng = random.Random(f"{seed}/{kind}/{place}")
        yield scenes.make(kind, rng, style), rng


@pytest.fixture(scope="module")
def pictures():
    """Scenes of all kinds with their questions."""
    return [(s, scenes.questions(s, rng)) for kind in scenes.KINDS for s, rng in some(kind, 60)]


def test_vocabulary():
    assert 128 <= len(scenes.CONCEPTS) <= 160
    assert list(scenes.CONCEPTS) == sorted(set(scenes.CONCEPTS))
    assert all(name.isalpha() and name.islower() for name in scenes.CONCEPTS)
    taken = set(scenes.COLOURS) | set(scenes.SHAPES)
    assert not taken & set(scenes.CONCEPTS) and not (taken | set(scenes.CONCEPTS)) & set(COMMON_WORDS)
    sizes = Counter(vocabulary.CATEGORIES.values())
    assert min(sizes.values()) >= 3, "an adversarial negative needs others of its category"
    assert all(set(inside) <= set(scenes.CONCEPTS) for inside in [vocabulary.INSIDE, *vocabulary.INSIDE.values()])
    assert vocabulary.article("apple") == "an apple" and vocabulary.article("bread") == "bread"


def test_colours_differ():
    names = list(scenes.COLOURS)
    pairs = [(one, two) for one in names for two in names if one < two]
    assert min(distance(scenes.COLOURS[one], scenes.COLOURS[two]) for one, two in pairs) > 160


@pytest.mark.parametrize("style", [style for group in STYLES.values() for style in group])
def test_every_concept_has_a_picture_of_its_own(style):
    found = {name: sprite(style, name).image for name in scenes.CONCEPTS}
    assert all(min(image.size) >= 12 and max(image.size) >= 40 for image in found.values())
    assert len({image.tobytes() for image in found.values()}) == len(found)


def test_sheets_are_small_and_licensed():
    files = list(vocabulary.SPRITES.iterdir())
    assert sum(file.stat().st_size for file in files) < 4e6
    licences = (vocabulary.SPRITES / "LICENSES.md").read_text()
    assert all(f"{style}.webp" in licences for style in sheets.CELLS)


@pytest.mark.parametrize("style", ["seen", "unseen"])
@pytest.mark.parametrize("kind", scenes.KINDS)
def test_same_seed_same_scene(kind, style):
    first, again = (scenes.make(kind, random.Random("a"), style) for _ in range(2))
    other = scenes.make(kind, random.Random("b"), style)
    assert first.things == again.things and first.image.tobytes() == again.image.tobytes()
    assert first.things != other.things
    assert first.style == style and first.kind == kind and first.image.mode == "RGB"


def test_questions_are_the_same_again():
    scene = scenes.make("mixed", random.Random("a"))
    assert scenes.questions(scene, random.Random("q")) == scenes.questions(scene, random.Random("q"))
    assert scenes.questions(scene, random.Random("q"), limit=2) == scenes.questions(scene, random.Random("q"))[:2]


def test_sizes():
    sizes = Counter(scene.image.size for scene, _ in some("count", 60))
    assert sizes[336, 336] > 25 and len(sizes) > 2
    assert scenes.make("text", random.Random(0), size=(300, 500)).image.size == (300, 500)


def test_boxes_hold_all_that_was_drawn_and_nothing_is_hidden(pictures):
    """Outside the boxes a plain scene shows its background only, and every box shows something else."""
    plain = [scene for scene, _ in pictures if scene.background]
    assert len(plain) > 40
    for scene in plain:
        corner = scene.image.getpixel((0, 0))
        uncovered = scene.image.copy()
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= scene.image.width and 0 <= y0 < y1 <= scene.image.height
            inside = ImageChops.difference(scene.image, Image.new("RGB", scene.image.size, corner)).crop(thing.box)
            assert sum(ImageStat.Stat(inside).mean) > 8, thing
            # soft edges reach a pixel or two beyond what counts as visible
            ImageDraw.Draw(uncovered).rectangle((x0 - 2, y0 - 2, x1 + 1, y1 + 1), fill=corner)
        rest = ImageChops.difference(uncovered, Image.new("RGB", scene.image.size, corner))
        assert max(high for _, high in rest.getextrema()) <= 40


def test_things_do_not_overlap(pictures):
    for scene, _ in pictures:
        things = [thing for thing in scene.things if thing.kind != "frame"]
        for place, one in enumerate(things):
            for two in things[:place]:
                a, b = one.box, two.box
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_background_names(pictures):
    for scene, _ in pictures:
        if scene.background:
            colour = scene.image.getpixel((0, 0))
            assert min(scenes.COLOURS, key=lambda name: distance(scenes.COLOURS[name], colour)) == scene.background


def test_every_word_is_known(pictures):
    words = set(scenes.words())
    for _, asked in pictures:
        for qa in asked:
            said = qa.question if qa.task == "text" else f"{qa.question} {qa.answer}"
            assert {word.strip("?.,") for word in said.split()} <= words, said
            assert qa.question == qa.question.lower() and qa.answer == qa.answer.lower() and "{" not in qa.question


def names_in(question, scene):
    words = [word.strip("?.,") for word in question.split()]
    return [thing for word in words for thing in scene.things if thing.name == word]


def test_answers_are_true(pictures):
    """Each answer follows from the boxes, worked out here in another way."""
    for scene, asked in pictures:
        width, height = scene.image.size
        for qa in asked:
            things = names_in(qa.question, scene)
            if qa.task == "exists":
                assert bool(things) == (qa.answer == "yes")
            elif qa.task == "count":
                assert len(things) == int(qa.answer) and 1 <= len(things) <= 6
            elif qa.task == "colour" and qa.meta["of"] == "shape":
                assert [thing.colour for thing in things] == [qa.answer]
            elif qa.task == "position" and qa.meta["kind"] == "where":
                (x, y), low, high = things[0].centre, 1 / 3 + 0.05, 2 / 3 - 0.05
                across = "left" if x < low * width else "right" if x > high * width else ""
                down = "top" if y < low * height else "bottom" if y > high * height else ""
                assert qa.answer == (f"{down} {across}".strip() or "center")
            elif qa.task == "position":
                axis = qa.meta["kind"] == "above or below"
                gap = things[0].centre[axis] - things[1].centre[axis]
                assert (gap > 0) == (qa.answer in ("right", "below")) and abs(gap) > 60
            elif qa.task == "text":
                (sign,) = scene.named("text")
                assert qa.answer == sign.text.lower()
            elif qa.task == "detail" and qa.meta["kind"] == "smallest":
                sizes = sorted((thing.size, thing.name) for thing in scene.named("object"))
                assert sizes[0][1] == qa.answer and sizes[0][0] * 1.3 < sizes[1][0]
            elif qa.task == "detail":
                (frame,) = scene.named("frame")
                x0, _, x1, _ = frame.box
                inside = [t.name for t in scene.named("object") if x0 < t.box[2] and t.box[0] < x1]
                assert qa.answer in inside


def test_objects_at_a_place_are_the_only_ones_there(pictures):
    asked_for = set()
    for scene, asked in pictures:
        size = scene.image.size
        for qa in (qa for qa in asked if qa.task == "objects" and "where" in qa.meta):
            where = qa.meta["where"]
            asked_for.add(where)
            tests = {
                "left": lambda x, y: x < 0.5,
                "right": lambda x, y: x > 0.5,
                "top": lambda x, y: y < 0.5,
                "bottom": lambda x, y: y > 0.5,
                "center": lambda x, y: 0.35 < x < 0.65 and 0.35 < y < 0.65,
            }
            spots = [(t, *ask.spot(t, size)) for t in scene.things if t.kind != "frame"]
            there = [t for t, x, y in spots if all(tests[word](x, y) for word in where.split())]
            if " " in where:
                there = [t for t in there if ask.place(t, size) != "center"]
            assert [t.name for t in there] == [qa.answer]
    assert asked_for == {*vocabulary.PLACES, *vocabulary.SIDES}


def test_no_answer_can_be_guessed(pictures):
    answers = {}
    for _, asked in pictures:
        for qa in asked:
            answers.setdefault((qa.task, qa.meta.get("kind")), Counter())[qa.answer] += 1
    chance = {("exists", None): 0.5, ("position", "left or right"): 0.5, ("position", "above or below"): 0.5}
    chance |= {("position", "where"): 0.2, ("count", None): 1 / 6, ("colour", None): 1 / 9}
    for key, counts in answers.items():
        share = max(counts.values()) / counts.total()
        assert share < chance.get(key, 0.02) + 0.15, (key, counts.most_common(3))


def test_negatives():
    rng = random.Random(1)
    for _ in range(50):
        assert ask.negative("popular", {"dog"}, rng) in vocabulary.POPULAR
        near = ask.negative("adversarial", {"dog", "hammer"}, rng)
        assert near not in ("dog", "hammer") and vocabulary.CATEGORIES[near] in ("animal", "tool")
        assert ask.negative("random", {"snowman", "candle"}, rng) not in ("hat", "carrot", "fire", "snowman", "candle")
    assert ask.negative("adversarial", set(), rng) is None


def test_pairs():
    answers = Counter()
    for place in range(80):
        rng = random.Random(f"pair/{place}")
        first, second = scenes.pair(rng)
        for qa in scenes.pair_questions(first, second, rng):
            answers[qa.meta["kind"], qa.answer] += 1
            one, two = (bool(names_in(qa.question, scene)) for scene in (first, second))
            if qa.meta["kind"] == "which has":
                assert (one, two) == (qa.answer == "first", qa.answer == "second")
            elif qa.meta["kind"] == "both have":
                assert (one and two) == (qa.answer == "yes") and (one or two)
            else:
                difference = len(first.named("object")) - len(second.named("object"))
                assert abs(difference) >= 2 and (difference > 0) == (qa.answer == "first")
    assert answers["both have", "yes"] == answers["both have", "no"] > 15
    assert 0.6 < answers["which has", "first"] / answers["which has", "second"] < 1.6


def test_include():
    for kind in scenes.KINDS:
        for place in range(5):
            scene = scenes.make(kind, random.Random(place), include=["ghost", "dog"])
            assert {"ghost", "dog"} <= scene.names()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "crowded"}, "no scene kind 'crowded'"),
        ({"style": "oil"}, "no style 'oil'"),
        ({"include": ["dragon"]}, "no picture of dragon"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(VtokError, match=message):
        scenes.make(**({"kind": "mixed", "rng": random.Random(0)} | options))


def test_readings():
    rng = random.Random(0)
    for kind, text in (reading(rng) for _ in range(300)):
        if kind == "number":
            assert text.isdigit() and 2 <= len(text) <= 4 and text[0] != "0"
        else:
            assert text.isalpha() and 3 <= len(text) <= 5 and text in (text.lower(), text.upper())
            assert not any(part in text.lower() for part in AVOIDED)
    assert not set(FONTS["seen"]) & set(FONTS["unseen"])


def test_missing_matplotlib(monkeypatch):
    from vtok_eval.scenes import lettering

    monkeypatch.setattr(lettering, "find_spec", lambda name: None)
    with pytest.raises(VtokError, match=r"pip install 'vtok\[eval\]'"):
        lettering.fonts.__wrapped__()


def test_bundle_is_the_same_again(tmp_path):
    numbers = {"seen": 6, "unseen": 2}
    for name in ("one", "two"):
        bundle.write(tmp_path / name, 7, numbers)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted([*(f"{task}.jsonl" for task in bundle.TASKS), "images.zip", "scenes.jsonl"])
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_bundled_pictures_come_from_the_generator():
    """What the repository holds is what the generator makes today, but for WebP's loss."""
    truth = [json.loads(line) for line in (BUNDLED / "scenes.jsonl").read_text().splitlines()]
    truth = {record["image"]: record for record in truth}
    with zipfile.ZipFile(BUNDLED / "images.zip") as archive:
        for kind, style in (("mixed", "seen"), ("text", "unseen"), ("detail", "unseen")):
            for picture in bundle.scenes(kind, style, 2, seed=0):
                assert json.loads(bundle.truth(picture)) == truth[picture.name]
                with archive.open(picture.name) as file, Image.open(file) as stored:
                    difference = ImageChops.difference(stored.convert("RGB"), picture.scene.image)
                assert max(ImageStat.Stat(difference).mean) < 4
