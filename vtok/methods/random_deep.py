"""Random pruning of deep layers (arXiv 2512.07580, CVPR 2026): past the information horizon any token is as good."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vtok.errors import VtokError
from vtok.method import Method, register
from vtok.view import DecoderView, Shape


@register("random_deep")
@dataclass(frozen=True)
class RandomDeep(Method):
    """Keep a uniform sample of the visual tokens from decoder layer ``layer`` on (paper section 5).

    Composes with any first stage: ``vtok.compress(model, ["divprune", "random_deep"], keep=192)``.

    Args:
        layer: first layer on the sample: an int is that layer, a float the share of the depth before it (20 of 32 in
            the paper). ``"auto"``: the information horizon (section 4), measured on ``samples`` by ``vtok.calibrate``
            when ``vtok.compress`` is called.
        share: sample size relative to what entered the decoder (38 of 284 in the released "192" setting).
        seed: drawn per image from the seed and its place in the prompt.
        samples: calibration samples for ``layer="auto"``: (inputs of the model, id of the first answer token).
        epsilon: what counts as no change of the answer's probability there.
    """

    summary = "random sample behind the information horizon"
    paper = "arXiv 2512.07580"
    site = "decoder"
    positions = "reindex"
    presets: ClassVar[dict[str, Any]] = {
        "192": {"keep": 192, "share": 38 / 284},
        "64": {"keep": 64, "share": 10 / 96},
        "vtw-64": {"keep": 64, "share": 0.0, "layer": 21 / 32},
    }

    layer: int | float | str = 20 / 32  # type: ignore[assignment]
    share: float = 38 / 284
    seed: int = 0
    samples: Sequence[tuple[Mapping[str, Any], int]] = dataclasses.field(default=(), compare=False, repr=False)
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.layer, str) and (self.layer != "auto" or not self.samples):
            raise VtokError(
                f"random_deep(layer={self.layer!r}) is no layer; give an int, a share of the depth, or "
                'layer="auto" with samples=[(inputs, answer_token_id), ...] to measure the horizon on'
            )

    def prepare(self, model: nn.Module) -> Method:
        if self.layer != "auto":
            return self
        from vtok.information import calibrate

        horizon = calibrate(model, self.samples, self.epsilon)
        if horizon >= len(_layers(model)):
            raise VtokError(
                f"the calibration samples use the picture up to the last layer (epsilon={self.epsilon:g}), so "
                "random_deep has nowhere to cut; leave it out, or give a larger epsilon or a layer"
            )
        return dataclasses.replace(self, layer=max(1, horizon), samples=())

    def default_layer(self, shape: Shape) -> int | None:
        if isinstance(self.layer, float):
            return min(shape.depth - 1, max(1, round(self.layer * shape.depth)))
        return super().default_layer(shape)

    def variants(self, shape: Shape) -> list[dict[str, Any]]:
        return [{"layer": share / 32} for share in (12, 16, 24)]

    def score(self, view: DecoderView) -> Tensor:
        return view.random(self.seed)


def _layers(model: nn.Module) -> Sequence[nn.Module]:
    from vtok.api import adapter_of

    text: Any = adapter_of(model).text
    return text.layers
