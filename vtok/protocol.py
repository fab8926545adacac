"""What an adapter tells the engine about a model family. Adapters import this module and nothing else of vtok.

An adapter finds parts of a model; it knows no method. Everything that two families share is in the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from vtok.errors import VtokError


@dataclass(frozen=True)
class Part:
    """One rectangle of a medium's placeholder run, in raster order.

    ``newlines`` is the number of newline tokens that follow: at the end of every row (``per_row``) or once.
    """

    height: int
    width: int
    newlines: int = 0
    per_row: bool = False

    @property
    def length(self) -> int:
        return self.height * self.width + self.newlines * (self.height if self.per_row else 1)


@dataclass
class Medium:
    """One image or video as the language model sees it.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        parts: the rectangles its placeholder run is made of; their lengths add up to ``length``.
        tiles: slice of tower rows (LLaVA) or of merge units (Qwen) that this medium came from.
        base: the first ``base`` tokens show the whole picture (the thumbnail of an any-resolution layout), else 0.
        interpolated: the run is a resampled grid, so one token comes from several tower tokens.
    """

    modality: Literal["image", "video"]
    parts: tuple[Part, ...]
    tiles: slice
    base: int = 0
    interpolated: bool = False

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)


class Blocks(Protocol):
    """How to speak to one kind of vision transformer block. All tensors are (B, N, D) or packed (N, D)."""

    def taps(self, block: nn.Module) -> Sequence[nn.Module]:
        """Modules whose outputs hold the block's projections; empty when only recomputation can give them."""

    def split(self, block: nn.Module, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Tap outputs to q, k, v of shape (B, H, N, d), before any rotary embedding."""

    def project(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, d) of the block input ``x``, computed anew."""

    def values(self, block: nn.Module, x: Tensor) -> Tensor:
        """v alone, of a dense block."""

    def attend(self, block: nn.Module, x: Tensor, bias: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """The attention branch of ``x`` without the residual; ``bias`` (B, 1, 1, N) is added to the logits."""

    def output(self, block: nn.Module, heads: Tensor) -> Tensor:
        """Per-head outputs (B, H, N, d) through the output projection (and layer scale)."""

    def feed(self, block: nn.Module, x: Tensor) -> Tensor:
        """The feed-forward branch of ``x`` without the residual."""

    def scale(self, block: nn.Module) -> float:
        """Factor on q.k before the softmax."""

    def with_mask(self, x: Tensor, mask: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """The arguments of a dense block with other tokens and, where given, another additive mask."""


@dataclass
class Tower:
    """A vision transformer.

    Attributes:
        root: module whose forward runs the whole tower.
        layers: its blocks in order.
        blocks: how to speak to one block.
        prefix: number of prefix tokens (class token, registers) at the start of a dense sequence.
        has_cls: the first prefix token is a class token.
        feature_layer: index of the block whose output is used.
        projector: module that takes the features onward (its input is (tiles, N, D)); ``None`` for a bare ViT.
        packed: tokens of all images lie in one (seq, D) sequence with ``cu_seqlens`` (Qwen); ``unit`` rows form a cell.
        full_layers: packed only: blocks that see a whole frame; the others see windows. ``None``: all.
        keeps_prefix: features handed to the projector still hold the prefix tokens.
        mask_config: configuration that says which attention implementation runs (HF towers), else ``None``.
    """

    root: nn.Module
    layers: Sequence[nn.Module]
    blocks: Any  # Blocks; packed ones have no with_mask
    prefix: int = 0
    has_cls: bool = False
    feature_layer: int = -1
    projector: nn.Module | None = None
    packed: bool = False
    unit: int = 1
    full_layers: frozenset[int] | None = None
    mergers: tuple[nn.Module, ...] = ()
    keeps_prefix: bool = False
    mask_config: Any = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise VtokError(f"no transformer block was found in {type(self.root).__name__}; write an adapter for it")


class Adapter(ABC):
    """One model family. Constructed with the model that was given to ``vtok.compress``.

    Attributes:
        family: name shown by ``vtok.families()``.
        positions: position policies that make sense (Qwen's multimodal RoPE only knows ``"keep"``).
        base: module that owns ``get_image_features`` and calls the text model (``None`` for a bare ViT).
        text: the text model with ``layers``, ``rotary_emb`` and ``config`` (``None`` for a bare ViT).
        tower: the vision transformer.
    """

    family: ClassVar[str] = ""
    positions: ClassVar[frozenset[str]] = frozenset({"keep", "reindex"})
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    base: Any = None
    text: Any = None
    tower: Tower

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter knows ``model``."""

    @abstractmethod
    def __init__(self, model: nn.Module) -> None: ...

    def media(self, modality: str, call: Mapping[str, Any]) -> Sequence[Medium]:
        """The media of one ``get_image_features`` / ``get_video_features`` call, in order."""
        raise NotImplementedError

    def pack(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], values: Tensor, newline: float
    ) -> list[Tensor]:
        """Carry per-tower-token ``values`` (tiles, N, C) through the family's packing: one (length, C) per medium."""
        return [values[medium.tiles].flatten(0, 1) for medium in media]

    def windows(self, grid: Tensor) -> tuple[Tensor, list[int]] | None:
        """Packed towers: processing order of the cells and window lengths in cells, where cells are permuted."""
        return None

    def tile_length(self, modality: str) -> int:
        """Patches of one tile of a dense tower."""
        raise NotImplementedError

    def placeholder(self, modality: str) -> int:
        """Token id of the modality's placeholder."""
        return int(getattr(self.base.config, f"{modality}_token_id"))

    def decode_positions(self, start: int, batch: int, length: int, device: Any) -> Tensor | None:
        """Position ids of ``length`` new tokens after ``start`` prompt tokens, where the caller gave none."""
        import torch

        return torch.arange(start, start + length, device=device).expand(batch, length)


def find_blocks(root: nn.Module, class_names: Sequence[str]) -> list[nn.Module]:
    """Blocks of ``root`` in order, by class name: attribute paths moved between library versions, names did not."""
    return [module for module in root.modules() if type(module).__name__ in class_names]
