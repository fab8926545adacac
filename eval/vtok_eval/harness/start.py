"""How a run starts: its settings make sense, the model is plain, the folder goes on where it was left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtok.api import SESSION, adapter_of
from vtok.errors import VtokError
from vtok.protocol import Adapter
from vtok_eval.harness import store
from vtok_eval.harness.prompts import Prompts, takes_instruction
from vtok_eval.harness.ranks import Ranks


def check(
    model: Any, batch_size: int, limit: int | None, new: int, time_samples: int, repeats: int, clock: str
) -> None:
    """Refuse numbers that make no sense, and a clock that the model's device does not have.

    Raises
    ------
    VtokError
        Says which.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit), ("max_new_tokens", new), ("repeats", repeats)):
        if value is not None and value < 1:
            raise VtokError(f"{name}={value} must be at least 1")
    if time_samples < 0:
        raise VtokError(f"time_samples={time_samples} must be at least 0")
    if clock not in ("wall", "cpu") or (clock == "cpu" and model.device.type != "cpu"):
        raise VtokError(f'clock={clock!r} is no clock for {model.device}; take "wall", or "cpu" on a CPU')


def plain_adapter(model: Any) -> Adapter:
    """The adapter of a model that can answer and is not compressed.

    Raises
    ------
    VtokError
        It is compressed, of no family, or has no language model.
    """
    if SESSION in model.__dict__:
        raise VtokError("this model is compressed already, so there is no plain model to compare with; vtok.restore it")
    adapter = adapter_of(model)
    if adapter.text is None:
        raise VtokError(f"{type(model).__name__} has no language model; only vision-language models answer questions")
    return adapter


def prompts_of(model: Any, processor: Any, name: str, instruction: bool | None) -> Prompts:
    """Prompts with or without the task's instruction; ``None``: as the model was trained."""
    return Prompts(processor, takes_instruction(model, name) if instruction is None else instruction)


def go_on(out: Path, asked: Mapping[str, Any], overwrite: bool, ranks: Ranks) -> None:
    """The folder ready to go on: settings checked, files whole, in agreement between ranks.

    Raises
    ------
    VtokError
        It holds answers made with other settings than ``asked``, or the disk is full.
    """
    if overwrite and ranks.first:
        store.clear(out)
    ranks.wait()
    known = store.check(out, asked)
    ranks.wait()
    if ranks.first:
        store.make_folder(out)
        store.write_json(out / store.SETTINGS, known)
        store.gather(out, retry=True)
    ranks.wait()
