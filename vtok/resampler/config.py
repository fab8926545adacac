"""What an ordered resampler looks like: the JSON beside its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtok.errors import VtokError
from vtok.resampler.starts import TRAINED


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of an ``OrderedResampler``, and the model it was distilled from.

    Args:
        dim: channels of the visual tokens: the tower's before LLaVA's projector, the language model's after Qwen's
            merger.
        width: channels inside; a multiple of ``head_dim`` and of 4.
        blocks: how many.
        tokens: K, the most tokens of one picture (tile, frame).
        scheme: what the tokens start as and in which order: averages, ``"haar"`` or ``"quadtree"``, or tokens of the
            picture, ``"farthest"`` or ``"salient"``.
        head_dim: channels of an attention head.
        halting: whether it can tell how many tokens a picture needs.
        family: of the model it was distilled from; empty: any.
        fingerprint: some weights of the module it stands at, which tell that model from others of its size; empty: any.
    """

    dim: int
    width: int = 512
    blocks: int = 4
    tokens: int = 256
    scheme: str = "haar"
    head_dim: int = 64
    halting: bool = False
    family: str = ""
    fingerprint: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dim", "width", "blocks", "tokens", "head_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise VtokError(f"a resampler's {name} is {value!r}; give a whole number from 1 on")
        if self.width % self.head_dim or self.width % 4:
            raise VtokError(
                f"a resampler's width {self.width} is no multiple of head_dim {self.head_dim} and of 4; change one"
            )
        if self.scheme not in TRAINED:
            raise VtokError(f"there is no scheme {self.scheme!r} of ordered tokens; known are {', '.join(TRAINED)}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> ResamplerConfig:
        """From what ``to_json`` wrote.

        Raises:
            VtokError: an unknown or missing field, or a size that cannot be.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(fields.keys() - known)
        if unknown or "dim" not in fields:
            wrong = f"knows no {', '.join(unknown)}" if unknown else "needs a dim"
            raise VtokError(f"this is no resampler's configuration: it {wrong}; take what vtok tokenizer distill wrote")
        return cls(**{**fields, "fingerprint": tuple(fields.get("fingerprint", ()))})
