"""Between seeing and answering: what a visual token shows is put into the words that stood for it so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtok.training import mixed
from vtok_eval.train.data import Batch, Scenes, moved
from vtok_eval.train.labels import Labels
from vtok_eval.train.language import Talk

#: weights of telling words apart, against the distance to a whole symbol, and how sharply they are told
TOLD = {"thing": 0.2, "colour": 0.05, "character": 0.1, "next": 0.1, "order": 0.05}
SHARP = 8.0

#: weight of telling each mark from its absence
MARKED = 0.15

#: weight of telling centres from the tokens around them, of which so many more are drawn
TRUE, AROUND = 3.0, 0.75

#: share of tokens drawn among those that show a character: one in fifteen does; and among centres, which answers are
#: looked up from: one in a hundred is one, and large things have most of the other tokens
READ, CENTRES = 0.2, 0.45

#: share of the tokens near centres, and of the others, that is collected: more pictures teach more than all of their
#: tokens
NEAR, OTHERS = 0.5, 0.06


class Words:
    """Trains the tower's last feed-forward and the projector, on what enters that feed-forward.

    Both work on one token at a time, so the tower runs once for each picture, without a backward pass, and a step
    draws tokens from all of them: a seventh of the time of a step that runs the tower, on four times the scenes.

    The language model has learnt on symbols alone; with a projector that has not, it does not begin to look at
    pictures (450 batches). The distance to symbols is not enough to learn from: what is uncertain shrinks, and 20 % of
    things and 5 % of characters came nearest to their own word; with cross entropies it was 66 and 50 %, at a distance
    of 0.47 instead of 0.41 (of the same features, by a projector of 640 channels). And LLaVA's projector is as narrow
    as its language model: on features as they were, it told 22 % of things with them, where a linear reading of the
    features told 81 %. The last feed-forward has room.

    A centre is told with its true chance. Which of four neighbours holds the centre of a thing is often open, and a
    loss that weighs centres and others the same lets all four say that they do: nothing can be counted then. Drawn as
    they come, the chances of a thing's tokens add up to one.

    Parameters
    ----------
    talk : Talk
        Standardised (``measure``).
    tokens : int
        Drawn in a step.

    Attributes
    ----------
    last : list of nn.Module
        What of the tower is trained.
    """

    def __init__(self, talk: Talk, tokens: int) -> None:
        self.talk, self.tokens = talk, tokens
        model = talk.model.model
        self.project = talk.project
        if talk.name == "nano-llava":
            layer = model.vision_tower.encoder.layers[-1]
            self.last = [layer.layer_norm2, layer.mlp]
        else:
            layer = model.visual.blocks[-1]
            self.last = [layer.norm2, layer.mlp]
        self.seen, self.wanted, self.summary, self.kept = (Tensor() for _ in range(4))
        self.shown: dict[str, Tensor] = {}
        self.unit = talk.model.get_input_embeddings().weight.detach().float().square().sum(-1).mean()
        self.vectors = talk.vectors()
        self.marks: dict[str, tuple[Tensor, Tensor]] = {}
        self.around = Tensor()

    @torch.no_grad()
    def measure(self, batch: Batch) -> None:
        """How much of a mark a symbol seems to hold, other words being there too: half way between with and without."""
        device = self.unit.device
        wanted = torch.cat(self.talk.words(batch.labels, device))
        shown = self._labels(batch.labels, device)
        for name, vector in self.talk.marks().items():
            held = wanted @ vector / vector.square().sum()
            on, among = shown[name] > 0.5, self._among(name, shown)
            self.marks[name] = vector, (held[among & on].mean() + held[among & ~on].mean()) / 2

    def _labels(self, truth: Sequence[Labels], device: torch.device) -> dict[str, Tensor]:
        names = (*TOLD, *self.talk.marks())
        found = {name: torch.cat([getattr(own, name).flatten() for own in truth]) for name in names}
        found["near"] = torch.cat([own.near().flatten() for own in truth])
        return {name: own.to(device) for name, own in found.items()}

    @torch.no_grad()
    def collect(self, scenes: Scenes) -> None:
        """Run the tower on all batches; keep what enters the last feed-forward, (tokens, patches each, D), of centres,
        characters and some of the others."""
        talk, device = self.talk, next(self.talk.parameters()).device
        seen, wanted, summary = [], [], []
        shown: list[dict[str, Tensor]] = []
        entered: list[Tensor] = []
        watch = self.last[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        try:
            for number in range(len(scenes)):
                batch = scenes[number]
                entered.clear()
                with mixed(device):
                    places, _ = talk.order(moved(batch.images, device))
                (hidden,) = entered
                if talk.name == "nano-llava":
                    summary.append(hidden[:, 0].float())
                    hidden = hidden[:, 1:].flatten(0, 1)
                found = self._labels(batch.labels, device)
                drawn = torch.rand(len(places), generator=torch.Generator().manual_seed(number)).to(device)
                always = found["centre"] | (found["character"] > 0)
                kept = always | (drawn < torch.where(found["near"], NEAR, OTHERS))
                seen.append(hidden.view(len(places), -1, hidden.shape[-1])[places][kept].bfloat16())
                wanted.append(torch.cat(talk.words(batch.labels, device))[kept].bfloat16())
                shown.append({name: own[kept] for name, own in found.items()})
        finally:
            watch.remove()
        self.seen, self.wanted = torch.cat(seen), torch.cat(wanted)
        self.shown = {name: torch.cat([own[name] for own in shown]) for name in shown[0]}
        self.around = self.shown["near"].nonzero()[:, 0]
        if summary:
            self.summary = torch.cat(summary)
            self.kept = self._last(self.summary)

    @staticmethod
    def _among(name: str, shown: dict[str, Tensor]) -> Tensor:
        """Of which tokens a mark is asked: a centre or a size only where there is something."""
        something = (shown["thing"] > 0) | (shown["character"] > 0)
        return torch.ones_like(something) if name == "framed" else something

    def _last(self, x: Tensor) -> Tensor:
        norm, mlp = self.last
        return x + mlp(norm(x))

    def step(self, _: Any) -> tuple[Tensor, dict[str, float]]:
        """Loss of tokens drawn by torch's generator, and which share of each kind of word is told from the others."""
        loss, numbers = self._drawn()
        some = self._some(self.around, round(AROUND * self.tokens))
        held = self._held("centre", self._say(some))
        centre = self.shown["centre"][some].float()
        # characters are all there, of the others near a centre a share
        weight = torch.where(self.shown["character"][some] > 0, NEAR, 1.0).where(centre < 1, NEAR)
        each = F.binary_cross_entropy_with_logits(held * SHARP, centre, weight)
        numbers["chance"] = each.item()
        return loss + TRUE * each, numbers

    def _say(self, index: Tensor) -> Tensor:
        """(n, D) what the projector makes of tokens."""
        hidden = self._last(self.seen[index].float())
        return self.project(hidden[:, 0] if self.talk.name == "nano-llava" else hidden.flatten(0, 1)).float()

    def _held(self, name: str, found: Tensor) -> Tensor:
        """How much of a mark there is in what was said, above half way."""
        vector, half = self.marks[name]
        return found @ vector / vector.square().sum() - half

    def _drawn(self) -> tuple[Tensor, dict[str, float]]:
        pools = [(self.shown["character"] > 0, READ), (self.shown["centre"] > 0, CENTRES)]
        drawn = [self._some(pool.nonzero()[:, 0], round(share * self.tokens)) for pool, share in pools]
        rest = torch.randint(len(self.seen), (self.tokens - sum(map(len, drawn)),))
        index = torch.cat((rest.to(self.seen.device), *drawn))
        found = self._say(index)
        shown = {name: own[index] for name, own in self.shown.items()}
        loss, numbers = self._loss(found, self.wanted[index].float(), shown)
        if len(self.summary):
            # the class token goes through the same feed-forward, and stays what it was
            some = torch.randint(len(self.summary), (64,)).to(self.summary.device)
            kept = self.kept[some]
            loss = loss + (self._last(self.summary[some]) - kept).square().sum() / kept.square().sum()
        return loss, numbers

    def _loss(self, found: Tensor, wanted: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        # but for how much of a centre they are: that is a chance
        centre = F.normalize(self.marks["centre"][0], dim=0)
        away = found - wanted
        loss = (away.square().sum(-1) - (away @ centre).square()).mean() / self.unit
        numbers = {"away": loss.item()}
        for name, (vectors, quarters) in self.vectors.items():
            target = labels[name]
            shown = target > 0
            if not shown.any():
                continue
            # a word as loud as it should be scores so much, and other words about 0
            sharp = SHARP / vectors[1:].square().sum(-1).mean()
            score = found[shown].roll(-quarters * found.shape[1] // 4, -1) @ vectors.T * sharp
            if name != "thing":
                score[:, 0] = -torch.inf
            loss = loss + TOLD[name] * F.cross_entropy(score, target[shown])
            numbers[name] = (score.argmax(-1) == target[shown]).float().mean().item()
        for name in self.marks:
            if name == "centre":
                continue
            among = self._among(name, labels)
            on = labels[name].float()[among]
            score = self._held(name, found[among]) * SHARP
            each, yes = F.binary_cross_entropy_with_logits(score, on, reduction="none"), on > 0.5
            if yes.any() and not yes.all():
                loss = loss + MARKED * (each[yes].mean() + each[~yes].mean())
                numbers[name] = ((score[yes] > 0).float().mean().item() + (score[~yes] < 0).float().mean().item()) / 2
        return loss, numbers

    @staticmethod
    def _some(indices: Tensor, count: int) -> Tensor:
        return indices[torch.randint(len(indices), (count,)).to(indices.device)] if len(indices) else indices
