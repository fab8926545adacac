"""What the nano models are trained on: scenes and their labels, symbols, blends, hints, a tower's readings."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from vtok.geometry import randomize
from vtok_eval import scenes
from vtok_eval.models import nano
from vtok_eval.scenes.crowd import crowd
from vtok_eval.scenes.records import Scene, Thing
from vtok_eval.train.data import Scenes, Turn
from vtok_eval.train.hints import Hints
from vtok_eval.train.labels import CHARACTERS, COLOURS, IGNORE, THINGS, covered, labels
from vtok_eval.train.language import Talk
from vtok_eval.train.tower import Tower, matmul_patches
from vtok_eval.train.words import Words

PICTURES = [Image.effect_noise(size, 90).convert("RGB") for size in ((448, 336), (336, 336))]
QUESTIONS = [("what object is in the picture?", "dog"), ("read the word.", "zuq42"), ("where is the cat?", "top left")]


def test_batches_depend_on_seed_and_number_alone() -> None:
    processor = nano.processor("nano-llava", scenes.words())
    data = [Scenes("nano-llava", processor, 2, 4, "a", pairs=0.5, crowds=0.5) for _ in range(2)]
    data[1][0]  # another order of calls
    for number in (3, 1):
        first, second = data[0][number], data[1][number]
        assert torch.equal(first.images["pixel_values"], second.images["pixel_values"])
        assert first.turns == second.turns
    other = Scenes("nano-llava", processor, 2, 4, "b")[3]
    assert not torch.equal(other.images["pixel_values"][:1], data[0][3].images["pixel_values"][:1])


def test_labels_say_what_a_token_looks_at() -> None:
    things = (
        Thing(scenes.CONCEPTS[3], "object", None, (0, 0, 28, 28)),
        Thing(scenes.SHAPES[0], "shape", "red", (56, 0, 84, 28)),
        Thing("word", "text", None, (0, 56, 84, 84), "aB", ((0, 56, 42, 84), (42, 56, 84, 84))),
    )
    found = labels(Scene(Image.new("RGB", (84, 84)), things, "blue", "seen", "mixed"), 6, 6, (0, 0, 6, 6))
    assert found.thing[0, 0] == found.thing[1, 1] == THINGS.index(scenes.CONCEPTS[3])
    assert found.thing[0, 4] == THINGS.index(scenes.SHAPES[0])
    assert found.thing[2, 2] == 0
    assert found.colour[0, 4] == COLOURS.index("red")
    assert found.colour[2, 2] == COLOURS.index("blue")
    assert found.colour[0, 0] == IGNORE
    assert found.character[5].tolist() == [CHARACTERS.index("a")] * 3 + [CHARACTERS.index("b")] * 3
    assert set(found.present().nonzero().flatten().tolist()) == set(found.thing.unique().tolist()) - {0}
    assert torch.equal(found.window(1, 2, 3, 4).thing, found.thing[1:4, 2:6])


def test_near_a_centre_are_cells_of_things() -> None:
    found = labels(_seen(), 12, 12, (0, 0, 12, 12))
    near, something = found.near(), (found.thing > 0) | (found.character > 0)
    assert (near >= found.centre).all() and near.sum() > found.centre.sum()
    for row, column in near.nonzero().tolist():
        assert something[row, column]
        assert found.centre[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].any()


def test_a_tiny_box_has_a_token() -> None:
    assert covered((1.8, 2.9, 2.1, 3.1), 5, 5).nonzero().tolist() == [[3, 1]]


def test_crowds_are_full_and_apart() -> None:
    scene = crowd(random.Random(1))
    assert len(scene.things) > 9
    boxes = [thing.box for thing in scene.things]
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize("name", nano.NANO)
def test_symbols_stand_where_pictures_stood(name: str) -> None:
    model, processor = nano.blank(name, scenes.words())
    batch = Scenes(name, processor, 2, 1, "symbols", 20, crowds=0.5, lists=1.0)[0]
    talk = Talk(name, model, processor, pool=2)
    words = talk.words(batch.labels, torch.device("cpu"))
    assert [len(own) for own in words] == [maps.thing.numel() for maps in batch.labels]
    table = model.get_input_embeddings().weight
    things = batch.labels[0].thing.flatten()
    cell = int(things.where(things <= len(scenes.CONCEPTS), 0).argmax())
    name_of = THINGS[int(things[cell])]
    own = table[processor.tokenizer(name_of, add_special_tokens=False).input_ids].mean(0)
    assert F.cosine_similarity(words[0][cell], own, 0) > 0.3
    talk.symbols = True
    loss, right = talk.step(batch)
    assert loss.isfinite() and "list" in right


@pytest.mark.grad
@pytest.mark.parametrize("name", nano.NANO)
def test_what_a_token_shows_is_put_into_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = nano.blank(name, scenes.words())
    randomize(model, 0)
    talk = Talk(name, model, processor)
    data = Scenes(name, processor, 1, 1, "words", 1, kinds={"text": 1.0})
    talk.measure(data[0])
    words = Words(talk, 200)
    words.measure(data[0])
    words.collect(data)
    told = int((words.shown["centre"] > 0).logical_or(words.shown["character"] > 0).sum())
    assert 0 < told < len(words.seen) < len(data[0].labels[0].thing.flatten()) / 2
    assert told == int(data[0].labels[0].centre.logical_or(data[0].labels[0].character > 0).sum())
    for share in ("NEAR", "OTHERS"):
        monkeypatch.setattr(f"vtok_eval.train.words.{share}", 1.0)
    words.collect(data)
    # what was kept, run through the rest, is what the whole gives, token by token (Qwen's tower goes by windows)
    hidden = words._last(words.seen.float())
    with torch.no_grad():
        found = words.project(hidden[:, 0] if name == "nano-llava" else hidden.flatten(0, 1))
        whole = torch.cat(talk.features(data[0].images))
    nearest = torch.cdist(F.normalize(found - whole.mean(0)), F.normalize(whole - whole.mean(0))).argmin(1)
    assert (nearest == torch.arange(len(whole))).float().mean() > 0.95  # bfloat16 on the way
    torch.manual_seed(0)
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW([p.requires_grad_(True) for m in words.last for p in m.parameters()], 1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(1)
        loss, numbers = words.step(None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and set(numbers) >= {"away", "character", "order", "chance"}


@pytest.mark.parametrize("name", nano.NANO)
def test_what_was_seen_is_read_again_as_it_was(name: str) -> None:
    model, processor = nano.blank(name, scenes.words())
    randomize(model, 0)
    talk = Talk(name, model, processor)
    data = Scenes(name, processor, 2, 4, "again", 1, reuse=2)
    first, second, third = data[0], data[1], data[2]
    assert first.images is second.images and first.images is not third.images
    talk.measure(first)
    for batch in (first, second, third):
        found, wanted = talk.read(batch.images), talk.features(batch.images)
        assert [len(own) for own in found] == [len(own) for own in wanted]
        torch.testing.assert_close(torch.cat(found), torch.cat(wanted), atol=1e-5, rtol=1e-4)


def test_words_and_pictures_are_blended() -> None:
    model, processor = nano.blank("nano-llava", scenes.words())
    randomize(model, 0)
    talk = Talk("nano-llava", model, processor)
    batch = Scenes("nano-llava", processor, 2, 1, "blend", 4)[0]
    losses = []
    for blend in (None, 1.0, 0.0):
        talk.blend = blend
        torch.manual_seed(0)
        losses.append(talk.step(batch)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] != losses[0]


def _seen() -> Scene:
    things = (
        Thing("cat", "object", None, (0, 0, 28, 28)),
        Thing(scenes.SHAPES[0], "shape", "red", (56, 0, 84, 28)),
        Thing("frame", "frame", "red", (0, 0, 30, 30)),
        Thing("word", "text", None, (0, 56, 28, 84), "abc", ((0, 56, 10, 84), (10, 56, 14, 84), (14, 56, 28, 84))),
    )
    return Scene(Image.new("RGB", (84, 84)), things, "blue", "seen", "mixed")


def test_labels_mark_centres_frames_sizes_and_the_order_of_characters() -> None:
    found = labels(_seen(), 6, 6, (0, 0, 6, 6))
    assert found.centre.nonzero().tolist() == [[1, 1], [1, 5], [5, 0], [5, 1]]
    assert found.framed.sum() == 4 and found.framed[:2, :2].all()
    assert found.small[0, 0] == 0 and found.small[3, 3] == 0
    # "a" and "b" have their centres in one cell: the first stands there, the second is noted beside it
    letters = [CHARACTERS[int(own)] for own in found.character[5, :2]]
    assert letters == ["a", "c"] and CHARACTERS[int(found.next[5, 0])] == "b"
    assert found.order[5, :2].tolist() == [1, 3]


@pytest.mark.parametrize("name", nano.NANO)
def test_sparse_tokens_keep_centres_and_their_places(name: str) -> None:
    model, processor = nano.blank(name, scenes.words())
    talk = Talk(name, model, processor)
    talk.sparse = (0.0, 0.0)
    maps = labels(_seen(), 6, 6, (0, 0, 6, 6))
    (kept,) = talk._kept([maps])
    assert kept.tolist() == [7, 11, 30, 31]
    few, whole = (talk._row([(6, 6)], [], cells) for cells in ([kept.tolist()], None))
    places = [
        [p for i, p in zip(row["ids"], row["positions"], strict=True) if i == model.config.image_token_id]
        for row in (few, whole)
    ]
    assert places[0] == [places[1][index] for index in kept.tolist()]
    assert few["positions"][-1] == whole["positions"][-1] or name == "nano-llava"


@pytest.mark.parametrize("name", nano.NANO)
def test_what_stays_closes_up_where_vtok_closes_it_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = nano.blank(name, scenes.words())
    talk = Talk(name, model, processor)
    talk.sparse, talk.close = (0.3, 0.1), 1.0
    rows: list[dict[str, list[Any]]] = []
    row = Talk._row
    monkeypatch.setattr(Talk, "_row", lambda *args: rows.append(row(*args)) or rows[-1])
    talk.step(Scenes(name, processor, 1, 2, "a", questions=2)[0])
    for own in rows:
        first = [place for place, block in zip(own["positions"], own["block"], strict=True) if block < 2]
        closed = first == [[i] * 3 for i in range(len(first))]
        assert closed == (name == "nano-llava")


def test_hints_are_what_a_question_has_to_find() -> None:
    processor = nano.processor("nano-llava", scenes.words())
    hints = Hints(processor.tokenizer, 16)
    ids = lambda text: processor.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    maps = labels(_seen(), 6, 6, (0, 0, 6, 6))

    def found(task: str, question: str, answer: str, truth: list[Any]) -> list[tuple[int, dict[str, int]]]:
        return hints.targets(Turn(task, ids(question), ids(answer)), truth, 2)

    place = {"first": 1, "count": 1, "across": 0, "down": 0}
    assert found("exists", "is there a cat in the picture?", "yes", [maps]) == [(3, place)]
    shape = {"first": 1, "count": 1, "across": 2, "down": 0, "colour": COLOURS.index("red")}
    question = f"what colour is the {scenes.SHAPES[0]}?"
    assert found("colour", question, "red", [maps]) == [(4, shape)]
    assert found("exists", "can you see a dog?", "no", [maps]) == [(4, {"first": 0, "count": 0})]
    empty = labels(Scene(Image.new("RGB", (84, 84)), (), "blue", "seen", "mixed"), 6, 6, (0, 0, 6, 6))
    both = found("multi", "do both pictures have a cat?", "no", [maps, empty])
    assert both == [(5, {"first": 1, "second": 0})]
    (where,) = found("objects", "what is on the left?", "cat", [maps])
    assert where[0] == len(ids("what is on the left")) - 1
    assert hints._answers[where[1]["answer"]] == ids("cat")
    name, number = found("count", "how many times does the cat appear?", "1", [maps])
    assert name[1] == place and number[0] == len(ids("how many times does the cat appear")) - 1
    assert hints._answers[number[1]["answer"]] == ids("1")
    read = found("text", "read the word.", "abc", [maps])
    # before the mark, at the last of two tokens between, and at each character but the last: the one that follows
    assert [place for place, _ in read] == [2, 5, 6, 7]
    assert [hints._answers[own["answer"]] for _, own in read] == [ids("a"), *([token] for token in ids("abc"))]


@pytest.mark.grad
def test_a_hint_reaches_the_first_half_of_the_layers() -> None:
    model, processor = nano.blank("nano-llava", scenes.words())
    batch = Scenes("nano-llava", processor, 2, 1, "hints", 6, crowds=1.0, pixels=False)[0]
    talk = Talk("nano-llava", model, processor)
    talk.symbols, talk.sparse = True, (0.2, 0.05)
    plain = talk.step(batch)[0]
    talk.hints = Hints(processor.tokenizer, model.config.text_config.hidden_size)
    handle = talk.hints.watch(model.model.language_model.layers[4])
    torch.manual_seed(0)
    loss, numbers = talk.step(batch)
    assert {"hint first", "hint across", "hint count"} <= set(numbers) and loss > plain
    loss.backward()
    assert talk.hints.read.weight.grad is not None and talk.hints.read.weight.grad.abs().sum() > 0
    handle.remove()
    torch.manual_seed(0)
    assert "hint first" not in talk.step(batch)[1]


def test_scenes_are_reused_and_asked_anew() -> None:
    processor = nano.processor("nano-qwen", scenes.words())
    data = Scenes("nano-qwen", processor, 2, 6, "again", pixels=False, reuse=2)
    first, second, third = (data[number] for number in range(3))
    assert not first.images and torch.equal(first.labels[0].thing, second.labels[0].thing)
    assert first.turns != second.turns
    assert first.grids != third.grids or not torch.equal(first.labels[0].thing, third.labels[0].thing)
    whole = Scenes("nano-qwen", processor, 2, 6, "again", reuse=2)[0]
    assert [grid for own in whole.grids for grid in own] == [
        (rows // 2, columns // 2) for _, rows, columns in whole.images["image_grid_thw"].tolist()
    ]
    assert whole.grids == first.grids


def test_batches_of_some_scenes_take_turns() -> None:
    _, processor = nano.blank("nano-qwen", scenes.words())
    data = Scenes("nano-qwen", processor, 1, 12, "turns", pixels=False, reuse=2, mixed=3)
    shown = [data[step].images for step in range(12)]
    first, second = shown[:6], shown[6:]
    for window in (first, second):
        assert sorted(sum(one is other for other in window) for one in window) == [2] * 6
    assert not any(one is other for one in first for other in second)
    assert any(one is not other for one, other in zip(first[::2], first[1::2], strict=True)), "they follow each other"
    again = Scenes("nano-qwen", processor, 1, 12, "turns", pixels=False, reuse=2, mixed=3)
    assert [turn.question for turn in again[7].turns[0]] == [turn.question for turn in data[7].turns[0]]
    assert torch.equal(again[7].labels[0].thing, data[7].labels[0].thing), "a resumed run draws other scenes"


@pytest.mark.grad
@pytest.mark.parametrize("name", nano.NANO)
def test_a_tower_learns(name: str) -> None:
    torch.manual_seed(0)
    model, processor = nano.blank(name, scenes.words())
    batch = Scenes(name, processor, 1, 1, "learn", crowds=1.0)[0]
    tower = Tower(name, model, share=0.3)
    plain = [weight.clone() for weight in model.parameters()]
    with matmul_patches(model):
        optimizer = torch.optim.AdamW(tower.parameters(), 1e-3)
        losses = []
        for _ in range(4):
            torch.manual_seed(1)  # the same window
            loss, numbers = tower.step(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(numbers) >= {"thing", "colour", "character", "present"}
    assert any(not torch.equal(a, b) for a, b in zip(plain, model.parameters(), strict=True))
    if name == "nano-qwen":
        assert "forward" not in vars(model.model.visual.patch_embed)
