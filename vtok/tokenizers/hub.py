"""Reading the published FlexTok checkpoints (``EPFL-VILAB/flextok_d12_d12_in1k`` and its larger siblings).

Their weights are under Apple's Machine Learning Research Model licence, for research only: whoever downloads them
accepts it. Nothing of them comes with vtok.

A checkpoint is one safetensors file with a nested description of modules, beside it as ``config.json`` or inside it as
metadata. Shapes are read from the tensors, the rest from that description; a part that this tokenizer does not have is
an error, never left out silently.
"""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from vtok.errors import VtokError
from vtok.tokenizers.config import SAMPLERS, TokenizerConfig
from vtok.tokenizers.flextok import CONFIG, WEIGHTS, FlexTok, load_weights

logger = logging.getLogger("vtok")

_BLOCK = {
    "attn.wq": "attention.q",
    "attn.wk": "attention.k",
    "attn.wv": "attention.v",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.gate",
    "mlp.fc2": "mlp.down",
    "mlp.fc3": "mlp.up",
    "adaLN_modulation.1": "modulation",
}

#: published name, less ``.module_dict`` -> ours
_NAMES = {
    "encoder.enc_patch_emb.patch_proj": "encoder.patch",
    "encoder.enc_register_module.registers": "encoder.registers",
    "encoder.enc_posemb_module.posembs": "encoder.positions",
    "encoder.enc_to_latents.proj": "to_tokens",
    "decoder.dec_from_latents.proj": "decoder.read",
    "decoder.dec_registers_posemb_module.posembs": "decoder.register_positions",
    "decoder.dec_nested_dropout.dropout_mask_token": "decoder.dropout.mask",
    "decoder.dec_latent_dropout.nullcond": "decoder.null",
    "decoder.dec_noise_patch_emb.patch_proj": "decoder.patch",
    "decoder.dec_patches_posemb_module.posembs": "decoder.positions",
    "decoder.dec_time_embedder.mlp.0": "decoder.time.0",
    "decoder.dec_time_embedder.mlp.2": "decoder.time.2",
    "decoder.dec_to_patches.proj": "decoder.write",
    "decoder.dec_to_patches.adaLN_modulation.1": "decoder.modulation",
}

_PREFIX = re.compile(r"^(encoder|decoder)\.module_dict\.(enc|dec)_transformer\.blocks\.(\d+)\.(.+)\.weight$")
_PREFIX_BIAS = re.compile(r"^(decoder)\.module_dict\.(dec)_transformer\.blocks\.(\d+)\.(adaLN_modulation\.1)\.bias$")
_REPA = re.compile(r"^decoder\.module_dict\.dec_repa\w*\.(?:mlp\.([13])|(out_proj))\.(weight|bias)$")
_CHECKPOINTED = re.compile(r"_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.|_fpw_module\.")


def from_flextok(source: str | Path, *, vae: Any = None) -> FlexTok:
    """A published FlexTok model as a ``FlexTok``, in eval mode. Its weights' licence is yours to accept.

    Tokens are those of the VAE's mean latents; the authors' wrapper may sample latents, which makes tokens random.

    Args:
        source: a folder with ``model.safetensors`` and ``config.json``, one safetensors file with its config inside,
            or the id of a repository on the Hugging Face hub, which is then downloaded.
        vae: the VAE to use. By default the checkpoint's own, where ``diffusers`` is installed; without it the
            tokenizer has none, and reads and writes latents only (``encode_signal``, ``decode_signal``).

    Raises:
        VtokError: nothing there, a download that fails, or a model of another kind than the published ones.
    """
    file, description = _files(source)
    with safe_open(file, "pt") as opened:
        weights = {_CHECKPOINTED.sub("", key): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    own = {key.removeprefix("vae.vae."): weights.pop(key) for key in list(weights) if key.startswith("vae.")}
    config = _config(description, weights, _vae_settings(description, own))
    tokenizer = FlexTok(config, vae=vae if vae is not None else _vae(own, config.channels))
    load_weights(tokenizer, _renamed(weights, config), str(file))
    return tokenizer.eval()


def _files(source: str | Path) -> tuple[Path, Mapping[str, Any]]:
    path = Path(source)
    if path.is_file():
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
        return path, {key: _literal(value) for key, value in metadata.items()}
    if not path.is_dir():
        path = _download(str(source))
    for name in (WEIGHTS, CONFIG):
        if not (path / name).is_file():
            raise VtokError(f"{path} has no {name}; give the folder of a published FlexTok model")
    return path / WEIGHTS, json.loads((path / CONFIG).read_text())


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise VtokError(
            f"{name!r} is no folder, and as a model of the Hugging Face hub it cannot be had ({type(error).__name__}); "
            "give a folder, or check the id and the connection"
        ) from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _config(description: Mapping[str, Any], weights: Mapping[str, Tensor], vae: dict[str, Any]) -> TokenizerConfig:
    """Shapes from the tensors, settings from the description; whatever would compute something else is refused."""
    try:
        encoder, decoder = (description[name]["module_dict"] for name in ("encoder", "decoder"))
        levels = description["regularizer"]["levels"]
        tokens, width = weights["encoder.module_dict.enc_register_module.registers"].shape
        decoder_width = len(weights["decoder.module_dict.dec_from_latents.proj.weight"])
        grid = weights["encoder.module_dict.enc_posemb_module.posembs"].shape[-1]
        patch, channels = encoder["enc_patch_emb"]["patch_sizes"], encoder["enc_patch_emb"]["channels_in"]
        time, transformer = decoder["dec_time_embedder"], decoder["dec_transformer"]
        masks = encoder["enc_seq_packer"].get("mask_mode"), decoder["dec_seq_packer"].get("mask_mode", "full")
    except (KeyError, TypeError) as error:
        raise VtokError(f"this is no published FlexTok model: it lacks {error}; see docs/tokenizers.md") from error
    heads = {part.get("head_dim", 64) for part in (encoder["enc_transformer"], transformer)}
    refused = {
        "attention masks": masks != ("causal_last", "full"),
        "kinds of adaLN": transformer.get("adaLN_expansion", 1) != 2,
        "head widths": len(heads) != 1,
        "patches that are not square": len(set(patch)) != 1,
        "a width of time embeddings other than 256": time.get("frequency_embedding_size", 256) != 256,
    }
    for what, found in refused.items():
        if found:
            raise VtokError(f"this FlexTok model has {what} that vtok does not compute; published models do not")
    layers = transformer.get("intermediate_layers") or [1]
    repa = [len(value) for key, value in weights.items() if _REPA.match(key) and key.endswith("out_proj.weight")]
    sampler = decoder["dec_nested_dropout"].get("size_sampling_mode", "uniform")
    return TokenizerConfig(
        image_size=int(grid * patch[0] * vae["factor"]),
        patch=int(patch[0]),
        channels=int(channels),
        latents=True,
        vae_factor=vae["factor"],
        vae_scale=vae["scale"],
        tokens=tokens,
        width=width,
        depth=_depth(weights, "encoder.module_dict.enc_transformer.blocks."),
        decoder_width=decoder_width,
        decoder_depth=_depth(weights, "decoder.module_dict.dec_transformer.blocks."),
        head_dim=int(heads.pop()),
        anchors=False,
        levels=tuple(levels),
        decoder="flow",
        predicts="velocity",
        sampler=sampler if sampler in SAMPLERS else "uniform",
        null_rate=float(decoder["dec_latent_dropout"].get("dropout_prob", 0.0)),
        guidance=7.5,
        time_scale=1000.0 / float(time.get("max_timestep", 1000.0)),
        repa=repa[0] if repa else 0,
        repa_block=int(layers[0]),
    )


def _depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix))


def _renamed(weights: Mapping[str, Tensor], config: TokenizerConfig) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        name = _name(key)
        if name is None:
            raise VtokError(f"this FlexTok model has a part that vtok does not: {key}; published models do not")
        if name.endswith("positions"):
            value = _positions(value, config)
        renamed[name] = value
    return renamed


def _name(key: str) -> str | None:
    if match := _PREFIX.match(key):
        part = _BLOCK.get(match[4])
        return part and f"{match[1]}.blocks.{match[3]}.{part}.weight"
    if match := _PREFIX_BIAS.match(key):
        return f"{match[1]}.blocks.{match[3]}.modulation.bias"
    if match := _REPA.match(key):
        return f"alignment.mlp.{match[1] or 5}.{match[3]}"
    short = key.replace(".module_dict.", ".")
    if short in _NAMES:
        return _NAMES[short]
    stem, _, kind = short.rpartition(".")
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES and kind in ("weight", "bias") else None


def _positions(table: Tensor, config: TokenizerConfig) -> Tensor:
    """(N, width) of a published table: (1, width, rows, columns), or learned (axes, 1, width, length), summed."""
    if table.ndim == 4 and table.shape[0] == 2:
        table = table[0].unsqueeze(-1) + table[1].unsqueeze(-2)
    elif table.ndim == 4 and table.shape[1] == 1:
        return table[0, 0].T[: config.tokens].contiguous()
    return table[0, :, : config.grid, : config.grid].flatten(1).T.contiguous()


def _vae_settings(description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Pixels a latent, and what latents are multiplied by."""
    settings = description.get("vae") or {}
    blocks = {key.split(".")[2] for key in weights if key.startswith("encoder.down_blocks.")}
    scale = settings.get("scaling_factor")
    if scale is None and settings.get("hf_hub_path"):
        scale = _autoencoder().load_config(settings["hf_hub_path"]).get("scaling_factor")
    if scale is None:
        raise VtokError("this FlexTok model does not say how its latents are scaled; add vae.scaling_factor to config")
    return {"factor": 2 ** (len(blocks) - 1) if blocks else 8, "scale": float(scale)}


def _vae(weights: Mapping[str, Tensor], channels: int) -> Any:
    """The checkpoint's own VAE, its shapes read from its tensors."""
    if not weights:
        return None
    try:
        kind = _autoencoder()
    except VtokError as error:
        logger.warning("%s; until then the tokenizer reads and writes latents only", error)
        return None
    first = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    widths: list[int] = []
    while (key := first.format(len(widths))) in weights:
        widths.append(len(weights[key]))
    layers = {key.split(".")[4] for key in weights if key.startswith("encoder.down_blocks.0.resnets.")}
    vae = kind(
        latent_channels=channels,
        block_out_channels=tuple(widths),
        layers_per_block=len(layers),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    )
    vae.load_state_dict(weights)
    return vae.eval().requires_grad_(False)


def _autoencoder() -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise VtokError("this tokenizer's VAE is computed by diffusers; pip install diffusers") from error
    return AutoencoderKL
