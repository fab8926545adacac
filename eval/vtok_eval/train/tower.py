"""First stage: a vision tower learns to say what every token looks at, and the class token what is there at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok_eval.train.data import Batch, moved
from vtok_eval.train.labels import CHARACTERS, COLOURS, IGNORE, THINGS, Labels

#: classes of a token, and what is told of it with yes or no
CLASSES = {
    "thing": len(THINGS),
    "colour": len(COLOURS),
    "character": len(CHARACTERS),
    "next": len(CHARACTERS),
    "order": 10,
}
MARKS = ("centre", "framed", "small")


class Heads(nn.Module):
    """Linear readings of a token; thrown away after training.

    Parameters
    ----------
    width : int
        Of a token.
    pooled : int
        Of the picture's summary: the class token, or the mean where there is none.
    """

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.norm, self.pooled_norm = nn.LayerNorm(width), nn.LayerNorm(pooled)
        self.read = nn.Linear(width, sum(CLASSES.values()) + len(MARKS))
        self.present = nn.Linear(pooled, len(THINGS))

    def loss(self, tokens: Tensor, pooled: Tensor, truth: list[Labels]) -> tuple[Tensor, dict[str, float]]:
        """Cross entropies of (n, width) tokens, and of (images, pooled) what is present.

        Tokens that show nothing outnumber the others by far, and those of large things the centres, from which answers
        are looked up: each kind has a mean of its own.
        """
        *maps, marks = self.read(self.norm(tokens)).float().split((*CLASSES.values(), len(MARKS)), -1)
        numbers: dict[str, float] = {}
        total = tokens.new_zeros((), dtype=torch.float32)
        wanted = {
            name: torch.cat([getattr(own, name).flatten() for own in truth]).to(tokens.device)
            for name in (*CLASSES, *MARKS)
        }
        something, lettered = wanted["thing"] != 0, wanted["character"] > 0
        centres = wanted["centre"] > 0
        for name, logits in zip(CLASSES, maps, strict=True):
            target = wanted[name]
            each = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
            shown = (target != 0) & (target != IGNORE)
            # a second character, and a place in a word, are asked of characters only
            other = lettered & (target == 0) if name in ("next", "order") else target == 0
            for kind, weight in ((shown, 1.0), (other, 0.5), (shown & centres, 1.0)):
                total = total + weight * _mean(each, kind)
            numbers[name] = _mean((logits.argmax(-1) == target).float(), shown).item()
        numbers["told"] = _mean((maps[0].argmax(-1) == wanted["thing"]).float(), centres & something).item()
        for name, logit in zip(MARKS, marks.unbind(-1), strict=True):
            target = wanted[name].float()
            each = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
            among = torch.ones_like(something) if name == "framed" else something
            for kind in (target > 0.5, target <= 0.5):
                total = total + 0.3 * _mean(each, among & kind)
        target = torch.stack([own.present() for own in truth]).to(pooled.device)
        logits = self.present(self.pooled_norm(pooled)).float()
        total = total + 20 * F.binary_cross_entropy_with_logits(logits, target)
        hits = (logits > 0) & (target > 0)
        numbers["present"] = (hits.sum() / ((logits > 0).sum() + (target > 0).sum()).clamp(min=1) * 2).item()
        return total, numbers


def _mean(values: Tensor, among: Tensor) -> Tensor:
    return (values * among).sum() / among.sum().clamp(min=1)


class Tower(nn.Module):
    """The vision side of a nano model with its readings.

    Tokens are what enters LLaVA's projector, and what leaves Qwen's merger. With a teacher (a ``Dinov2Model`` cut to
    the layers that are taken over) patches also stay close to the teacher's: without it, labels alone at a rate of 5e-4
    led a linear reading of objects from 82 % right down to 48 % in 500 steps. A step sees a window of each picture, two
    thirds of it each way: 44 % of the tokens, and a fifth of the attention, whose backward pass is half the time of a
    step on a CPU.
    """

    def __init__(self, name: str, model: Any, teacher: Any = None, share: float = 2 / 3) -> None:
        super().__init__()
        self.name, self.share = name, share
        self.teacher = [teacher]  # in a list: no part of this module, its weights, or its checkpoint
        self.tower = model.model.vision_tower if name == "nano-llava" else model.model.visual
        width = model.config.vision_config.hidden_size
        self.heads = Heads(width if name == "nano-llava" else model.config.text_config.hidden_size, width)

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch."""
        images = moved(batch.images, next(self.parameters()).device)
        grids = [grid for own in batch.grids for grid in own]
        if self.name == "nano-llava":
            return self._llava(images["pixel_values"], grids[0], batch.labels)
        return self._qwen(images["pixel_values"], grids, batch.labels)

    def _window(self, grid: tuple[int, int]) -> tuple[int, int, int, int]:
        rows, columns = (max(1, round(side * self.share)) for side in grid)
        top, left = (int(torch.randint(side - own + 1, ())) for side, own in zip(grid, (rows, columns), strict=True))
        return top, left, rows, columns

    def _llava(self, pixels: Tensor, grid: tuple[int, int], truth: list[Labels]) -> tuple[Tensor, dict[str, float]]:
        window = self._window(grid)
        top, left, rows, columns = window
        index = torch.arange(grid[0] * grid[1], device=pixels.device).view(grid)
        index = index[top : top + rows, left : left + columns].flatten() + 1
        index = torch.cat((index.new_zeros(1), index))
        hidden = self.tower.embeddings(pixels)[:, index]
        hidden = self.tower.encoder(inputs_embeds=self.tower.pre_layrnorm(hidden)).last_hidden_state
        cut = [own.window(*window) for own in truth]
        loss, numbers = self.heads.loss(hidden[:, 1:].flatten(0, 1), hidden[:, 0], cut)
        if self.teacher[0] is not None:
            with torch.no_grad():
                wanted = self.teacher[0].embeddings(pixels)[:, index]
                wanted = self.teacher[0].encoder(wanted).last_hidden_state
            away = distance(hidden[:, 1:], wanted[:, 1:])
            loss, numbers["distance"] = loss + 12 * away, away.item()
        return loss, numbers

    def _qwen(
        self, pixels: Tensor, grids: list[tuple[int, int]], truth: list[Labels]
    ) -> tuple[Tensor, dict[str, float]]:
        parts, cut, shapes = [], [], []
        for own, grid, maps in zip(pixels.split([4 * h * w for h, w in grids]), grids, truth, strict=True):
            window = self._window(grid)
            top, left, rows, columns = window
            # rows of pixels come by merge unit: four patches each
            parts.append(own.view(*grid, -1)[top : top + rows, left : left + columns].reshape(-1, own.shape[-1]))
            cut.append(maps.window(*window))
            shapes.append([1, 2 * rows, 2 * columns])
        output = self.tower(torch.cat(parts), grid_thw=torch.tensor(shapes, device=pixels.device))
        # in window order, which a mean does not mind
        lengths = [height * width for _, height, width in shapes]
        hidden = output.last_hidden_state.split(lengths)
        loss, numbers = self.heads.loss(output.pooler_output, torch.stack([own.mean(0) for own in hidden]), cut)
        if self.teacher[0] is not None:
            away = torch.stack([self._away(*each) for each in zip(hidden, parts, shapes, strict=True)]).mean()
            loss, numbers["distance"] = loss + 12 * away, away.item()
        return loss, numbers

    def _away(self, hidden: Tensor, pixels: Tensor, shape: list[int]) -> Tensor:
        """Distance of one picture's patches (n, D), in window order, from what the teacher makes of the picture."""
        rows, columns, size = shape[1] // 2, shape[2] // 2, self.tower.patch_size
        # (row, column, 2, 2, channel, frame, y, x); the frames of a still are the same
        image = pixels.view(rows, columns, 2, 2, 3, 2, size, size)[:, :, :, :, :, 0]
        image = image.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, rows * 2 * size, columns * 2 * size)
        with torch.no_grad():
            wanted = self.teacher[0](image).last_hidden_state[0, 1:]
        wanted = wanted.view(rows, 2, columns, 2, -1).permute(0, 2, 1, 3, 4).flatten(0, 1)
        side = self.tower.window_size // (2 * size)
        units = [(y, x) for y in range(rows) for x in range(columns)]
        order = sorted(range(len(units)), key=lambda i: (units[i][0] // side, units[i][1] // side, *units[i]))
        return distance(hidden, wanted[order].flatten(0, 2))


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of tokens less their means (which no norm sees), relative to the wanted ones' size."""
    found, wanted = (x.float() - x.float().mean(-1, keepdim=True) for x in (found, wanted))
    return (found - wanted).square().sum() / wanted.square().sum()


@contextmanager
def matmul_patches(model: Any) -> Iterator[None]:
    """Qwen's patch embedding as the matrix product that it is, while training.

    Its 3-D convolution has one position a patch; its backward pass in bfloat16 took 1.9 of 4.9 seconds of a step.
    """
    embed = getattr(getattr(model.model, "visual", None), "patch_embed", None)
    if embed is None:
        yield
        return
    weight = embed.proj.weight
    embed.forward = lambda pixels: F.linear(pixels.to(weight.dtype), weight.flatten(1))
    try:
        yield
    finally:
        del embed.forward
