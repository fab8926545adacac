"""A Hugging Face folder of a compressed model: plain weights, processor, settings, and a shim for the auto classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtok.api import session_of
from vtok.errors import VtokError
from vtok.io import SHIM, load, plain, plain_saver, save

#: class names of transformers that the shim answers for -> where they are found
AUTO_MAP = {"AutoModelForImageTextToText": f"{SHIM}.VtokForImageTextToText"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARD = "5GB"


def write(model: nn.Module, folder: str | Path, *, processor: Any = None, precision: str | None = None) -> str:
    """Write a compressed model so that transformers and ``vtok.load`` load it compressed.

    Parameters
    ----------
    model : nn.Module
        A model under ``vtok.compress``.
    folder : str or Path
        Made where missing.
    processor : ProcessorMixin, optional
        Saved beside the weights.
    precision : str, optional
        ``"fp32"``, ``"fp16"`` or ``"bf16"``: of the weights in the file. The model's own without it.

    Returns
    -------
    str
        The precision of the weights.

    Raises
    ------
    VtokError
        The model is not compressed or of no class that the auto class knows; a precision that files do not have.
    """
    check(model, precision)
    session = session_of(model)
    own: torch.dtype = next(model.parameters()).dtype
    dtype = own if precision is None else DTYPES[precision]
    folder = Path(folder)
    save(model, folder, weights=False)
    state = None if dtype is own else _cast(model.state_dict(), dtype)
    plain_saver(session, model)(folder, max_shard_size=SHARD, **({} if state is None else {"state_dict": state}))
    if processor is not None:
        processor.save_pretrained(folder)
    _mark(folder / "config.json", str(dtype).removeprefix("torch."))
    shim = Path(__file__).with_name(f"{SHIM}.py")
    (folder / shim.name).write_text(shim.read_text(encoding="utf-8"), encoding="utf-8")
    return next(name for name, known in DTYPES.items() if known is dtype)


def check(model: nn.Module, precision: str | None) -> None:
    """Refuse what ``write`` would, before it starts.

    Raises
    ------
    VtokError
        The model is not compressed or of no class that the auto class knows; a precision that files do not have.
    """
    if precision is not None and precision not in DTYPES:
        raise VtokError(
            f"a Hugging Face folder has weights in {', '.join(DTYPES)}, not in {precision}; for int8 export to onnx or "
            "openvino, or load the folder with a quantization_config of transformers"
        )
    session = session_of(model)
    own = next(model.parameters()).dtype
    if precision is None and own not in DTYPES.values():
        raise VtokError(f"these weights are in {own}; convert them first: model.to(torch.float16)")
    if session.adapter.text is None:
        raise VtokError(
            f"{type(model).__name__} has no language model, so no auto class would load it compressed; vtok.save and "
            "vtok.load keep towers"
        )


def lossless(model: nn.Module, precision: str) -> bool:
    """Whether every weight of a model is the same in a precision, as those of a bf16 file read into fp32 are."""
    dtype = DTYPES.get(precision)
    if dtype is None:
        return False
    return all(
        weight.dtype is dtype or torch.equal(weight.to(dtype).to(weight.dtype), weight)
        for weight in model.parameters()
        if weight.is_floating_point()
    )


def from_auto(name: str | Path, *args: Any, config: Any = None, **kw: Any) -> Any:
    """What the shim returns: the compressed model of a folder or of a hub repository.

    Parameters
    ----------
    name : str or Path
        As ``from_pretrained`` was given it.
    config : PretrainedConfig, optional
        As the auto class has read it.
    **kw
        Everything else that ``from_pretrained`` was given.

    Raises
    ------
    VtokError
        As ``vtok.load``.
    """
    kw.pop("trust_remote_code", None)
    if not kw.get("adapter_kwargs"):
        kw.pop("adapter_kwargs", None)
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token", "subfolder")
    hub = {key: kw.pop(key) for key in names if key in kw}
    folder = _fetched(name, hub)
    settings = {} if config is None else {"config": config}
    return load(folder, model=plain(folder, *args, **settings, **kw))


def _fetched(name: str | Path, hub: dict[str, Any]) -> Path:
    """The local folder of a name: methods may keep files beside their settings, so all of a repository is fetched."""
    inside = hub.pop("subfolder", "") or ""
    if Path(name).is_dir():
        return Path(name) / inside
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), **hub)) / inside


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors in another dtype; those that are one tensor under two names stay one."""
    made: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    cast = {}
    for name, value in state.items():
        if value.is_floating_point():
            value = made.setdefault((value.data_ptr(), tuple(value.shape)), value.to(dtype))
        cast[name] = value
    return cast


def _mark(path: Path, dtype: str) -> None:
    """Name the shim in ``config.json``, and the dtype of the weights in the file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = dict(AUTO_MAP)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
