"""How much the answer still owes to each visual token at each depth: the information horizon (arXiv 2512.07580).

The abstract of the paper speaks of the change upon *removal* of a token; what its code measures, and what is the
default here, is *isolation*: how much one unit alone adds to an answer that otherwise sees no picture. ``mode="out"``
measures the removal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtok.api import adapter_of, compressed, session_of
from vtok.engine.trace import Trace, recorded, windows
from vtok.errors import VtokError
from vtok.progress import progress as progress_bar
from vtok.protocol import Adapter

EPSILON = 0.01


@dataclass(frozen=True)
class Information:
    """What every unit of the picture is worth at every asked layer.

    Attributes
    ----------
    values : dict of int to (units,) tensor
        Layer -> I_i(V_k), the change of the answer's probability: what unit k adds when it alone is left from layer i
        on (``mode="in"`` and ``"both"``), or what its removal takes away (``mode="out"``).
    removal : dict of int to (units,) tensor
        Layer -> what removal takes away, for ``mode="both"`` and ``"out"``.
    text : dict of int to float
        Layer -> probability of the answer with no visual token from that layer on.
    full : float
        Probability of the answer with all visual tokens.
    cells : tuple of (tokens,) tensors
        Unit -> indices of its tokens within its image, as ``Report.kept`` counts them.
    images : tuple of int
        Unit -> place of its image in the prompt.
    grids : tuple of (rows, columns)
        Units of each rectangle of each image, in order (several for tiled images and videos).
    depth : int
        Number of decoder layers.
    """

    values: Mapping[int, Tensor]
    text: Mapping[int, float]
    full: float
    cells: tuple[Tensor, ...]
    images: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    depth: int
    removal: Mapping[int, Tensor] = field(default_factory=dict)

    def horizon(self, epsilon: float = EPSILON) -> int:
        """First asked layer from which on no unit matters: mean and spread of I stay within ``epsilon``.

        Returns
        -------
        int
            The layer; the number of decoder layers where the last asked layer still uses the picture.
        """
        found = self.depth
        for layer in sorted(self.values, reverse=True):
            own = self.values[layer]
            if abs(float(own.mean())) > epsilon or float(own.std(correction=0)) > epsilon:
                break
            found = layer
        return found

    def maps(self, layer: int) -> list[Tensor]:
        """The values of a layer as pictures: one (rows, columns) tensor per rectangle, in the order of ``grids``."""
        sizes = [rows * columns for rows, columns in self.grids]
        parts = self.values[layer].split(sizes)
        return [part.view(grid) for part, grid in zip(parts, self.grids, strict=True)]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "p(text)", "mean I", "std I", "max |I|", "best unit")]
        for layer, own in sorted(self.values.items()):
            numbers = (self.text[layer], float(own.mean()), float(own.std(correction=0)), float(own.abs().max()))
            rows.append((str(layer), *(f"{number:.4f}" for number in numbers), str(int(own.abs().argmax()))))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        found = self.horizon()
        where = f"layer {found} of {self.depth}" if found < self.depth else "behind the last layer"
        head = f"p(answer) {self.full:.4f} with all visual tokens, {len(self.cells)} units"
        return "\n".join((head, *lines, f"horizon ({EPSILON:g}): {where}"))


def information(
    model: nn.Module,
    inputs: Mapping[str, Any],
    answer: int,
    *,
    layers: Sequence[int] | None = None,
    unit: int = 2,
    mode: str = "in",
    batch_size: int = 32,
    progress: bool = True,
) -> Information:
    """Measure what each unit of the picture adds to the answer's probability, layer by layer.

    The layers before an asked one run once, on the whole prompt. From there on a unit's variants run together, without
    the tokens they lack, on their own positions. Compression that is on the model is set aside for the measurement.

    Parameters
    ----------
    model : nn.Module
        A vision-language model of a supported family.
    inputs : mapping
        What the model's forward takes, one sample.
    answer : int
        Id of the first token of the right answer.
    layers : sequence of int, optional
        Decoder layers before which the visual tokens are taken away; all by default.
    unit : int
        Side of the window of tokens that makes one unit (2 in the paper). Newline tokens belong to none.
    mode : {"in", "out", "both"}
        Keep one unit alone, remove one unit, or both (see ``Information.removal``).
    batch_size : int
        Variants that run together.
    progress : bool
        Show a bar when it takes longer than two seconds.

    Raises
    ------
    VtokError
        Several samples, no picture, an unknown layer or mode, or a prompt that does not end in text.
    """
    adapter = adapter_of(model)
    if adapter.text is None or model.get_output_embeddings() is None:  # type: ignore[operator]
        raise VtokError(f"{type(model).__name__} predicts no token; pass the model with its language head")
    if mode not in ("in", "out", "both"):
        raise VtokError(f'mode={mode!r} is unknown; take "in", "out" or "both"')
    if unit < 1 or batch_size < 1:
        raise VtokError(f"unit={unit} and batch_size={batch_size} must be at least 1")
    depth = len(adapter.text.layers)
    asked = list(range(depth)) if layers is None else [int(layer) for layer in layers]
    if not asked or min(asked) < 0 or max(asked) >= depth:
        raise VtokError(f"layers={layers} are not all layers of this decoder, which has 0 to {depth - 1}")
    with torch.no_grad():
        trace = _trace(model, adapter, inputs, int(answer), asked, unit)
        alone, without = [trace.with_only(cell) for cell in trace.cells], [trace.lacking(cell) for cell in trace.cells]
        variants = [trace.with_only(None)] + (alone if mode != "out" else []) + (without if mode != "in" else [])
        text, alone_values, removal = {}, {}, {}
        with progress_bar("information", len(asked) * len(variants), progress) as advance:
            for layer in asked:
                found = trace.probabilities(layer, variants, batch_size, advance)
                text[layer], rest = float(found[0]), found[1:]
                if mode != "out":
                    alone_values[layer], rest = rest[: len(alone)] - found[0], rest[len(alone) :]
                if mode != "in":
                    removal[layer] = trace.full - rest
    values = removal if mode == "out" else alone_values
    return Information(values, text, trace.full, trace.tokens, trace.images, trace.grids, depth, removal)


def calibrate(
    model: nn.Module,
    samples: Sequence[tuple[Mapping[str, Any], int]],
    epsilon: float = EPSILON,
    *,
    progress: bool = True,
    **options: Any,
) -> int:
    """The information horizon of a model over several samples: the deepest of theirs.

    What it returns is for ``vtok.get("random_deep", layer=...)``; ``layer="auto", samples=...`` does both in one step.

    Parameters
    ----------
    model : nn.Module
        A vision-language model of a supported family.
    samples : sequence of (inputs, answer)
        What the model's forward takes, and the id of the first token of the right answer.
    epsilon : float
        What counts as no change of the answer's probability.
    progress : bool
        Show a bar when it takes longer than two seconds.
    **options
        Passed to ``vtok.information``.

    Returns
    -------
    int
        First layer from which on no unit of any sample matters; the number of decoder layers where there is none.
    """
    if not samples:
        raise VtokError("there is nothing to calibrate on; give samples=[(inputs, answer_token_id), ...]")
    deepest = 0
    with progress_bar("calibrate", len(samples), progress) as advance:
        for inputs, answer in samples:
            deepest = max(deepest, information(model, inputs, answer, progress=False, **options).horizon(epsilon))
            advance(1)
    return deepest


def _trace(
    model: Any, adapter: Adapter, inputs: Mapping[str, Any], answer: int, asked: Sequence[int], unit: int
) -> Trace:
    """Run the plain model once. The engine, told to keep everything, says where the visual tokens are."""
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise VtokError(f"the inputs hold {ids.shape[0]} samples; measure one at a time")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    real = mask[0].bool()
    last = int(real.nonzero()[-1])
    with compressed(model, "random", keep=1.0), recorded(adapter, asked) as record:
        call = {**inputs, "attention_mask": mask, "use_cache": False, "return_dict": True}
        logits = model(**call, logits_to_keep=torch.tensor([last], device=ids.device)).logits
        run = session_of(model).last
    if run is None or not run.spans:
        raise VtokError("there is no picture in these inputs, so nothing to measure; give pixels with the prompt")
    visual = torch.zeros_like(real)
    for span in run.spans:
        visual[span.columns] = True
    if bool(visual[last]):
        raise VtokError("the prompt ends in a picture; end it in text, whose last token predicts the answer")
    full = float(logits[0, 0].float().softmax(-1)[answer])
    columns, tokens, images, grids = [], [], [], []
    for span in run.spans:
        own, shapes = windows(span.encoded.medium.parts, unit)
        columns += [span.columns[cell.to(span.columns.device)] for cell in own]
        tokens += own
        images += [span.place] * len(own)
        grids += shapes
    return Trace(
        adapter, model.get_output_embeddings(), answer, full, record.hidden, record.rotary, record.planes,
        real, visual, columns, tuple(tokens), tuple(images), tuple(grids),
    )  # fmt: skip
