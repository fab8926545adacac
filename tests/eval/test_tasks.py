"""The bundled tasks, and tasks of one's own: what loads, and what is said where something is wrong."""

from __future__ import annotations

import json
import pickle
import sys
import types
import zipfile
from collections import Counter

import pytest
from PIL import Image

from vtok.errors import VtokError
from vtok_eval import tasks
from vtok_eval.tasks import hub


@pytest.fixture(scope="module")
def bundled():
    return {task.name: task for task in tasks.load()}


def test_bundled_names_and_sizes(bundled):
    assert tuple(bundled) == tasks.NAMES
    for task in bundled.values():
        assert Counter(sample.group for sample in task.samples) == {"seen": 160, "unseen": 40}
        assert len({sample.id for sample in task.samples}) == 200
        assert len({(sample.images, sample.question) for sample in task.samples}) == 200
        assert task.source == "bundled" and task.metric == ("yes/no" if task.name == "exists" else "accuracy")
        assert all(len(sample.images) == (2 if task.name == "multi" else 1) for sample in task.samples)
    assert sum(path.stat().st_size for path in tasks.BUNDLED.iterdir()) < 20e6


def test_every_bundled_picture_opens(bundled):
    names = {name for task in bundled.values() for sample in task.samples for name in sample.images}
    picture = bundled["text"].picture
    sizes = Counter(picture(name).size for name in names)
    assert sizes[336, 336] > 0.5 * sizes.total() and len(sizes) == 5
    assert picture(min(names)).mode == "RGB"


def test_bundled_answers_are_balanced(bundled):
    most = {"exists": 0.52, "count": 0.18, "colour": 0.15, "position": 0.14, "multi": 0.36}
    for name, task in bundled.items():
        for group in ("seen", "unseen"):
            answers = Counter(sample.answer for sample in task.samples if sample.group == group)
            share = max(answers.values()) / answers.total()
            assert share <= most.get(name, 0.055) + (0.03 if group == "unseen" else 0), (name, group, answers)
    negatives = Counter(sample.meta.get("negative") for sample in bundled["exists"].samples)
    assert set(negatives) == {None, "random", "popular", "adversarial"}
    assert min(negatives.values()) >= 30


def test_bundled_truth(bundled):
    """Answers follow from ``scenes.jsonl``, which says what is where."""
    lines = (tasks.BUNDLED / "scenes.jsonl").read_text().splitlines()
    scenes = {record["image"]: record["things"] for record in map(json.loads, lines)}
    for task in bundled.values():
        for sample in task.samples:
            names = [{thing["name"] for thing in scenes[image]} for image in sample.images]
            words = {word.strip("?.,") for word in sample.question.split()}
            if task.name in ("objects", "detail"):
                assert sample.answer in names[0]
            elif task.name == "exists":
                assert bool(words & names[0]) == (sample.answer == "yes")
            elif task.name == "count":
                assert sum(thing["name"] in words for thing in scenes[sample.images[0]]) == int(sample.answer)
            elif task.name == "text":
                assert sample.answer in [thing.get("text", "").lower() for thing in scenes[sample.images[0]]]
            elif sample.meta.get("kind") == "which has":
                assert bool(words & names[0]) == (sample.answer == "first") != bool(words & names[1])


def test_load_some():
    assert [task.name for task in tasks.load("count, text")] == ["count", "text"]
    assert [task.name for task in tasks.load(["text", "count", "text"])] == ["text", "count"]


def test_limit():
    full, some, fewer = (tasks.load(["count"], limit=limit)[0] for limit in (None, 50, 10))
    assert Counter(sample.group for sample in some.samples) == {"seen": 40, "unseen": 10}
    assert Counter(sample.group for sample in fewer.samples) == {"seen": 8, "unseen": 2}
    ids = [[sample.id for sample in task.samples] for task in (fewer, some, full)]
    assert set(ids[0]) < set(ids[1]) < set(ids[2])
    assert tasks.load(["count"], limit=999)[0].samples == full.samples
    assert {sample.group for sample in tasks.load(["count"], limit=2)[0].samples} == {"seen", "unseen"}


@pytest.mark.parametrize("names", ["colr", ["count", "colr"], "", []])
def test_unknown_names(names):
    with pytest.raises(VtokError, match="objects, exists, count"):
        tasks.load(names)


def test_bad_limit():
    with pytest.raises(VtokError, match="at least 1"):
        tasks.load("count", limit=0)


def write(folder, lines, name="own.jsonl", pictures=("a.png", "b.png")):
    (folder / "images").mkdir(exist_ok=True)
    for place, picture in enumerate(pictures):
        Image.new("RGB", (8, 6), (50 * place, 0, 0)).save(folder / "images" / picture)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text + "\n")
    return folder


GOOD = {"image": "a.png", "question": "what?", "answer": "cat"}


def test_folder(tmp_path):
    lines = [GOOD, "", GOOD | {"answer": 3, "accepted": ["three", 4], "group": "hard", "id": "x", "meta": {"k": 1}}]
    lines.append({"images": ["a.png", "b.png"], "question": "same?", "answer": "no", "task": "two"})
    one, two = tasks.load(data=write(tmp_path, lines))
    assert (one.name, two.name) == ("own", "two") and one.source == str(tmp_path)
    assert [sample.id for sample in one.samples] == ["own-00001", "x"]
    assert one.samples[1].answer == "3" and one.samples[1].accepted == ("three", "4")
    assert one.samples[1].group == "hard" and one.samples[1].meta == {"k": 1}
    assert (one.metric, two.metric) == ("accuracy", "yes/no")
    assert [two.picture(name).getpixel((0, 0)) for name in two.samples[0].images] == [(0, 0, 0), (50, 0, 0)]
    assert [task.name for task in tasks.load(["two", "count"], data=tmp_path)] == ["two", "count"]


def test_zip_and_pictures_beside_the_file(tmp_path):
    folder = write(tmp_path, [GOOD])
    beside = tasks.load(data=folder)[0]
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.write(folder / "images" / "a.png", "a.png")
    zipped = tasks.load(data=folder)[0]
    assert zipped.picture("a.png").tobytes() == beside.picture("a.png").tobytes()
    assert pickle.loads(pickle.dumps(zipped.picture))("a.png").size == (8, 6)
    (folder / "images.zip").unlink()
    (folder / "images" / "a.png").rename(folder / "a.png")
    assert tasks.load(data=folder)[0].picture("a.png").size == (8, 6)


def test_transparent_becomes_white(tmp_path):
    folder = write(tmp_path, [GOOD])
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(folder / "images" / "a.png")
    assert tasks.load(data=folder)[0].picture("a.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"own.jsonl, line 2: not JSON \(.* at column 2\)"),
        ([1], "line 2: a line must be a JSON object"),
        ({"image": "a.png", "answer": "x"}, 'line 2: "question" must be a text or a number, not null'),
        (GOOD | {"answer": True}, '"answer" must be a text or a number, not true'),
        (GOOD | {"answer": " "}, '"answer" must be a text'),
        (GOOD | {"accepted": "x"}, '"accepted" must be a list of texts, not "x"'),
        (GOOD | {"meta": 1}, '"meta" must be an object'),
        (GOOD | {"anwser": "x"}, "unknown field 'anwser'"),
        ({"question": "x", "answer": "y"}, "no picture"),
        ({"images": [], "question": "x", "answer": "y"}, "no picture"),
        (GOOD | {"id": "own-00001"}, "line 2: the id 'own-00001' is taken by line 1"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, message):
    with pytest.raises(VtokError, match=message):
        tasks.load(data=write(tmp_path, [GOOD, line]))


def test_broken_folders(tmp_path):
    with pytest.raises(VtokError, match="is not a folder"):
        tasks.load(data=tmp_path / "nowhere")
    with pytest.raises(VtokError, match=r"has no \.jsonl file"):
        tasks.load(data=tmp_path)
    (tmp_path / "own.jsonl").write_bytes(b'{"image": "\xff"}\n')
    with pytest.raises(VtokError, match="line 1: not UTF-8"):
        tasks.load(data=tmp_path)
    (tmp_path / "own.jsonl").write_text("\n\n")
    with pytest.raises(VtokError, match="has no samples"):
        tasks.load(data=tmp_path)
    write(tmp_path, [GOOD], pictures=())
    with pytest.raises(VtokError, match="none of the 1 pictures of 'own' is there"):
        tasks.load(data=tmp_path)
    write(tmp_path, [GOOD | {"id": "x", "task": "t"}])
    write(tmp_path, [GOOD | {"id": "x", "task": "t"}], "other.jsonl")
    with pytest.raises(VtokError, match="the id 'x' of the task 't' stands in two files"):
        tasks.load(data=tmp_path)
    (tmp_path / "other.jsonl").unlink()
    (tmp_path / "images.zip").write_bytes(b"no zip")
    with pytest.raises(VtokError, match=r"images\.zip cannot be opened"):
        tasks.load(data=tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_bad_pictures_are_named_and_leave_the_others_alone(tmp_path, zipped):
    lines = [GOOD | {"image": name} for name in ("a.png", "gone.png", "text.png", "cut.png")]
    folder = write(tmp_path, lines)
    Image.effect_noise((64, 64), 50).save(folder / "images" / "cut.png")
    data = (folder / "images" / "cut.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "images" / "text.png").write_text("not a picture")
    if zipped:
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for path in (folder / "images").iterdir():
                archive.write(path, path.name)
    task = tasks.load(data=folder)[0]
    assert task.picture("a.png").size == (8, 6)
    for name, message in (("gone.png", "gone.png"), ("text.png", "cannot be read"), ("cut.png", "cannot be read")):
        with pytest.raises(VtokError, match=message):
            task.picture(name)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png"])
def test_pictures_stay_in_the_folder(tmp_path, name):
    with pytest.raises(VtokError, match="points out of"):
        tasks.load(data=write(tmp_path, [GOOD, GOOD | {"image": name}]))


def test_fingerprint(tmp_path):
    folder = write(tmp_path, [GOOD])
    first = tasks.load(data=folder)[0].fingerprint
    assert tasks.load(data=folder)[0].fingerprint == first
    write(folder, [GOOD | {"answer": "dog"}])
    second = tasks.load(data=folder)[0].fingerprint
    Image.new("RGB", (8, 6), (1, 2, 3)).save(folder / "images" / "a.png")
    assert len({first, second, tasks.load(data=folder)[0].fingerprint}) == 3


class Rows(list):
    """As much of a ``datasets.Dataset`` as is used."""

    column_names = ("image", "question", "answer", "more")
    features = types.MappingProxyType(dict.fromkeys(column_names))
    _fingerprint = "f"


@pytest.fixture
def rows(monkeypatch):
    found = Rows()
    asked = []

    def load_dataset(*args, **options):
        asked.append((*args, options["split"]))
        if args[0] == "no/set":
            raise ConnectionError("no route")
        return found

    module = types.ModuleType("datasets")
    module.__spec__ = types.SimpleNamespace(name="datasets")
    module.load_dataset, module.Image = load_dataset, type("Image", (), {})
    monkeypatch.setitem(sys.modules, "datasets", module)
    found.asked = asked
    return found


def test_hub(rows):
    picture = Image.new("L", (5, 4))
    rows += [
        {"image": picture, "question": "what?", "answer": ["cat", "kitten", "cat"], "more": None},
        {"image": [picture, picture], "question": "same?", "answer": "yes", "more": ["y"]},
        {"image": None, "question": "gone?", "answer": "no", "more": None},
        {"image": picture, "question": "hidden?", "answer": None, "more": None},
    ]
    (task,) = tasks.load("hf:own/er?split=test&config=c&accepted=more")
    assert rows.asked == [("own/er", "c", "test")] and task.name == "own/er"
    first, second = task.samples
    assert first.answer == "cat" and first.accepted == ("kitten", "cat") and second.accepted == ("y",)
    assert len(second.images) == 2
    assert all(task.picture(name).mode == "RGB" for sample in task.samples for name in sample.images)
    with pytest.raises(VtokError, match="cannot be read"):
        task.picture("9/image")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:no/set", "cannot be loaded: no route"),
        ("hf:own/er?image=photo", "no column 'photo'; there are image, question, answer, more"),
        ("hf:own/er?colour=red", "unknown option 'colour'; there are split, config"),
        ("hf:?split=test", "no data set is named"),
        ("hf:own/er", "no row with a picture"),
    ],
)
def test_hub_errors(rows, spec, message):
    with pytest.raises(VtokError, match=message):
        tasks.load([spec])


def test_hub_without_the_package(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(VtokError, match="pip install datasets"):
        tasks.load("hf:own/er")
