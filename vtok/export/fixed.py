"""What is fixed of a compressed model when it becomes a graph: layout, tokens in, tokens kept, and what is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vtok.budget import Profile
from vtok.engine.plan import Plan, stages_of
from vtok.engine.session import Session
from vtok.errors import VtokError
from vtok.method import Method
from vtok.protocol import Medium
from vtok.view import Stage

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
"""Families whose vision side can be exported as a graph."""


@dataclass(frozen=True)
class FixedPlan:
    """One compressed vision side of static shapes; only the number of pictures is open.

    Attributes:
        family: adapter family.
        method: names of the methods, joined by ``+``.
        keep: the budget that was asked for.
        tokens_in: placeholders of a picture in the prompt.
        kept: visual tokens of a picture that reach the language model.
        width: channels of a visual token.
        positions: ``"keep"`` or ``"reindex"``.
        layout: what fixes the picture's layout: ``{"image_size": (H, W)}`` in pixels of a tile, with
            ``"image_sizes": (H, W)`` of the picture in LLaVA-NeXT; ``{"grid_thw": (1, h, w)}`` in patches in Qwen.
        pixel_shape: shape of ``pixel_values`` without the batch axis.
        left_out: what the graph does not do of what the hooked model does, as sentences.
    """

    family: str
    method: str
    keep: int | float
    tokens_in: int
    kept: int
    width: int
    positions: str
    layout: Mapping[str, tuple[int, ...]]
    pixel_shape: tuple[int, ...]
    left_out: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``json.dumps`` takes."""
        record = dataclasses.asdict(self)
        record["layout"] = {key: list(value) for key, value in self.layout.items()}
        record["pixel_shape"], record["left_out"] = list(self.pixel_shape), list(self.left_out)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> FixedPlan:
        """What ``to_json`` gave.

        Raises:
            VtokError: fields are missing or unknown.
        """
        names = {item.name for item in dataclasses.fields(cls)}
        wrong = sorted(names - {"left_out"} - record.keys()) or sorted(record.keys() - names)
        if wrong:
            raise VtokError(f"this is no plan of an exported model ({', '.join(wrong)}); export the model again")
        values = dict(record)
        values["layout"] = {key: tuple(value) for key, value in record["layout"].items()}
        values["pixel_shape"] = tuple(record["pixel_shape"])
        values["left_out"] = tuple(record.get("left_out", ()))
        return cls(**values)


class Budget(Plan):
    """The plan of a session without its stages inside the decoder, which a graph of one length cannot hold: the budget
    is then what enters the decoder.

    Args:
        session: of the compressed model.
        fixed: leave stages inside the decoder out where there are some.

    Raises:
        VtokError: the family or a method cannot be exported; names what to take instead.
    """

    def __init__(self, session: Session, fixed: bool = False) -> None:
        check(session, fixed)
        super().__init__(session.adapter, session.methods, session.keep, session.positions)
        self.left_out = tuple(_sentence(method, self) for method in session.methods if _late(method, self))
        owned = [(method, stage) for method in self.methods for stage in stages_of(method, self.shape)]
        self.owned = [(method, stage) for method, stage in owned if stage.site != "decoder"]
        self.stages = [stage for _, stage in self.owned]
        self.input_stages = [stage for stage in self.stages if stage.site == "input"]
        self.decoder_stages: list[Stage] = []
        self.profile = Profile()

    def owner(self, stage: Stage) -> Method:
        """The method that a stage belongs to."""
        return next(method for method, own in self.owned if own is stage)

    @property
    def tower_stages(self) -> list[Stage]:
        """Stages inside and right behind the vision tower."""
        return [stage for stage in self.stages if stage.site == "encoder"]

    def input_counts(self, tokens: int) -> list[int]:
        """Tokens of one image that each stage between tower and language model leaves."""
        return self.entry_counts(tokens, self.counts(tokens).entry)[self.tower_methods :]


def check(session: Session, fixed: bool) -> None:
    """Refuse what no graph of fixed shapes can hold.

    Raises:
        VtokError: names what to take instead.
    """
    family = session.adapter.family
    if family not in FAMILIES:
        raise VtokError(
            f"the vision side of {family} is not exported as a graph (known are {', '.join(FAMILIES)}); export this "
            "model as a Hugging Face folder (to hf)"
        )
    for method in session.methods:
        name = method.name or type(method).__name__
        sites = {stage.site for stage in method.stages(session.shape)}
        if sites == {"decoder"}:
            raise VtokError(
                f"{name} drops tokens inside the decoder, whose layers then differ in length, and an exported decoder "
                "has one; take a method that acts before it, such as divprune, or export to hf"
            )
        if "decoder" in sites and not fixed:
            raise VtokError(
                f"{name} has a second stage inside the decoder, which an exported decoder of one length cannot hold; "
                f"export it with fixed, which leaves that stage out and spends the whole budget before the decoder"
                f"{_without(method)}, or export to hf"
            )
        if getattr(method, "auto", None) is not None:
            raise VtokError(
                f"{name} with auto= keeps another number of tokens of every picture, and a graph has one; give a "
                "number as keep, or export to hf"
            )


def data_dependent(name: str) -> VtokError:
    """The refusal of a method whose number of tokens follows the picture."""
    return VtokError(
        f"{name} keeps another number of tokens of every picture, and a graph has one; take a method of a fixed "
        "budget, such as divprune or visionzip, or export to hf"
    )


def _late(method: Method, plan: Plan) -> bool:
    return any(stage.site == "decoder" for stage in method.stages(plan.shape))


def _sentence(method: Method, plan: Plan) -> str:
    layers = [stage.layer for stage in method.stages(plan.shape) if stage.site == "decoder"]
    where = ", ".join(str(layer) for layer in layers)
    return f"{method.name} does not act before decoder layer {where}: its budget is spent before the decoder"


def _without(method: Method) -> str:
    """How a method's options say the same, where they can."""
    return f" (as {method.name} with {method.late}=None does)" if method.late else ""


def only_picture(session: Session, example: Mapping[str, Any]) -> Medium:
    """The layout of the example's one picture.

    Raises:
        VtokError: no pixels, a video, or several pictures.
    """
    if "pixel_values_videos" in example:
        raise VtokError("a graph is made for one picture and this example holds a video; give it a picture")
    if not isinstance(example.get("pixel_values"), Tensor):
        raise VtokError("the example has no pixel_values; pass what the model's processor makes of one picture")
    media = session.adapter.media("image", example)
    if len(media) != 1:
        raise VtokError(
            f"the example holds {len(media)} pictures and a graph is made for the layout of one; pass one picture (the "
            "graph then takes any number of the same layout at once)"
        )
    return media[0]
