"""Cards of trained resamplers: paired comparisons from a run's answers, and what the committed ones say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vtok
from vtok.api import adapter_of
from vtok.errors import VtokError
from vtok.resampler import OrderedResampler, ResamplerConfig, files
from vtok_eval import models, tasks
from vtok_eval.harness import store
from vtok_eval.harness.bits import count
from vtok_eval.models import enough, ordered, resamplers

from .tiny import build, run

ROWS = ["trained=flextok", "averages=flextok", "divprune"]
CARDS = sorted((Path(__file__).parents[2] / "model_cards").glob("*-resampler"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which the "trained" row differs from the averages in what it starts from."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = {"trained": {"scheme": "farthest"}}
    run("llava", out, methods=ROWS, keeps=[4, 2], tasks=tasks.load("objects,exists"), limit=8, options=options)
    return out


def test_comparisons_are_those_of_the_answers(folder: Path) -> None:
    rows = ordered.compared(folder)
    lines = {store.key_of(line): line["correct"] for line in store.read(folder / store.SAMPLES)}
    asked = tasks.load("objects,exists", limit=8)
    seen = {task.name: [own.id for own in task.samples if own.group != "unseen"] for task in asked}

    def accuracy(entry: str) -> float:
        return sum(sum(lines[entry, name, own] for own in ids) / len(ids) for name, ids in seen.items()) / 2

    assert [row["keep"] for row in rows] == [2, 4]
    assert "step" not in rows[0]
    for row in rows:
        own = accuracy(f"trained@{row['keep']}")
        free = {name: accuracy(f"{name}@{row['keep']}") for name in ("averages", "divprune")}
        assert row["accuracy"] == pytest.approx(own)
        assert row["averages"]["value"] == pytest.approx(own - free["averages"])
        assert row["best"]["accuracy"] == pytest.approx(max(free.values()))
        assert row["averages"]["ci"][0] <= row["averages"]["value"] <= row["averages"]["ci"][1]
    assert rows[1]["step"]["value"] == pytest.approx(accuracy("trained@4") - accuracy("trained@2"))
    (folder / "lost").mkdir(exist_ok=True)
    for name in (store.RESULTS, store.SAMPLES):
        text = (folder / name).read_text()
        (folder / "lost" / name).write_text(text if name == store.RESULTS else text.rsplit("\n", 2)[0] + "\n")
    with pytest.raises(VtokError, match="1 answers are missing"):
        ordered.compared(folder / "lost")


def test_a_run_without_the_rows(tmp_path: Path) -> None:
    run("llava", tmp_path, methods=["divprune"], keeps=[4], tasks=tasks.load("exists"), limit=2)
    with pytest.raises(VtokError, match=r"has no row averages and trained; run vtok eval with --method trained="):
        ordered.compared(tmp_path)


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Three budgets at which everything is well."""
    made = []
    for keep in (16, 32, 64):
        better = {"accuracy": 0.5, "value": 0.1, "ci": [0.05, 0.15], "p": 0.001}
        row = {"keep": keep, "accuracy": 0.6, "ci": [0.5, 0.7], "averages": {"name": "averages", **better}}
        row |= {"best": {"name": "todre", **better}, "step": {"value": 0.02, "ci": [-0.01, 0.03], "p": 0.4}}
        made.append(row | (changes if keep == 32 else {}))
    return made


def test_verdicts() -> None:
    well = ordered.verdicts(rows())
    assert well[:2] == [
        "No doubling of the tokens makes it worse (95% intervals of paired differences).",
        "Better than averages at every number of tokens up to 64 (McNemar, p < 0.05).",
    ]
    assert [text.split(" tokens")[0] for text in well[2:]] == ["At 16", "At 32"]
    worse = ordered.verdicts(rows(step={"value": -0.04, "ci": [-0.06, -0.02], "p": 0.01}))
    assert (
        worse[0] == "Worse than with half the tokens (95% interval of the paired difference): 32 (\N{MINUS SIGN}4.0)."
    )
    for averages in ({"value": 0.01, "p": 0.2}, {"value": -0.1, "p": 0.001}):
        same = ordered.verdicts(rows(averages={"name": "averages", "accuracy": 0.6, "ci": [0, 0], **averages}))
        assert same[1] == "Not significantly better than averages at 32."


def test_what_auto_gives_is_counted_from_the_answers(tmp_path: Path) -> None:
    model, _ = build("llava")
    torch.manual_seed(0)
    door = files.door(adapter_of(model))
    config = ResamplerConfig(dim=door.dim, width=32, head_dim=16, blocks=1, tokens=8, halting=True)
    folder = str(files.save(OrderedResampler(files.made_for(config, door)), tmp_path / "weights"))
    options = {f"q{int(10 * quality)}": {"weights": folder, "auto": quality} for quality in (0.9, 0.4)}
    asked = tasks.load("objects,exists", limit=4)
    run("llava", tmp_path / "out", methods=["q9=flextok", "q4=flextok"], keeps=[8], tasks=asked, options=options)
    rows = enough.measured(tmp_path / "out")
    assert [row["quality"] for row in rows] == [0.4, 0.9]
    lines = list(store.read(tmp_path / "out" / store.SAMPLES))
    plain = {(line["task"], line["sample"]): line["answer"] for line in lines if line["entry"] == "plain"}
    for row, name in zip(rows, ("q4@8", "q9@8"), strict=True):
        own = [line for line in lines if line["entry"] == name]
        assert row["tokens"] == pytest.approx(sum(count(line["kept"][0]) for line in own) / len(own))
        assert 1 <= row["least"] <= row["tokens"] <= row["most"] <= 8
        assert row["same"] == sum(line["answer"] == plain[line["task"], line["sample"]] for line in own) / len(own)
    assert rows[0]["tokens"] <= rows[1]["tokens"]
    text = "\n".join(enough.section(rows, "vtok eval ..."))
    assert "| 0.4 | " in text and "| 0.9 | " in text and "`vtok eval ...`" in text
    run("llava", tmp_path / "other", methods=["divprune"], keeps=[4], tasks=tasks.load("exists"), limit=2)
    with pytest.raises(VtokError, match=r"no row with auto; run vtok eval with -o NAME\.auto"):
        enough.measured(tmp_path / "other")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_committed_card_is_what_its_files_give(card: Path) -> None:
    name = card.name.removesuffix("-resampler")
    assert ordered.written(name, card, resamplers.folder(name)) == (card / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in resamplers.DATA.glob("*")))
def test_shipped_weights_belong_to_their_model(name: str) -> None:
    """The first tokens of a longer sequence are those of a shorter one, on real features, too."""
    model, processor = models.load(name)
    content = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    (scene,) = tasks.load("objects", limit=1)
    inputs = processor(images=[scene.picture(scene.samples[0].images[0])], text=[text], return_tensors="pt")
    kept, logits = [], []
    for keep in (5, 17):
        with vtok.compressed(model, "flextok", keep=keep, weights=name), torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
            kept.append(set(vtok.report(model).kept[0][0].tolist()))
    assert [len(own) for own in kept] == [5, 17]
    assert kept[0] < kept[1]
    assert not torch.equal(logits[0], logits[1])
