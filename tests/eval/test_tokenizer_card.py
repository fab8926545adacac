"""Cards of image tokenizers: made from a finished training, and what the committed ones say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vtok.errors import VtokError
from vtok.tokenizers import FlexTok, preset
from vtok.tokenizers.data import find
from vtok.tokenizers.metrics import psnr
from vtok.tokenizers.train import Recipe, assess, train, views
from vtok_eval.models import tokenizer_card
from vtok_eval.models.tokenizers import folder
from vtok_eval.train.tokenizer import halve_decoder

CARDS = sorted((Path(__file__).parents[2] / "model_cards").glob("*-tokenizer"))


@pytest.mark.grad
def test_a_card_of_a_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(VtokError, match=r"holds no finished training \(report.json is missing\)"):
        tokenizer_card.command("test", run=run, out=tmp_path / "cards")
    tokenizer = train(preset("test"), find("scenes", "train", seed=0), run, Recipe(steps=3, batch=2))
    report = assess(tokenizer, [find("scenes", "held-out", seed=0)], run, limit=6, shown=2)
    tokenizer_card.command("test", run=run, out=tmp_path / "cards")
    card = tmp_path / "cards" / "test-tokenizer"
    text = (card / "README.md").read_text()
    assert text == tokenizer_card.written("test", card)
    for row in report["scenes"]["curve"]["rows"]:
        assert f"| {row['k']} | {row['psnr']:.2f} | {row['ssim']:.3f} |" in text
    assert f"{report['scenes']['statistics']['used']:,} codes in 48 tokens" in text
    assert ("rises with every doubling" in text) == report["scenes"]["curve"]["rises"]
    for name in ("quality.png", "scenes.png"):
        assert f"({name})" in text
        assert Image.open(card / name).width > 200


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_committed_card_is_what_its_files_give(card: Path) -> None:
    assert tokenizer_card.written(card.name.removesuffix("-tokenizer"), card) == (card / "README.md").read_text()


def test_a_decoder_in_half_precision_leaves_the_tokens_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = FlexTok.preset("test", decoder="flow").eval()
    folder = old.save_pretrained(tmp_path / "tokenizer")
    before = (folder / "model.safetensors").stat().st_size
    halve_decoder(folder)
    new = FlexTok.from_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size < 0.8 * before
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(new.encode(images), old.encode(images))
    assert all(value.dtype == torch.float32 for value in new.state_dict().values() if value.is_floating_point())
    torch.testing.assert_close(new.decode(new.encode(images)), old.decode(old.encode(images)), atol=0.02, rtol=0)
    with torch.no_grad():
        old.decoder.read.weight[0, 0] = 1e6
    with pytest.raises(VtokError, match="half precision cannot hold"):
        halve_decoder(old.save_pretrained(tmp_path / "large"))


def test_the_shipped_flow_reads_the_tokens_of_the_shipped_regression() -> None:
    regress, flow = (FlexTok.from_pretrained(folder(name)) for name in ("nano", "nano-flow"))
    images, _ = views(find("scenes", "held-out", seed=0), 64, 16)
    tokens = regress.encode(images[0])
    assert torch.equal(flow.encode(images[0]), tokens)
    drawn = flow.decode(tokens)
    # a sample of its own tokens is nearer to the picture than one of the next picture's
    assert psnr(drawn, images[0]).mean() > psnr(flow.decode(tokens.roll(1, 0)), images[0]).mean() + 3
    sharp, blurred = (x.diff(dim=-1).abs().mean() for x in (drawn, regress.decode(tokens)))
    assert sharp > blurred
