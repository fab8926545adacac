"""Pictures of reconstructions: what 1, 2, 4, ... tokens show. Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from vtok.errors import VtokError
from vtok.show import INK, PAPER
from vtok.tokenizers.metrics import psnr
from vtok.tokenizers.nested import powers_of_two

GAP, CELL, LETTERS = 8, 128, 15


@torch.no_grad()
def reconstructions(
    tokenizer: Any, images: Tensor, ks: Sequence[int] | None = None, *, cell: int = CELL, **decoding: Any
) -> Image.Image:
    """A row a picture: the picture, then what its first 1, 2, 4, ... tokens decode to, with the PSNR.

    Parameters
    ----------
    tokenizer : FlexTok
        In eval mode.
    images : Tensor
        (B, 3, H, W) in [0, 1], at the tokenizer's size.
    ks : sequence of int, optional
        Numbers of tokens; all doublings by default.
    cell : int
        Pixels a side at least; small pictures are enlarged by whole factors.
    **decoding
        To ``tokenizer.decode``.

    Raises
    ------
    VtokError
        No picture.
    """
    if not len(images):
        raise VtokError("there is no picture to draw; give one at least")
    config = tokenizer.config
    chosen = list(ks or (powers_of_two(config.tokens) if config.ordered else [config.tokens]))
    tokens = tokenizer.encode(images)
    columns: list[tuple[Tensor, list[float] | None]] = [(images.cpu(), None)]
    for k in chosen:
        found = tokenizer.decode(tokens[:, :k], **decoding).cpu()
        columns.append((found, psnr(found, images.cpu()).tolist()))
    heads = ["picture", *(f"{k} token{'s' * (k > 1)}" for k in chosen)]
    return _table(columns, heads, cell)


def _table(columns: Sequence[tuple[Tensor, list[float] | None]], heads: Sequence[str], cell: int) -> Image.Image:
    height, width = columns[0][0].shape[-2:]
    factor = max(1, cell // max(height, width))
    across, down = width * factor, height * factor
    line = LETTERS + GAP
    size = (GAP + len(columns) * (across + GAP), line + GAP + len(columns[0][0]) * (down + line + GAP))
    canvas = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=LETTERS)
    for column, (pictures, notes) in enumerate(columns):
        left = GAP + column * (across + GAP)
        middle = left + across // 2
        draw.text((middle, GAP), heads[column], fill=INK, font=font, anchor="ma")
        for row, picture in enumerate(pictures):
            top = line + GAP + row * (down + line + GAP)
            enlarged = to_pil_image(picture).resize((across, down), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left, top))
            if notes is not None:
                text = f"{notes[row]:.1f} dB"
                draw.text((middle, top + down + GAP // 2), text, fill=INK, font=font, anchor="ma")
    return canvas
