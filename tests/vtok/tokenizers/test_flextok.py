"""The tokenizer end to end: shapes, prefixes, options, files, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from vtok.errors import VtokError
from vtok.tokenizers import PRESETS, FlexTok, TokenizerConfig, anchors, objective, preset

UNORDERED: dict[str, Any] = {"ordered": False, "anchors": False, "sampler": "none"}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flow": {"decoder": "flow"},
    "faithful": {"decoder": "flow", "anchors": False, "sampler": "uniform", "predicts": "velocity"},
    "vq": {"quantiser": "vq", "codebook": 64},
    "binary": {"quantiser": "binary", "bits": 10},
    "kl": {"quantiser": "kl"},
    "none": {"quantiser": "none"},
    "unordered": UNORDERED,
    "padding": {"padding": 3},
    "haar": {"scheme": "haar"},
    "repa": {"repa": 24, "hierarchy": 0.5},
    "repa-flow": {"repa": 24, "decoder": "flow"},
    "halting": {"halting": True},
    "halting-flow": {"halting": True, "decoder": "flow"},
}


def make(**changes: Any) -> FlexTok:
    torch.manual_seed(0)
    tokenizer = FlexTok.preset("test", **changes)
    with torch.no_grad():  # what starts at zero would make tests blind
        for parameter in tokenizer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return tokenizer


def images(batch: int = 3, size: int = 32) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


def features(tokenizer: FlexTok, batch: int = 3) -> Tensor | None:
    return torch.randn(batch, tokenizer.config.repa, 5, 6) if tokenizer.config.repa else None


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_every_parameter(name: str) -> None:
    tokenizer = make(**OPTIONS[name])
    losses = tokenizer.losses(images(), torch.Generator().manual_seed(1), features=features(tokenizer))
    losses["loss"].backward()
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    still = [key for key, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    # in one step some samples keep everything (no mask token), or none is without condition (no null)
    assert set(still) <= {"decoder.dropout.mask", "decoder.null"}, still


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_follow_the_generator_alone(name: str) -> None:
    tokenizer, given = make(**OPTIONS[name]).eval(), images()
    extra = features(tokenizer)
    first, second = (tokenizer.losses(given, torch.Generator().manual_seed(5), features=extra) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "unordered"])
def test_a_prefix_is_a_shorter_run(name: str) -> None:
    tokenizer, given = make(**OPTIONS[name]), images()
    whole = tokenizer.embed(given)
    assert whole.shape == (3, 8, tokenizer.quantiser.inputs)
    for k in (1, 3, 8):
        torch.testing.assert_close(tokenizer.embed(given, k), whole[:, :k], atol=1e-5, rtol=0)
        assert tokenizer.encode(given, k).shape[:2] == (3, k)


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_decode_whatever_the_length_and_the_batch(name: str) -> None:
    tokenizer = make(**OPTIONS[name])
    tokens = tokenizer.encode(images())
    assert (tokens.dtype == torch.long) == (tokenizer.codes is not None)
    lengths = [8, 8, 8] if name == "unordered" else [1, 5, 8]
    mixed = tokenizer.decode([row[:k] for row, k in zip(tokens, lengths, strict=True)], steps=3)
    assert mixed.shape == (3, 3, 32, 32) and mixed.min() >= 0 and mixed.max() <= 1
    for row, k, picture in zip(tokens, lengths, mixed, strict=True):
        alone = tokenizer.decode(row[None, :k], steps=3)[0]
        torch.testing.assert_close(alone, picture, atol=1e-5, rtol=0)


def test_longer_prefixes_change_the_picture() -> None:
    tokenizer = make()
    tokens = tokenizer.encode(images())
    pictures = [tokenizer.decode(tokens[:, :k]) for k in (1, 2, 4, 8)]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(pictures))


def test_encoding_needs_no_mode_and_leaves_it() -> None:
    for name in ("vq", "binary", "kl"):
        tokenizer, given = make(**OPTIONS[name]), images()
        state = {key: value.clone() for key, value in tokenizer.state_dict().items()}
        assert torch.equal(tokenizer.train().encode(given), tokenizer.eval().encode(given))
        assert all(torch.equal(value, state[key]) for key, value in tokenizer.state_dict().items())


def test_seed_and_steps_of_a_flow() -> None:
    tokenizer = make(decoder="flow")
    tokens = tokenizer.encode(images())
    first = tokenizer.decode(tokens, steps=2)
    assert torch.equal(first, tokenizer.decode(tokens, steps=2, seed=0))
    assert not torch.equal(first, tokenizer.decode(tokens, steps=2, seed=1))
    assert not torch.equal(first, tokenizer.decode(tokens, steps=3))
    assert not torch.equal(first, tokenizer.decode(tokens, steps=2, guidance=4.0))


def test_registers_are_causal_and_unordered_ones_are_not() -> None:
    for ordered in (True, False):
        tokenizer = make(**({} if ordered else UNORDERED))
        before = tokenizer.embed(images())
        with torch.no_grad():
            tokenizer.encoder.registers[5] += torch.randn(64)
        changed = (tokenizer.embed(images()) - before).abs().amax((0, 2)) > 1e-6
        assert changed[5:].all()
        assert changed[:5].any() != ordered


def test_anchored_registers_start_as_averages_over_their_boxes() -> None:
    tokenizer = make()
    encoder = tokenizer.encoder
    weights = anchors.pooling(anchors.boxes(8), 4, 4)
    torch.testing.assert_close(encoder.pooling, weights)
    torch.testing.assert_close(encoder.pooling.sum(-1), torch.ones(8))
    # the third level is the grid itself: its boxes stand where patches do
    first = encoder.pooling[5].argmax()
    torch.testing.assert_close(encoder.places[5], encoder.positions[first])


def test_padding_serves_training_only() -> None:
    tokenizer = make(padding=3)
    assert torch.equal(tokenizer.encoder.registers[7:], tokenizer.encoder.registers[7].expand(4, -1))
    assert tokenizer.encode(images()).shape == (3, 8)
    with pytest.raises(VtokError, match="from 1 to 8"):
        tokenizer.encode(images(), 9)
    drawn = torch.stack(
        [objective.draw_keep(tokenizer.config, 64, torch.Generator().manual_seed(seed)) for seed in range(40)]
    )
    assert set(drawn.unique().tolist()) == {1, 2, 4, 8, 9, 10, 11}
    assert (drawn >= 8).float().mean() == pytest.approx(0.5, abs=0.05)


def test_hierarchy_aligns_short_prefixes_more() -> None:
    tokenizer, extra = make(repa=24, hierarchy=1.0), torch.randn(1, 24, 4, 4)
    patches = torch.randn(1, 16, 64)
    full, half, none = (objective.aligned(tokenizer, patches, extra, torch.tensor([k])) for k in (1, 5, 8))
    torch.testing.assert_close(half, full * (1 - 4 / 7))
    assert none == 0


def test_auto_gives_each_picture_its_own_length() -> None:
    tokenizer = make(halting=True)
    found = tokenizer.encode(images(), "auto", quality=0.05)
    whole = tokenizer.encode(images())
    assert all(torch.equal(row, every[: len(row)]) for row, every in zip(found, whole, strict=True))
    assert tokenizer.decode(found).shape == (3, 3, 32, 32)


@pytest.mark.parametrize("name", ["plain", "repa-flow", "vq", "halting", "padding"])
def test_files_give_the_same_tokenizer(name: str, tmp_path: Any) -> None:
    tokenizer = make(**OPTIONS[name]).eval()
    loaded = FlexTok.from_pretrained(tokenizer.save_pretrained(tmp_path / "a" / "b"))
    assert loaded.config == tokenizer.config and not loaded.training
    mine, theirs = tokenizer.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    tokens = tokenizer.encode(images())
    assert torch.equal(tokens, loaded.encode(images()))
    assert torch.equal(tokenizer.decode(tokens, steps=2), loaded.decode(tokens, steps=2))


def test_bfloat16() -> None:
    for decoder in ("regress", "flow"):
        tokenizer = make(decoder=decoder).to(torch.bfloat16)
        pictures = tokenizer.decode(tokenizer.encode(images()), steps=2)
        assert pictures.dtype == torch.float32 and pictures.isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            losses = make(decoder=decoder, halting=True).losses(images(), torch.Generator())
        losses["loss"].backward()


def test_parameter_counts_are_the_published_ones() -> None:
    """Encoder blocks have 12 D^2, decoder blocks 24 D^2: half of those modulate patches and registers apart."""
    for name, (width, depth, decoder_width, decoder_depth) in {
        "d12-d12": (768, 12, 768, 12),
        "d18-d18": (1152, 18, 1152, 18),
        "d18-d28": (1152, 18, 1792, 28),
    }.items():
        with torch.device("meta"):
            tokenizer = FlexTok.preset(name)
        count = sum(p.numel() for p in tokenizer.encoder.blocks.parameters())
        assert count == pytest.approx(12 * depth * width**2, rel=0.002)
        count = sum(p.numel() for p in tokenizer.decoder.blocks.parameters())
        assert count == pytest.approx(24 * decoder_depth * decoder_width**2, rel=0.002)
        assert tokenizer.codes == 64000
        assert tokenizer.encoder.positions.shape == (256, width)
        assert tokenizer.decoder.register_positions.shape == (256, decoder_width)
        assert tokenizer.config.signal_size == 32


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_shapes(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        tokenizer = FlexTok(config)
        signal = torch.empty(1, config.channels, config.signal_size, config.signal_size)
        registers = tokenizer.encoder(signal, 3)
    assert registers.shape == (1, 3, config.width)
    assert config.anchors == (not name.startswith("d"))
    assert TokenizerConfig.from_json(config.to_json()) == config


class Halves(torch.nn.Module):
    """A stand-in for diffusers' AutoencoderKL: 16 channels of 8 x 8 averages."""

    def encode(self, x: Tensor) -> Any:
        latents = torch.nn.functional.avg_pool2d(x, 8).repeat(1, 6, 1, 1)[:, :16]
        distribution = type("Distribution", (), {"mode": lambda self: latents})()
        return type("Output", (), {"latent_dist": distribution})()

    def decode(self, z: Tensor) -> Any:
        return type("Output", (), {"sample": torch.nn.functional.interpolate(z[:, :3], scale_factor=8)})()


def test_latents_of_a_vae() -> None:
    options: dict[str, Any] = {"image_size": 64, "latents": True, "channels": 16, "patch": 2, "vae_scale": 0.5}
    tokenizer = make(**options)
    with pytest.raises(VtokError, match="AutoencoderKL"):
        tokenizer.encode(images(size=64))
    tokenizer.vae = Halves()
    signal = tokenizer.to_signal(images(size=64))
    assert signal.shape == (3, 16, 8, 8)
    back = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(images(size=64), 8), scale_factor=8)
    torch.testing.assert_close(tokenizer.to_images(signal), back)
    tokens = tokenizer.encode(images(size=64), 4)
    assert torch.equal(tokens, tokenizer.encode_signal(signal, 4))
    assert tokenizer.decode(tokens).shape == (3, 3, 64, 64)
    assert not any(key.startswith("_vae") or "vae" in key for key in tokenizer.state_dict())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"k": 0}, "from 1 to 8"),
        ({"k": 9}, "from 1 to 8"),
        ({"k": 2.0}, "from 1 to 8"),
        ({"k": True}, "from 1 to 8"),
        ({"k": "auto"}, "halting"),
        ({"images": torch.rand(1, 3, 32, 31)}, "resize"),
        ({"images": torch.rand(3, 32, 32)}, "resize"),
        ({"images": torch.rand(1, 1, 32, 32)}, "resize"),
        ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "255"),
    ],
)
def test_what_cannot_be_encoded(given: dict[str, Any], says: str) -> None:
    with pytest.raises(VtokError, match=says):
        make().encode(**{"images": images()} | given)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (torch.zeros(2, 9, dtype=torch.long), "from 1 to 8"),
        (torch.zeros(2, 0, dtype=torch.long), "from 1 to 8"),
        (torch.zeros(4, dtype=torch.long), "do not fit"),
        (torch.zeros(2, 3, 6), "do not fit"),
        (torch.zeros(2, 3), "whole numbers"),
        (torch.full((2, 3), 64000), "0 to 63999"),
        (torch.full((2, 3), -1), "0 to 63999"),
        ([], "list"),
        ([torch.zeros(3, dtype=torch.long), torch.zeros(9, dtype=torch.long)], "from 1 to 8"),
    ],
)
def test_what_cannot_be_decoded(tokens: Any, says: str) -> None:
    with pytest.raises(VtokError, match=says):
        make().decode(tokens)


def test_other_errors(tmp_path: Any) -> None:
    with pytest.raises(VtokError, match="unordered"):
        make(**UNORDERED).encode(images(), 3)
    with pytest.raises(VtokError, match="do not fit"):
        make(quantiser="none").decode(torch.zeros(1, 3, 5))
    with pytest.raises(VtokError, match="REPA head"):
        make().losses(images(), features=torch.rand(3, 24, 4, 4))
    with pytest.raises(VtokError, match="24"):
        make(repa=24).losses(images(), features=torch.rand(3, 23, 4, 4))
    with pytest.raises(VtokError, match="positive"):
        make(halting=True).encode(images(), "auto", quality=0)
    with pytest.raises(VtokError, match="steps"):
        make(decoder="flow").decode(torch.zeros(1, 2, dtype=torch.long), steps=0)
    with pytest.raises(VtokError, match=r"config\.json"):
        FlexTok.from_pretrained(tmp_path / "none")
    folder = make().save_pretrained(tmp_path / "one")
    (folder / "config.json").write_text(preset("test", width=96).to_json())
    with pytest.raises(VtokError, match="does not fit"):
        FlexTok.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(VtokError, match="JSON"):
        FlexTok.from_pretrained(folder)
    with pytest.raises(VtokError, match="folder"):
        make().save_pretrained(folder / "config.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": 0}, "tokens"),
        ({"width": 65}, "head_dim"),
        ({"patch": 7}, "tile"),
        ({"quantiser": "rvq"}, "quantiser"),
        ({"decoder": "gan"}, "decoder"),
        ({"sampler": "zipf"}, "sampler"),
        ({"scheme": "peano"}, "scheme"),
        ({"predicts": "noise"}, "predicts"),
        ({"levels": (8, 2)}, "levels"),
        ({"levels": ()}, "levels"),
        ({"bits": 63}, "bits"),
        ({"null_rate": 1.5}, "null_rate"),
        ({"hierarchy": -0.1}, "hierarchy"),
        ({"hierarchy": 0.5}, "repa"),
        ({"repa": 8, "repa_block": 2}, "repa_block"),
        ({"ordered": False}, "unordered"),
        ({"halting_weight": -1.0}, "halting_weight"),
        ({"latents": True, "image_size": 36}, "vae_factor"),
        ({"nonsense": 1}, "no option nonsense"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(VtokError, match=says):
        preset("test", **changes)


def test_unknown_preset() -> None:
    with pytest.raises(VtokError, match="d18-d28"):
        FlexTok.preset("huge")
