"""Second stage of small-llava: the projector learns, token by token, to say what is seen in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from vtok_eval.train.data import Scenes, moved
from vtok_eval.train.eyes import SAID, Eyes
from vtok_eval.train.labels import IGNORE

#: tokens in a step, a half of them centres of things and of characters
DRAWN = 1024
#: of the other tokens such a share is kept
OTHERS = 0.12
#: how sharply a word stands out from the others
SHARP = 20.0


class Spelling(nn.Module):
    """The projector on features that a frozen tower gave once.

    The direction of a target alone left most things unnamed: cross entropies over the words stand beside it. What
    goes out is held at one length, which a direction leaves open: it grew to twelve times that of a word, and the
    language model's layers added next to nothing to it.

    Parameters
    ----------
    model
        With changes in place.
    eyes : Eyes
        The tower, trained, and the words.
    loud : float
        Length of a visual token.

    Attributes
    ----------
    stream : Scenes or None
        What the first step collects features from.
    """

    stream: Scenes | None = None

    def __init__(self, model: Any, eyes: Eyes, loud: float) -> None:
        super().__init__()
        self.parts, self.loud = [model, eyes], loud  # in a list: no parts of this module
        self.projector = model.model.multi_modal_projector
        self.seen: Tensor = torch.empty(0)

    @torch.no_grad()
    def collect(self, scenes: Scenes) -> None:
        """Run the tower over all batches."""
        model, eyes = self.parts
        device = next(self.projector.parameters()).device
        seen, wanted, centres = [], [], []
        classes: dict[str, list[Tensor]] = {name: [] for name in SAID}
        for number in range(len(scenes)):
            batch = scenes[number]
            pixels = moved(batch.images, device)["pixel_values"]
            tokens = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[eyes.layer][:, 1:]
            rows, columns = batch.grids[0][0]
            target, _ = eyes.targets(batch.labels, (rows, columns), (0, 0, rows, columns))
            centre = torch.cat([own.centre.flatten() for own in batch.labels]).to(device)
            letters = torch.cat([own.character.flatten() for own in batch.labels]).to(device) > 0
            drawn = torch.rand(len(centre), generator=torch.Generator().manual_seed(number)).to(device) < OTHERS
            kept = centre | letters | drawn
            seen.append(tokens.flatten(0, 1)[kept].float())
            wanted.append(target[kept])
            centres.append(centre[kept])
            for name, into in classes.items():
                into.append(torch.cat([getattr(own, name).flatten() for own in batch.labels]).to(device)[kept])
        self.seen, self.wanted = torch.cat(seen), torch.cat(wanted)
        self.centres = torch.cat(centres).nonzero()[:, 0]
        self.classes = {name: torch.cat(found) for name, found in classes.items()}

    def step(self, _: Any) -> tuple[Tensor, dict[str, float]]:
        """Loss of a draw."""
        if self.stream is not None and not len(self.seen):
            self.collect(self.stream)
        eyes = self.parts[1]
        half = self.centres[torch.randint(len(self.centres), (DRAWN // 2,)).to(self.centres.device)]
        index = torch.cat((half, torch.randint(len(self.seen), (DRAWN // 2,)).to(half.device)))
        said = self.projector(self.seen[index]).float()
        near = F.cosine_similarity(said, self.wanted[index], dim=-1).mean()
        loud = said.norm(dim=-1) / self.loud
        loss = 1 - near + (loud - 1).square().mean()
        numbers = {"word": near.item(), "loud": loud.mean().item()}
        for name, table in zip(SAID, eyes.words, strict=True):
            target = self.classes[name][index]
            logits = SHARP * F.normalize(said, dim=-1) @ F.normalize(table, dim=-1).T
            loss = loss + 0.3 * F.cross_entropy(logits, target, ignore_index=IGNORE)
            shown = target > 0
            if shown.any():
                numbers[name] = (logits.argmax(-1) == target)[shown].float().mean().item()
        return loss, numbers


class Draws(Dataset):
    """Steps without a batch: the stage draws its own tokens."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> int:
        return step
