"""Training a tokenizer on pictures, and what it is worth on those that were held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vtok.errors import VtokError
from vtok.progress import progress
from vtok.tokenizers import metrics, stats
from vtok.tokenizers.config import TokenizerConfig
from vtok.tokenizers.data import Pictures, Views, view
from vtok.tokenizers.flextok import FlexTok
from vtok.tokenizers.pictures import reconstructions
from vtok.tokenizers.start import begin, check, weights_digest
from vtok.training import Stage
from vtok.training import train as run_stage

#: in the folder of a run: its settings, the finished tokenizer, what was measured, and what it looks like
SETTINGS, FINISHED, REPORT, SHEET = "settings.json", "tokenizer", "report.json", "{}.png"
STAGE = "tokenizer"


@dataclass(frozen=True)
class Recipe:
    """How a tokenizer is trained.

    Attributes
    ----------
    steps, batch : int
        Batches, and pictures in one.
    rate : float
        Peak learning rate of AdamW; 1e-3 up to a width of 256, less above.
    warmup : int
        Steps to the peak; a cosine leads down from there.
    decay : float
        Of weights that are matrices.
    views : int
        Cuts of each picture in a batch; more where pictures cost more to draw than to learn from.
    seed : int
        Of weights, pictures and draws.
    """

    steps: int = 8000
    batch: int = 32
    rate: float = 1e-3
    warmup: int = 100
    decay: float = 0.02
    views: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "views"):
            if getattr(self, name) < 1:
                raise VtokError(f"{name}={getattr(self, name)} must be 1 or more")
        if not self.rate > 0:
            raise VtokError(f"a learning rate of {self.rate:g} learns nothing; give one above 0, such as 1e-3")


def train(
    config: TokenizerConfig,
    pictures: Pictures,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    workers: int = 0,
    resume: bool = True,
    vae: Any = None,
    features: Callable[[Tensor], Tensor] | None = None,
    start: FlexTok | None = None,
    every: float = 180.0,
    console: Console | None = None,
) -> FlexTok:
    """Train a tokenizer, from its last checkpoint if there is one, and save it.

    Parameters
    ----------
    config : TokenizerConfig
        What to train.
    pictures : Pictures
        To train on.
    out : str or Path
        For settings, checkpoint, log, and the finished ``tokenizer/``.
    recipe : Recipe, optional
        How; the defaults otherwise.
    device : str
        ``"cpu"`` or ``"cuda"``.
    workers : int
        Processes that prepare pictures; 0 does it in this one.
    resume : bool
        Go on from a checkpoint in ``out``; ``False`` starts anew.
    vae : nn.Module, optional
        For configs that work on latents.
    features : callable, optional
        Images (B, 3, H, W) in [0, 1] to the frozen features (B, repa, h, w) that a REPA head is aligned to.
    start : FlexTok, optional
        A trained tokenizer of the same tokens: its encoder stays as it is, and a decoder is trained for it.
    every : float
        Seconds between checkpoints.
    console : rich.Console, optional
        For the progress bar.

    Returns
    -------
    FlexTok
        Trained, in eval mode.

    Raises
    ------
    VtokError
        ``out`` holds a run with other settings, a head lacks its features, ``start`` has other tokens than ``config``,
        or the loss is no longer a number.
    """
    recipe, out = recipe or Recipe(), Path(out)
    if config.repa and features is None:
        raise VtokError("a REPA head learns from the features of a frozen model; pass features=, or set repa=0")
    if start is not None:
        check(config, start.config)
    settings: dict[str, Any] = {"config": asdict(config), "recipe": asdict(recipe), "data": pictures.name}
    _settle(out, settings if start is None else settings | {"start": weights_digest(start)}, resume)
    torch.manual_seed(recipe.seed)
    tokenizer = FlexTok(config, vae=vae).to(device).train()
    learning = [tokenizer] if start is None else begin(tokenizer, start)

    def step(images: Tensor) -> tuple[Tensor, dict[str, float]]:
        images = images.to(device)
        parts = tokenizer.losses(images, features=None if features is None else features(images))
        return parts["loss"], {name: value.item() for name, value in parts.items() if name != "loss"}

    stage = Stage(
        STAGE,
        recipe.steps,
        [(learning, recipe.rate)],
        step,
        warmup=max(1, min(recipe.warmup, recipe.steps // 5)),
        decay=recipe.decay,
    )
    batches = Views(pictures, config.image_size, recipe.batch, recipe.steps, recipe.seed, recipe.views)
    run_stage(tokenizer, stage, batches, out, workers=workers, every=every, resume=resume, console=console)
    tokenizer.eval().requires_grad_(False)
    tokenizer.save_pretrained(out / FINISHED)
    return tokenizer


def stream(
    pictures: Pictures, side: int, limit: int | None, odd: dict[str, str], batch: int = 32
) -> Iterator[tuple[Tensor, list[str]]]:
    """The middles of pictures, batch by batch, with a bar.

    Parameters
    ----------
    pictures : Pictures
        Of which at most ``limit`` are taken.
    side : int
        Pixels.
    odd : dict
        Filled with label -> reason of those that cannot be read.
    batch : int
        Pictures in a batch.

    Yields
    ------
    tuple
        (B, 3, side, side) in [0, 1], and B labels.

    Raises
    ------
    VtokError
        None of them can be read.
    """
    found: list[Tensor] = []
    labels: list[str] = []
    total = len(pictures) if limit is None else min(limit, pictures.count or limit)
    with progress(pictures.name, total) as advance:
        for label, image in pictures.readable(limit):
            if isinstance(image, str):
                odd[label] = image
            else:
                found.append(view(image, side))
                labels.append(label)
            advance(1)
            if len(found) == batch:
                yield torch.stack(found), labels
                found, labels = [], []
    if found:
        yield torch.stack(found), labels
    if len(odd) == total:
        raise VtokError(f"none of the pictures of {pictures.name} can be read: {next(iter(odd.values()))}")


def views(pictures: Pictures, side: int, limit: int) -> tuple[list[Tensor], dict[str, str]]:
    """All batches of ``stream``, and label -> reason of those that cannot be read."""
    odd: dict[str, str] = {}
    return [images for images, _ in stream(pictures, side, limit, odd)], odd


def assess(
    tokenizer: FlexTok,
    held_out: Sequence[Pictures],
    out: str | Path,
    *,
    limit: int = 256,
    shown: int = 8,
    **decoding: Any,
) -> dict[str, Any]:
    """PSNR and SSIM over k, what each position says, and a picture of reconstructions, for each set of pictures.

    Parameters
    ----------
    tokenizer : FlexTok
        Trained.
    held_out : sequence of Pictures
        That it was not trained on.
    out : str or Path
        Folder for ``report.json`` and a picture a set.
    limit : int
        At most so many pictures of a set.
    shown : int
        Of which so many are drawn.
    **decoding
        To ``tokenizer.decode``.

    Returns
    -------
    dict
        What ``report.json`` holds: by set ``"curve"``, ``"statistics"`` (of discrete tokens) and ``"left_out"``.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for pictures in held_out:
        batches, odd = views(pictures, tokenizer.config.image_size, limit)
        with progress(f"reconstruct {pictures.name}", sum(map(len, batches))) as advance:
            curve = metrics.curve(tokenizer, batches, advance=advance, **decoding)
        entry: dict[str, Any] = {"curve": curve.as_dict(), "left_out": odd}
        if tokenizer.codes:
            tokens = torch.cat([tokenizer.encode(images).cpu() for images in batches])
            entry["statistics"] = stats.statistics(tokens, tokenizer.codes, levels=levels(tokenizer)).as_dict()
        report[pictures.name] = entry
        sheet = reconstructions(tokenizer, torch.cat(batches)[:shown], **decoding)
        sheet.save(out / SHEET.format(pictures.name))
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def levels(tokenizer: FlexTok) -> tuple[int, ...]:
    """Digits of its tokens, the lowest first, where they are made of any."""
    config = tokenizer.config
    return {"fsq": config.levels, "binary": (2,) * config.bits}.get(config.quantiser, ())


def parameters(tokenizer: nn.Module) -> int:
    """How many numbers it has learnt."""
    return sum(p.numel() for p in tokenizer.parameters())


def _settle(out: Path, settings: dict[str, Any], resume: bool) -> None:
    """Write down what a run is, or see that it is the run that the folder holds."""
    path = out / SETTINGS
    text = json.dumps(settings, indent=1) + "\n"
    if resume and path.is_file():
        there, here = _flat(json.loads(path.read_text())), _flat(json.loads(text))
        other = [key for key in here | there if here.get(key) != there.get(key)]
        if other:
            key = other[0]
            raise VtokError(
                f"{out} holds a run with other settings ({key}: {there.get(key)} there, {here.get(key)} here); give "
                "another folder, or start anew with --no-resume"
            )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= value if isinstance(value, dict) else {key: value}
    return found
