"""Weights of resamplers: saved beside their configuration, found by folder or name, checked against a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtok.errors import VtokError
from vtok.resampler.config import ResamplerConfig
from vtok.resampler.resampler import OrderedResampler

#: installed packages ship trained resamplers under this group: a function from the entry's name to the folder
GROUP = "vtok.resamplers"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
#: numbers of a fingerprint
MARKS = 64


def save(resampler: OrderedResampler, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write ``config.json`` and ``model.safetensors``; returns the folder, made where missing.

    Args:
        resampler: what to save; ``load`` gives it back bit by bit where no ``dtype`` is given.
        folder: made where missing.
        dtype: of what was trained, smaller to ship; a channel's mean and spread stay in fp32, and so does the head that
            picks tokens: rounded, it would pick others.

    Raises:
        VtokError: ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise VtokError(f"{folder} is a file; a resampler needs the name of a folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(resampler.config.to_json(), encoding="utf-8")
    trained = {key for key, _ in resampler.named_parameters() if not key.startswith("saliency.")}
    tensors = {
        key: value.detach().to("cpu", dtype if key in trained and dtype else value.dtype, copy=True).contiguous()
        for key, value in resampler.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS)
    return folder


def load(source: str | Path) -> OrderedResampler:
    """The resampler of a folder or a name, in fp32, eval mode, frozen.

    Raises:
        VtokError: no such folder or name, a file that is missing or damaged, or weights that do not fit their
            configuration.
    """
    folder = find(source)
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VtokError(f"{folder / CONFIG} cannot be read ({error}); distil the resampler again") from error
    if not isinstance(fields, dict):
        raise VtokError(f"{folder / CONFIG} is no resampler's configuration; take what vtok tokenizer distill wrote")
    resampler = OrderedResampler(ResamplerConfig.of(fields))
    try:
        resampler.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise VtokError(f"{folder / WEIGHTS} cannot be loaded ({_first(error)}); distil the resampler again") from error
    return resampler.eval().requires_grad_(False)


def find(source: str | Path) -> Path:
    """The folder of a resampler that is given by its path or by the name that an installed package ships it under.

    Raises:
        VtokError: neither.
    """
    folder = Path(source)
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return folder
    named = names()
    if str(source) in named:
        found = Path(named[str(source)].load()(str(source)))
        if (found / CONFIG).is_file() and (found / WEIGHTS).is_file():
            return found
        raise VtokError(
            f"this copy of vtok came without the resampler {source}; train it: python -m vtok_eval.train "
            f"{source}-resampler, or leave weights out for plain pooling"
        )
    if folder.is_dir():
        raise VtokError(f"{folder} holds no resampler ({CONFIG}, {WEIGHTS}); take what vtok tokenizer distill wrote")
    raise VtokError(
        f"there is no resampler {str(source)!r}: no such folder, and no such name; known names are "
        f"{', '.join(sorted(named)) or 'none'}; vtok tokenizer distill trains one"
    )


def digest(resampler: OrderedResampler) -> str:
    """Twelve letters that tell these weights from others."""
    found = hashlib.sha256(resampler.config.to_json().encode())
    for value in resampler.state_dict().values():
        found.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def names() -> dict[str, Any]:
    """Entry points of the resamplers that installed packages ship, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


@dataclasses.dataclass(frozen=True)
class Door:
    """Where resampled tokens enter a model.

    Attributes:
        family: of the model.
        dim: channels of its visual tokens there.
        fingerprint: numbers of the module there; empty where its weights cannot be read (quantised, offloaded).
        device: of that module.
    """

    family: str
    dim: int
    fingerprint: tuple[float, ...]
    device: torch.device


def door(adapter: Any) -> Door:
    """Before LLaVA's projector, after Qwen's merger."""
    packed = adapter.tower.packed
    module = adapter.tower.mergers[0] if packed else adapter.tower.projector
    vision = adapter.base.config.vision_config
    dim = adapter.text.config.hidden_size if packed else _tower_width(adapter, vision)
    weight = max(module.parameters(), key=lambda p: p.numel())
    return Door(adapter.family, int(dim), _marks(weight), weight.device)


def _tower_width(adapter: Any, vision: Any) -> int:
    chosen = adapter.base.config.vision_feature_layer
    return vision.hidden_size * (len(chosen) if isinstance(chosen, (list, tuple)) else 1)


def _marks(weight: Tensor) -> tuple[float, ...]:
    if weight.is_meta or not weight.is_floating_point():
        return ()
    flat = weight.detach().flatten()
    where = torch.linspace(0, flat.numel() - 1, MARKS, dtype=torch.float64).long().to(flat.device)
    return tuple(float(f"{value:.4g}") for value in flat[where].float().tolist())


def check(config: ResamplerConfig, door: Door, source: str = "these weights") -> None:
    """That a resampler belongs to a model.

    Raises:
        VtokError: another family, other channels, or another model of the same size. A fine-tuned model still passes.
    """
    advice = "distil one for this model: vtok tokenizer distill"
    if config.family and config.family != door.family:
        raise VtokError(f"{source} belong to a {config.family} model, and this is a {door.family}; {advice}")
    if config.dim != door.dim:
        raise VtokError(
            f"{source} are for visual tokens of {config.dim} channels, and this model's have {door.dim}; {advice}"
        )
    if config.fingerprint and door.fingerprint:
        own, other = torch.tensor(config.fingerprint), torch.tensor(door.fingerprint)
        # 64 numbers of unrelated matrices: |cosine| is 0.1 or so; of a fine-tuned copy, above 0.99
        if torch.cosine_similarity(own, other, dim=0) < 0.8:
            raise VtokError(f"{source} were distilled from another model of the same size; {advice}")


def made_for(config: ResamplerConfig, door: Door) -> ResamplerConfig:
    """A configuration that remembers its model."""
    return dataclasses.replace(config, family=door.family, dim=door.dim, fingerprint=door.fingerprint)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
