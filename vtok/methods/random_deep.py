"""Random pruning of deep layers (arXiv 2512.07580, CVPR 2026): past the information horizon any token is as good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtok.method import Method, register
from vtok.view import DecoderView, Shape


@register("random_deep")
@dataclass(frozen=True)
class RandomDeep(Method):
    """Keep a uniform sample of the visual tokens from decoder layer ``layer`` on (paper section 5).

    Composes with any first stage: ``vtok.compress(model, ["divprune", "random_deep"], keep=192)``.

    Args:
        layer: first layer on the sample, of a 32-layer decoder (scaled to other depths); ``"auto"``: the information
            horizon measured by ``vtok.information`` on calibration samples.
        share: sample size relative to what entered the decoder (38 of 284 in the released "192" setting).
        seed: drawn per image from the seed and its place in the prompt.
    """

    summary = "random sample behind the information horizon"
    paper = "arXiv 2512.07580"
    site = "decoder"
    positions = "reindex"
    presets: ClassVar[dict[str, Any]] = {
        "192": {"keep": 192, "share": 38 / 284},
        "64": {"keep": 64, "share": 10 / 96},
        "vtw-64": {"keep": 64, "share": 0.0, "layer": 21},
    }

    layer: int | str = 20  # type: ignore[assignment]
    share: float = 38 / 284
    seed: int = 0

    def default_layer(self, shape: Shape) -> int | None:
        if isinstance(self.layer, str):
            from vtok.errors import VtokError

            raise VtokError(
                'random_deep(layer="auto") needs calibration samples: measure the horizon first with '
                "vtok.calibrate(model, samples) and pass what it returns as layer="
            )
        return min(shape.depth - 1, max(1, round(self.layer * shape.depth / 32)))

    def score(self, view: DecoderView) -> Tensor:
        return view.random(self.seed)
