"""FlexTok against numbers of the authors' code on the same weights (tests/data/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vtok.tokenizers import FlexTok, Guidance, from_flextok
from vtok.tokenizers.blocks import grid_points, sincos2d

from .test_hub import description

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data" / "flextok.json").read_text())


def wave(shift: float) -> Tensor:
    i = torch.arange(2 * 4 * 8 * 8, dtype=torch.float64)
    x = torch.sin(shift + 0.7 * i + 0.013 * i * i / 8) + 0.5 * torch.cos(2.3 * i + shift)
    return x.reshape(2, 4, 8, 8).float()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FlexTok:
    weights = {}
    for number, (key, shape) in enumerate(zip(GOLDEN["keys"], GOLDEN["shapes"], strict=True)):
        i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        gain = 2.5 / shape[-1] ** 0.5 if len(shape) == 2 and "registers" not in key else 0.5
        weights[key] = (gain * torch.sin(1 + 12.9898 * i + 78.233 * number)).reshape(shape).float()
    for side, part, width in (("encoder", "enc_posemb_module", 64), ("decoder", "dec_patches_posemb_module", 96)):
        table = sincos2d(grid_points(4, 4), width).T.reshape(1, width, 4, 4).contiguous()
        weights[f"{side}.module_dict.{part}.posembs"] = table
    folder = tmp_path_factory.mktemp("flextok")
    save_file(weights, folder / "model.safetensors")
    settings = description() | {"regularizer": {"levels": GOLDEN["recipe"]["shapes"]["levels"]}}
    (folder / "config.json").write_text(json.dumps(settings))
    return from_flextok(folder)


def probed(x: Tensor) -> Tensor:
    return x.flatten()[::5]


def test_tokens_are_the_authors(tokenizer: FlexTok) -> None:
    assert tokenizer.encode_signal(wave(0.3)).tolist() == GOLDEN["tokens"]
    found = tokenizer.embed_signal(wave(0.3)).detach().flatten()
    torch.testing.assert_close(found, torch.tensor(GOLDEN["registers"]), atol=1e-4, rtol=0)


def test_velocities_are_the_authors(tokenizer: FlexTok) -> None:
    values = tokenizer.quantiser.embed(torch.tensor(GOLDEN["tokens"]))
    registers = tokenizer.decoder.registers(values, torch.tensor(GOLDEN["recipe"]["lengths"]))
    found, _ = tokenizer.decoder(wave(1.9), torch.tensor(GOLDEN["recipe"]["times"]), registers)
    torch.testing.assert_close(probed(found.detach()), torch.tensor(GOLDEN["velocity"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GOLDEN["latents"])
def test_sampled_latents_are_the_authors(tokenizer: FlexTok, name: str) -> None:
    recipe = GOLDEN["recipe"]
    tokens = [torch.tensor(row[:k]) for row, k in zip(GOLDEN["tokens"], recipe["lengths"], strict=True)]
    guidance = Guidance(recipe["guidance"][name], adaptive=name == "apg")
    found = tokenizer.decode_signal(tokens, steps=recipe["steps"], guidance=guidance, noise=wave(1.9))
    torch.testing.assert_close(probed(found), torch.tensor(GOLDEN["latents"][name]), atol=1e-4, rtol=0)
