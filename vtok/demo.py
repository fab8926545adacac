"""The demo: a photograph through two small random models, compressed by every method that serves them."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import vtok
from vtok.api import adapter_of, session_of
from vtok.budget import smallest, solve
from vtok.errors import VtokError
from vtok.geometry import geometry, inputs_of
from vtok.progress import progress
from vtok.show import sheet, show

#: geometry -> (photograph of scikit-image, budget)
MODELS: Mapping[str, tuple[str, int | float]] = {
    "tiny-llava": ("astronaut", 64),
    "tiny-qwen2_5_vl": ("coffee", 0.25),
}
NEW_TOKENS = 4


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes
    ----------
    keep : int or float
        The budget asked for; ``note`` says where it is the smallest the method reaches.
    average_tokens : float
        Visual tokens per image averaged over the decoder layers.
    prefill_ms, plain_ms : float
        Medians of paired runs of the whole forward, vision tower included, compressed and not.
    speedup : float
        Median of the paired ratios.
    generated : list of int
        Token ids that greedy decoding gave (noise: the weights are random).
    picture : str
        File name of the kept tokens' picture.
    note : str
        Empty, or why the budget differs, or why there are no numbers.
    """

    model: str
    method: str
    keep: int | float
    tokens_in: float = 0.0
    tokens_kept: float = 0.0
    average_tokens: float = 0.0
    mac_ratio: float = 1.0
    prefill_ms: float = 0.0
    plain_ms: float = 0.0
    speedup: float = 0.0
    generated: tuple[int, ...] = ()
    picture: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def photograph(name: str) -> Image.Image:
    """A photograph that the scikit-image wheel brings along.

    Raises
    ------
    VtokError
        scikit-image is missing, or does not bundle this picture.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise VtokError(
            "the demo takes its photographs from scikit-image, which is not installed: pip install vtok[eval], or give "
            "a picture of your own with --photo"
        ) from error
    try:
        return Image.fromarray(getattr(data, name)())
    except (AttributeError, OSError) as error:
        raise VtokError(f"this scikit-image does not bundle the picture {name!r}; give one with --photo") from error


def run(
    out: str | Path = "demo_output",
    photo: Image.Image | None = None,
    *,
    models: Sequence[str] = tuple(MODELS),
    methods: Sequence[str] | None = None,
    repeats: int = 3,
    bar: bool = True,
) -> list[Row]:
    """Compress, run, time and draw every method that serves each model.

    Parameters
    ----------
    out : str or Path
        Folder for one picture a method and ``contact_sheet.png``.
    photo : PIL.Image, optional
        Take this picture instead of scikit-image's.
    models : sequence of str
        Names from ``MODELS``.
    methods : sequence of str, optional
        Only these methods.
    repeats : int
        Paired timings of each method.
    bar : bool
        Show a progress bar.

    Returns
    -------
    list of Row
        In order of models and methods.
    """
    for what, names, known in (("model", models, list(MODELS)), ("method", methods or (), vtok.methods())):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise VtokError(f"the demo has no {what} {', '.join(unknown)}; it has {', '.join(known)}")
    pictures = {name: (photo or photograph(MODELS[name][0])).convert("RGB") for name in models}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    sheets: list[Image.Image] = []
    with progress("demo", len(models) * len(vtok.methods()), bar) as advance:
        for name in models:
            drawn, captions = [pictures[name]], [f"{name}: the picture"]
            for row, picture in _model_rows(name, pictures[name], folder, methods, repeats, advance):
                rows.append(row)
                if picture is not None:
                    drawn.append(picture)
                    captions.append(f"{row.method}: {row.tokens_kept:g} of {row.tokens_in:g} tokens")
            sheets.append(sheet(drawn, captions, columns=7, width=288))
    _stack(sheets).save(folder / "contact_sheet.png")
    return rows


def _model_rows(
    name: str,
    photo: Image.Image,
    folder: Path,
    only: Sequence[str] | None,
    repeats: int,
    advance: Callable[[int], None],
) -> list[tuple[Row, Image.Image | None]]:
    plain = geometry(name)
    model = copy.deepcopy(plain)
    inputs = inputs_of(plain, photo)
    adapter = adapter_of(plain)
    tokens = int((inputs["input_ids"] == adapter.placeholder("image")).sum())
    _timed(plain, inputs)
    found = []
    for method in vtok.methods(adapter.family):
        if only is None or method in only:
            found.append(_measure(name, method, plain, model, inputs, tokens, photo, folder, repeats))
        advance(1)
    return found


def _measure(
    name: str,
    method: str,
    plain: Any,
    model: Any,
    inputs: Mapping[str, Tensor],
    tokens: int,
    photo: Image.Image,
    folder: Path,
    repeats: int,
) -> tuple[Row, Image.Image | None]:
    asked = MODELS[name][1]
    try:
        with vtok.compressed(model, method, keep=1.0):  # a budget too small for it would be refused here
            keep = reachable(model, tokens, asked)
            with vtok.budget(model, keep), torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
                pairs = [(_timed(plain, inputs), _timed(model, inputs)) for _ in range(repeats)]
                report = vtok.report(model)
    except VtokError as error:
        return Row(name, method, asked, note=str(error)), None
    picture = show(photo, report)
    file = f"{name}-{method}.png"
    picture.save(folder / file)
    row = Row(
        model=name,
        method=method,
        keep=keep,
        tokens_in=report.tokens_in,
        tokens_kept=report.tokens_kept,
        average_tokens=report.average_tokens,
        mac_ratio=report.mac_ratio,
        prefill_ms=1000 * statistics.median(ours for _, ours in pairs),
        plain_ms=1000 * statistics.median(theirs for theirs, _ in pairs),
        speedup=statistics.median(theirs / ours for theirs, ours in pairs),
        generated=tuple(ids[0, -NEW_TOKENS:].tolist()),
        picture=file,
        note="" if keep == asked else f"cuts late: an average of {keep} is the smallest it reaches here",
    )
    return row, picture


def reachable(model: Any, tokens: int, keep: int | float) -> int | float:
    """``keep``, or the smallest budget a compressed model reaches on an image of ``tokens`` tokens if that is more.

    Only a chain that acts nowhere before the decoder has such a bound.
    """
    session = session_of(model)
    profile, depth = session.profile, session.depth
    if not profile.layers or any(method.site != "decoder" for method in session.methods):
        return keep
    # rounding to whole tokens can put the first budget that works a little above the bound
    for budget in (keep, *range(smallest(tokens, depth, profile), tokens)):
        try:
            solve(tokens, budget, depth, profile, has_entry=False)
        except VtokError:
            continue
        return budget
    return tokens


@torch.no_grad()
def _timed(model: Any, inputs: Mapping[str, Tensor]) -> float:
    """Seconds of one prefill, vision tower included."""
    start = time.perf_counter()
    model(**inputs, logits_to_keep=1)
    return time.perf_counter() - start


def _stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other."""
    width, height = max(p.width for p in pictures), sum(p.height for p in pictures)
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas
