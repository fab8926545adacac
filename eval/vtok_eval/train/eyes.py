"""First stage of small-llava: its tower learns to say what every token looks at, and to say it in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok_eval.train import lora
from vtok_eval.train.labels import CHARACTERS, COLOURS, IGNORE, THINGS, Labels
from vtok_eval.train.tower import Heads, Tower, distance

#: weight of the tower's distance from what it was; DINOv2 knows more of the world than scenes can teach
CLOSE = 6.0

#: what the projector is to say of a token: a field of ``Labels``, and the words for its classes
SAID: dict[str, tuple[str, ...]] = {
    "thing": THINGS,
    "colour": COLOURS,
    "character": CHARACTERS,
    "order": ("", *map(str, range(1, 10))),
}
SIDES = ("left", "right", "top", "bottom")
#: how loud each is: what questions look for before what stands everywhere
LOUD = {"thing": 1.0, "colour": 0.5, "character": 1.0, "order": 0.7, "sides": 0.3}
#: embeddings of letters have half of their length in common, which tells none of them apart
APART = ("character", "order", "sides")


class Eyes(Tower):
    """The tower with its readings: what each token looks at, and for the class token what is there at all.

    Its features stay near those of the frozen tower, and the projector is pulled towards the words for what is seen.
    """

    #: share of the steps that run the frozen tower, too
    compared = 0.5

    def __init__(self, model: Any, processor: Any, changes: nn.ModuleList, share: float = 2 / 3) -> None:
        nn.Module.__init__(self)
        self.name, self.share = "nano-llava", share
        self.tower, self.projector, self.changes = model.model.vision_tower, model.model.multi_modal_projector, changes
        width, depth = model.config.vision_config.hidden_size, model.config.vision_config.num_hidden_layers
        self.heads = Heads(width, width)
        self.layer = model.config.vision_feature_layer % (depth + 1)
        layers = self.tower.encoder.layer
        self.first = next(i for i, layer in enumerate(layers) if any(isinstance(m, lora.Lora) for m in layer.modules()))
        self.words = nn.ParameterList(
            nn.Parameter(_spelt(names, model, processor, name), requires_grad=False) for name, names in SAID.items()
        )
        self.sides = nn.Parameter(_spelt(SIDES, model, processor, "sides"), requires_grad=False)

    def _llava(self, pixels: Tensor, grid: tuple[int, int], truth: list[Labels]) -> tuple[Tensor, dict[str, float]]:
        window = self._window(grid)
        top, left, rows, columns = window
        index = torch.arange(grid[0] * grid[1], device=pixels.device).view(grid)
        index = index[top : top + rows, left : left + columns].flatten() + 1
        states = [self.tower.embeddings(pixels)[:, torch.cat((index.new_zeros(1), index))]]
        for layer in self.tower.encoder.layer:
            states.append(layer(states[-1]))
        cut = [own.window(*window) for own in truth]
        tokens = states[self.layer][:, 1:]
        loss, numbers = self.heads.loss(tokens.flatten(0, 1), states[-1][:, 0], cut)
        target, known = self.targets(cut, grid, window)
        said = self.projector(tokens.flatten(0, 1))[known].float()
        near = F.cosine_similarity(said, target[known], dim=-1).mean()
        loss, numbers["word"] = loss + 1 - near, near.item()
        if torch.rand(()) < self.compared:
            away = distance(tokens, self._before(states[self.first])[:, 1:])
            loss, numbers["distance"] = loss + CLOSE / self.compared * away, away.item()
        return loss, numbers

    @torch.no_grad()
    def _before(self, hidden: Tensor) -> Tensor:
        """What the projector would read of the frozen tower, from what enters its first changed block."""
        with lora.without(self.changes):
            for layer in self.tower.encoder.layer[self.first : self.layer]:
                hidden = layer(hidden)
        return hidden

    def targets(
        self, truth: list[Labels], grid: tuple[int, int], window: tuple[int, int, int, int]
    ) -> tuple[Tensor, Tensor]:
        """(n, D) sum of the words for what each token looks at and where, and (n,) bool where there is anything."""
        top, left, rows, columns = window
        total: Any = 0
        for table, name in zip(self.words, SAID, strict=True):
            classes = torch.cat([getattr(own, name).flatten() for own in truth]).to(table.device)
            total = total + table[classes.where(classes != IGNORE, 0)]
        known = total.abs().sum(-1) > 0
        west, east, north, south = self.sides
        across = torch.linspace(0, 1, grid[1], device=east.device)[left : left + columns].expand(rows, -1)[..., None]
        down = torch.linspace(0, 1, grid[0], device=east.device)[top : top + rows, None].expand(-1, columns)[..., None]
        place = (1 - across) * west + across * east + (1 - down) * north + down * south
        return total + place.flatten(0, 1).repeat(len(truth), 1), known


def _spelt(names: Sequence[str], model: Any, processor: Any, kind: str) -> Tensor:
    """(len(names), D) mean embedding of each name's tokens, less what all of the kind have in common, of length
    ``LOUD``; zeros for the empty name."""
    table, rows = model.get_input_embeddings().weight.detach().float(), []
    for name in names:
        ids = processor.tokenizer(f" {name}", add_special_tokens=False).input_ids
        rows.append(table[ids].mean(0))
    found = torch.stack(rows)
    some = torch.tensor([bool(name) for name in names], device=found.device)
    found = found - found[some].mean(0) if kind in APART else found
    found = LOUD[kind] * F.normalize(found, dim=-1) * some[:, None]
    # a digit as a character's number in its word must not be a digit that is to be read
    return found.roll(found.shape[1] // 2, -1) if kind == "order" else found
