"""Reading published FlexTok checkpoints: their names and settings, written here for a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vtok.errors import VtokError
from vtok.tokenizers import FlexTok, from_flextok, hub
from vtok.tokenizers.blocks import grid_points, sincos2d

K, GRID = 8, 4


def make() -> FlexTok:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "decoder": "flow",
        "predicts": "velocity",
        "anchors": False,
        "sampler": "uniform",
        "guidance": 7.5,
    }
    options |= {"latents": True, "channels": 4, "patch": 2, "image_size": 64, "vae_scale": 0.7, "decoder_width": 96}
    tokenizer = FlexTok.preset("test", repa=24, head_dim=32, depth=3, levels=(4, 3), **options)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.normal_(std=0.3)
    return tokenizer.eval()


def published(tokenizer: FlexTok) -> dict[str, Tensor]:
    """The state dict under published names and shapes."""
    parts = {ours: theirs for theirs, ours in hub._NAMES.items()}
    block = {ours: theirs for theirs, ours in hub._BLOCK.items()}
    found = {}
    for key, value in tokenizer.state_dict().items():
        if key.endswith("register_positions"):
            value = value.T[None, None]
        elif key.endswith("positions"):
            value = value.T.reshape(1, -1, GRID, GRID)
        if ".blocks." in key:
            side, _, number, rest = key.split(".", 3)
            part, kind = rest.rsplit(".", 1)
            short = side[:3]
            found[f"{side}.module_dict.{short}_transformer.blocks.{number}.{block[part]}.{kind}"] = value
        elif key.startswith("alignment"):
            _, _, number, kind = key.split(".")
            name = f"mlp.{number}" if number != "5" else "out_proj"
            found[f"decoder.module_dict.dec_repa_head.{name}.{kind}"] = value
        else:
            stem, kind = (key, "") if key in parts else key.rsplit(".", 1)
            side, rest = parts[stem].split(".", 1)
            found[f"{side}.module_dict.{rest}" + (f".{kind}" if kind else "")] = value
    return {key: value.contiguous() for key, value in found.items()}


def description() -> dict[str, Any]:
    return {
        "encoder": {
            "module_dict": {
                "enc_patch_emb": {"channels_in": 4, "patch_sizes": [2, 2]},
                "enc_seq_packer": {"mask_mode": "causal_last"},
                "enc_transformer": {"head_dim": 32},
            }
        },
        "decoder": {
            "module_dict": {
                "dec_nested_dropout": {"size_sampling_mode": "uniform"},
                "dec_latent_dropout": {"dropout_prob": 0.1},
                "dec_seq_packer": {"mask_mode": "full"},
                "dec_time_embedder": {"max_timestep": 1.0},
                "dec_transformer": {"head_dim": 32, "adaLN_expansion": 2, "intermediate_layers": [1]},
            }
        },
        "regularizer": {"levels": [4, 3]},
        "vae": {"scaling_factor": 0.7},
    }


def write(folder: Path, weights: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def equal(tokenizer: FlexTok, loaded: FlexTok) -> bool:
    mine, theirs = tokenizer.state_dict(), loaded.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_folder_is_read(tmp_path: Path) -> None:
    tokenizer = make()
    loaded = from_flextok(write(tmp_path, published(tokenizer), description()))
    assert loaded.config == tokenizer.config
    assert equal(tokenizer, loaded) and not loaded.training
    latents = torch.randn(2, 4, 8, 8)
    tokens = loaded.encode_signal(latents)
    assert torch.equal(tokens, tokenizer.encode_signal(latents))
    assert torch.equal(loaded.decode_signal(tokens, steps=2), tokenizer.decode_signal(tokens, steps=2))


def test_a_single_file_with_its_config_inside_is_read(tmp_path: Path) -> None:
    tokenizer, file = make(), tmp_path / "one.safetensors"
    save_file(published(tokenizer), file, {key: str(value) for key, value in description().items()})
    assert equal(tokenizer, from_flextok(file))


def test_names_of_wrapped_blocks_and_learned_grids_are_read(tmp_path: Path) -> None:
    tokenizer, weights = make(), published(make())
    wrapped = {key.replace(".attn.", "._checkpoint_wrapped_module.attn."): value for key, value in weights.items()}
    rows, columns = torch.randn(1, 96, GRID), torch.randn(1, 96, GRID)
    wrapped["decoder.module_dict.dec_patches_posemb_module.posembs"] = torch.stack([rows, columns])
    loaded = from_flextok(write(tmp_path, wrapped, description()))
    expected = (rows[0, :, :, None] + columns[0, :, None, :]).flatten(1).T
    torch.testing.assert_close(loaded.decoder.positions, expected)
    assert torch.equal(loaded.encoder.positions, tokenizer.encoder.positions)


def test_positions_of_published_models_are_ours() -> None:
    """A table (1, width, rows, columns) whose first half varies with the row, sines before cosines."""
    width = 16
    table = sincos2d(grid_points(GRID, GRID), width).T.reshape(width, GRID, GRID)
    rate = 10000.0 ** (-torch.arange(4) / 4)
    for row in range(GRID):
        for column in range(GRID):
            expected = torch.cat([(row * rate).sin(), (row * rate).cos(), (column * rate).sin(), (column * rate).cos()])
            torch.testing.assert_close(table[:, row, column], expected)


def test_without_diffusers_latents_still_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> Any:
        raise VtokError("pip install diffusers")

    weights = published(make()) | {"vae.vae.encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(8, 8, 3, 3)}
    for number in range(1, 4):
        weights[f"vae.vae.encoder.down_blocks.{number}.resnets.0.conv1.weight"] = torch.zeros(8, 8, 3, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "_autoencoder", missing)
        loaded = from_flextok(write(tmp_path, weights, description()))
    assert loaded.vae is None and "diffusers" in caplog.text
    assert loaded.encode_signal(torch.randn(1, 4, 8, 8)).shape == (1, K)
    with pytest.raises(VtokError, match="AutoencoderKL"):
        loaded.encode(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("encoder.module_dict.enc_seq_packer.mask_mode", "causal", "masks"),
        ("decoder.module_dict.dec_transformer.adaLN_expansion", 1, "adaLN"),
        ("decoder.module_dict.dec_transformer.head_dim", 48, "head widths"),
        ("encoder.module_dict.enc_patch_emb.patch_sizes", [2, 4], "square"),
        ("decoder.module_dict.dec_time_embedder.frequency_embedding_size", 128, "256"),
        ("vae.scaling_factor", None, "scaling_factor"),
        ("regularizer", {}, "lacks 'levels'"),
    ],
)
def test_what_would_compute_something_else_is_refused(tmp_path: Path, path: str, value: Any, says: str) -> None:
    settings: dict[str, Any] = description()
    *parents, last = path.split(".")
    place = settings
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises(VtokError, match=says):
        from_flextok(write(tmp_path, published(make()), settings))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    weights = published(make())
    with pytest.raises(VtokError, match="mystery"):
        from_flextok(write(tmp_path, weights | {"encoder.module_dict.mystery.weight": torch.zeros(2)}, description()))
    weights.pop("decoder.module_dict.dec_latent_dropout.nullcond")
    with pytest.raises(VtokError, match="does not fit"):
        from_flextok(write(tmp_path, weights, description()))


def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VtokError, match="no model"):
        from_flextok(tmp_path)
    with pytest.raises(VtokError, match="hub"):
        from_flextok("not/a/hub/id")

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(VtokError, match="connection"):
        from_flextok("EPFL-VILAB/flextok_d12_d12_in1k")
