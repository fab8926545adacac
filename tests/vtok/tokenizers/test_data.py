"""Pictures to train on: the same in every run, and none lost without a word."""

from __future__ import annotations

import logging
import pickle
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from vtok.errors import VtokError
from vtok.tokenizers.data import Pictures, Views, find, sources, view


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pictures of one grey each, in two folders and three formats, and some that are none."""
    for place in range(20):
        target = (
            tmp_path / "pictures" / ("deep/er" if place % 2 else ".") / f"{place}.{('png', 'jpg', 'webp')[place % 3]}"
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + place, 30), (10 * place,) * 3).save(target)
    (tmp_path / "pictures" / "notes.txt").write_text("nothing")
    return tmp_path / "pictures"


def grey(image: Image.Image) -> int:
    return image.getpixel((3, 3))[0]


def test_a_folder_is_searched_to_its_depths(folder: Path) -> None:
    found = find(folder)
    assert len(found) == 20 and "deep/er/1.jpg" in [found.label(i) for i in range(20)]
    assert [label for label, _ in found.readable(3)] == [found.label(i) for i in range(3)]


def test_what_is_held_out_is_never_trained_on(folder: Path) -> None:
    parts = {part: find(folder, part, share=0.2) for part in ("train", "held-out", "all")}
    names = {part: {found.label(i) for i in range(len(found))} for part, found in parts.items()}
    assert len(names["held-out"]) == 4
    assert not names["train"] & names["held-out"] and names["train"] | names["held-out"] == names["all"]
    assert names["held-out"] == {label for label, _ in find(folder, "held-out", share=0.2).readable()}, (
        "the same in every run"
    )


def test_one_file_will_do(folder: Path) -> None:
    found = find(folder / "2.webp")
    assert len(found) == 1 and found.label(0) == "2.webp"


def test_what_cannot_be_read_is_named_and_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "0.png").write_bytes(b"no picture")
    (folder / "6.png").write_bytes((folder / "6.png").read_bytes()[:60])
    found = find(folder)
    reasons = {label: image for label, image in found.readable() if isinstance(image, str)}
    assert set(reasons) == {"0.png", "6.png"} and "cannot be read" in reasons["0.png"]
    with caplog.at_level(logging.WARNING, "vtok"):
        batches = torch.cat([Views(found, 8, 4, 10)[i] for i in range(10)])
    assert len(batches) == 40
    assert sorted(record.args[0] for record in caplog.records if record.args)[:1] == ["0.png"]


def test_a_folder_without_a_readable_picture_stops(tmp_path: Path) -> None:
    for place in range(3):
        (tmp_path / f"{place}.png").write_bytes(b"no")
    with pytest.raises(VtokError, match="none of the 3 pictures"):
        Views(find(tmp_path), 8, 2, 1)[0]


def test_every_picture_is_seen_once_before_any_is_seen_twice(folder: Path) -> None:
    found = Views(find(folder), 8, 4, 10, seed=3)
    greys = [round(float(image.mean()) * 255 / 10) for i in range(10) for image in found[i]]
    assert sorted(greys[:20]) == list(range(20)) == sorted(greys[20:])
    assert greys[:20] != greys[20:]


def test_batches_depend_on_their_number_and_the_seed_alone(folder: Path) -> None:
    whole, again = Views(find(folder), 8, 4, 6, seed=1), Views(find(folder), 8, 4, 6, seed=1)
    for number in (5, 0, 3):
        assert torch.equal(whole[number], pickle.loads(pickle.dumps(again))[number])
    assert not torch.equal(whole[0], Views(find(folder), 8, 4, 6, seed=2)[0])
    with pytest.raises(IndexError):
        whole[6]


def test_views_are_squares_inside_the_picture() -> None:
    picture = Image.linear_gradient("L").resize((64, 32))
    middle = view(picture, 16)
    assert middle.shape == (3, 16, 16) and float(middle.min()) >= 0 and float(middle.max()) <= 1
    rng = random.Random(0)
    drawn = [view(picture, 16, rng) for _ in range(8)]
    assert len({float(each.mean()) for each in drawn}) == 8
    assert all(float(each[0, 0, 0]) < float(each[0, -1, 0]) for each in drawn)


def draw(number: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (number % 256,) * 3)


def test_pictures_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Pictures("greys", draw)
    found = Views(endless, 16, 4, 3, views=2)
    assert [round(float(image.mean()) * 255) for i in range(3) for image in found[i]] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
    ]
    assert len(list(endless.readable(5))) == 5
    with pytest.raises(VtokError, match="--limit"):
        list(endless.readable())
    with pytest.raises(VtokError, match="multiple of 3"):
        Views(endless, 16, 4, 3, views=3)


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VtokError, match=r"no folder of pictures.*scenes"):
        find("nowhere")
    with pytest.raises(VtokError, match="holds no pictures"):
        find(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(VtokError, match="one picture"):
        find(tmp_path, "train")
    with pytest.raises(VtokError, match="held out"):
        find(tmp_path, share=1.0)
    with pytest.raises(VtokError, match="no part"):
        find(tmp_path, "test")


def test_registered_sources() -> None:
    assert {"scenes", "photographs"} <= set(sources())
    train, held_out = find("scenes", "train"), find("scenes", "held-out")
    assert train.picture(3).tobytes() == pickle.loads(pickle.dumps(find("scenes", "train"))).picture(3).tobytes()
    assert train.picture(3).tobytes() != held_out.picture(3).tobytes()
    pytest.importorskip("skimage")
    photographs = find("photographs")
    assert photographs.label(0) == "astronaut 1" and photographs.picture(0).size == (512, 512)
    assert len({photographs.picture(i).size for i in range(8)}) > 4
    with pytest.raises(VtokError, match="to measure with"):
        find("photographs", "train")
