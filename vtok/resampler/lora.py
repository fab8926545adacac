"""A low-rank change of the language model beside a resampler (LoRA, arXiv 2106.09685), by peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vtok.api import adapter_of
from vtok.errors import VtokError

NAME = "vtok"
#: where in each decoder layer: what the paper found to matter most, and what every family calls the same
TARGETS = ("q_proj", "v_proj")


class Lora(nn.Module):
    """The weights of a change of all decoder layers' attention; peft puts them into the model.

    Parameters
    ----------
    model : nn.Module
        A transformers model of a family that vtok knows. It has the change from here on, at first one of zero.
    rank : int
        Of each change; its factor is 2.

    Raises
    ------
    VtokError
        peft is not installed or unfit for this transformers, or ``model`` already has changes that peft put there.
    """

    model: Any

    def __init__(self, model: Any, rank: int) -> None:
        super().__init__()
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise VtokError("lora needs peft; pip install peft, or leave lora out") from error
        if getattr(model, "_hf_peft_config_loaded", False):
            raise VtokError("the model already has an adapter; merge it into the weights, or load the model without")
        layers = adapter_of(model).text.layers
        names = {id(module): name for name, module in model.named_modules()}
        inner = [
            f"{names[id(layer)]}.{name}"
            for layer in layers
            for name, _ in layer.named_modules()
            if name.rpartition(".")[2] in TARGETS
        ]
        if not inner:
            raise VtokError(f"lora changes {' and '.join(TARGETS)} of the decoder's layers, and this one has none")
        try:
            model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=inner), NAME)
        except (ValueError, ImportError) as error:
            # 5.24 asks for peft 0.22 before there is one
            raise VtokError(
                f"this transformers does not work with this peft ({error}); upgrade peft, take an older transformers, "
                "or leave lora out"
            ) from error
        # the model is not a part of this one: a checkpoint holds the change alone
        object.__setattr__(self, "model", model)
        self.changes = nn.ParameterList(p for name, p in model.named_parameters() if f".{NAME}." in name)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was, for a block."""
        self.model.disable_adapters()
        try:
            yield
        finally:
            self.model.enable_adapters()

    def save(self, folder: Path) -> None:
        """Write what ``model.load_adapter(folder)`` reads, and leave the model without."""
        self.model.save_pretrained(folder)
        self.model.disable_adapters()
