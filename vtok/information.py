"""How much the answer still owes to each visual token at each depth: the information horizon (arXiv 2512.07580).

The abstract of the paper speaks of the change upon *removal* of a token; what its code measures, and what is the
default here, is *isolation*: how much one unit alone adds to an answer that otherwise sees no picture. ``mode="out"``
measures the removal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

import vtok_kernels as kernels
from vtok.api import adapter_of, compressed, session_of
from vtok.errors import VtokError
from vtok.progress import progress as progress_bar
from vtok.protocol import Adapter, Part

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
        rows = [("layer", "p(text)", "mean I", "std I", "max |I|", "best unit")]
        for layer, own in sorted(self.values.items()):
            numbers = (self.text[layer], float(own.mean()), float(own.std(correction=0)), float(own.abs().max()))
            rows.append((str(layer), *(f"{number:.4f}" for number in numbers), str(int(own.abs().argmax()))))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        found = self.horizon()
        where = f"layer {found} of {self.depth}" if found < self.depth else "behind the last layer"
        head = f"p(answer) {self.full:.4f} with all visual tokens; {len(self.cells)} units; horizon ({EPSILON:g}): {where}"
        return "\n".join((head, *lines))


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
        raise VtokError(f"{type(model).__name__} gives no next-token probabilities; pass the model with its language head")
    if mode not in ("in", "out", "both"):
        raise VtokError(f'mode={mode!r} is unknown; take "in", "out" or "both"')
    if unit < 1 or batch_size < 1:
        raise VtokError(f"unit={unit} and batch_size={batch_size} must be at least 1")
    depth = len(adapter.text.layers)  # type: ignore[arg-type]
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


@dataclass
class _Trace:
    """One plain prefill, as every asked layer saw it, and the columns that variants of it consist of.

    ``hidden[i]`` (1, L, D) and ``rotary[i]`` enter layer i; ``planes`` (1, L, D) are added after the first layers.
    """

    adapter: Adapter
    head: Any
    answer: int
    full: float
    hidden: dict[int, Tensor]
    rotary: dict[int, tuple[Tensor, Tensor]]
    planes: list[Tensor]
    real: Tensor
    visual: Tensor
    cells: list[Tensor]
    tokens: tuple[Tensor, ...]
    images: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]

    def with_only(self, cell: Tensor | None) -> Tensor:
        """Columns of the text and of one unit."""
        keep = self.real & ~self.visual
        if cell is not None:
            keep[cell] = True
        return keep.nonzero().flatten()

    def lacking(self, cell: Tensor) -> Tensor:
        """Columns of everything but one unit."""
        keep = self.real.clone()
        keep[cell] = False
        return keep.nonzero().flatten()

    def probabilities(
        self, layer: int, variants: Sequence[Tensor], batch_size: int, advance: Callable[[int], None]
    ) -> Tensor:
        """(variants,) probability of the answer when the layers from ``layer`` on see these columns only.

        Variants of one length run together, so none needs padding.
        """
        together: dict[int, list[int]] = {}
        for number, columns in enumerate(variants):
            together.setdefault(len(columns), []).append(number)
        found = torch.zeros(len(variants))
        for numbers in together.values():
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                found[batch] = self._replay(layer, torch.stack([variants[number] for number in batch]))
                advance(len(batch))
        return found

    def _replay(self, first: int, index: Tensor) -> Tensor:
        text: Any = self.adapter.text
        hidden = _gather(self.hidden[first], index)
        rotary = tuple(_gather(part, index) for part in self.rotary[first])
        mask = create_causal_mask(
            config=text.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
        )
        for number in range(first, len(text.layers)):
            hidden = text.layers[number](hidden, attention_mask=mask, position_embeddings=rotary)
            if number < len(self.planes):
                hidden = hidden + _gather(self.planes[number], index).to(hidden.device)
        logits = self.head(text.norm(hidden[:, -1:]))[:, 0]
        return logits.float().softmax(-1)[:, self.answer].cpu()


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(1, L, D) to (B, W, D)."""
    return kernels.gather_tokens(x.expand(index.shape[0], *x.shape[1:]), index.to(x.device))


def _trace(
    model: Any, adapter: Adapter, inputs: Mapping[str, Any], answer: int, asked: Sequence[int], unit: int
) -> _Trace:
    """Run the plain model once. The engine, told to keep everything, says where the visual tokens are."""
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise VtokError(f"the inputs hold {ids.shape[0]} samples; measure one at a time")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    real = mask[0].bool()
    last = int(real.nonzero()[-1])
    with compressed(model, "random", keep=1.0), _recorded(adapter, asked) as record:
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
    return _Trace(
        adapter, model.get_output_embeddings(), answer, full, record.hidden, record.rotary, record.planes,
        real, visual, columns, tuple(tokens), tuple(images), tuple(grids),
    )  # fmt: skip


def windows(parts: Sequence[Part], unit: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Token indices of every ``unit`` x ``unit`` window of an image's rectangles, and the windows' grid per rectangle.

    Windows at the right and lower edge are smaller where the sides do not divide; newline tokens belong to none.
    """
    cells, grids, start = [], [], 0
    for part in parts:
        row = part.width + (part.newlines if part.per_row else 0)
        grid = start + torch.arange(part.height)[:, None] * row + torch.arange(part.width)
        bands = grid.split(unit, dim=0)
        cells += [window.flatten() for band in bands for window in band.split(unit, dim=1)]
        grids.append((len(bands), -(-part.width // unit)))
        start += part.length
    return cells, grids


@dataclass
class _Record:
    hidden: dict[int, Tensor] = field(default_factory=dict)
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    planes: list[Tensor] = field(default_factory=list)

    def layer(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.hidden[number] = args[0] if args else kwargs["hidden_states"]
        self.rotary[number] = kwargs["position_embeddings"]

    def text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Qwen3-VL's DeepStack planes, laid out over the prompt."""
        where = kwargs.get("visual_pos_masks")
        for plane in kwargs.get("deepstack_visual_embeds") or ():
            dense = plane.new_zeros(*where.shape, plane.shape[-1])
            self.planes.append(dense.index_put(where.to(plane.device).nonzero(as_tuple=True), plane))


@contextmanager
def _recorded(adapter: Adapter, asked: Sequence[int]) -> Iterator[_Record]:
    """Record what enters the asked layers, for a block."""
    record, text = _Record(), adapter.text
    assert text is not None
    handles = [text.register_forward_pre_hook(record.text, with_kwargs=True)]
    for number in set(asked):
        layer: nn.Module = text.layers[number]  # type: ignore[index, assignment]
        handles.append(layer.register_forward_pre_hook(partial(record.layer, number), with_kwargs=True))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
