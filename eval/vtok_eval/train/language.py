"""Second stage: questions and answers. An item's pictures are read once; each question sees them and itself only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtok_eval.models.nano import BORDER, END, IMAGE, QWEN, START
from vtok_eval.train.asked import mask, pooled, score
from vtok_eval.train.data import Batch, Turn, moved
from vtok_eval.train.hints import Hints
from vtok_eval.train.labels import CHARACTERS, COLOURS, THINGS, Labels

IGNORE = -100

#: numbers of answers begin at multiples of it, item by item
ITEM = 1000

#: weight of what is to be read half way
HINT = 0.2

#: of the parts of a symbol, what questions look for is louder, or a question finds itself rather than the token alike
LOUD = {"thing": 2.0, "character": 5.0, "place": 2.0, "order": 5.0}


@dataclass(frozen=True)
class Answers:
    """What a model says to the questions of a batch, answer token by answer token.

    Attributes
    ----------
    logits : (A, V) Tensor
        fp32.
    target, turn : (A,) Tensor
        The right token, and a number that tokens of one answer share.
    starts : list of list of int
        Columns at which questions begin, by item.
    """

    logits: Tensor
    target: Tensor
    turn: Tensor
    starts: list[list[int]]


class Talk(nn.Module):
    """A nano model with the loss of its answers.

    A sequence is one prefix (role, pictures) and many tails (question, answer, end). A block mask keeps the tails
    apart and every tail's positions go on where the prefix stops, so each is what a single question would be.

    Parameters
    ----------
    name : str
        ``"nano-llava"`` or ``"nano-qwen"``.
    model, processor
        The model and its processor.
    pool : int
        Average features over so many tokens each way; a pooled token stands at its first one's position, so what is
        learnt holds for all tokens. Four times faster at 2.

    Attributes
    ----------
    symbols : bool
        Put the words for what is there in the place of what the tower sees.
    hints : Hints or None
        What else is to be learnt where it watches a layer.
    remember : int
        Of so many batches' pictures ``read`` keeps what the tower made.
    blend : float or None
        Of what the tower sees, less the words for what is there, a share between this and 1 is added to those words,
        drawn anew for each picture.
    sparse : tuple of two float, or None
        Leave out tokens: of what things and characters cover, and of the background, at most such a share stays, drawn
        anew for each picture; the centres of things and characters always do. ``None`` keeps all.
    """

    model: Any
    mean: Tensor
    spread: Tensor
    close: float = 0.0

    def __init__(self, name: str, model: Any, processor: Any, pool: int = 1) -> None:
        super().__init__()
        self.name, self.model, self.pool, self.symbols = name, model, pool, False
        self.sparse: tuple[float, float] | None = None
        self.blend: float | None = None
        self.hints: Hints | None = None
        self.remember = 1
        self._seen: dict[int, tuple[Any, Tensor, Tensor, list[int]]] = {}
        width = model.config.vision_config.hidden_size
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        if name == "nano-llava":
            self.project.register_forward_pre_hook(lambda _, args: self._standard(args[0]))
        text = processor.tokenizer
        ids = lambda string: text(string, add_special_tokens=False).input_ids  # noqa: E731
        # a character is one token at a word's beginning and another one inside
        inside = lambda letter: [*ids(letter), text.convert_tokens_to_ids(f"##{letter}")]  # noqa: E731
        self._words = {
            # a background has a word too: after a norm, a token of a place alone would be nothing but that place
            "thing": [ids({"": "background", "text": "sign"}.get(word, word)) for word in THINGS],
            "colour": [ids(word) for word in COLOURS],
            "character": [inside(letter) if letter else [] for letter in CHARACTERS],
        }
        self._sides = [ids(word) for word in ("left", "right", "top", "bottom")]
        self._order = [ids(str(number)) for number in range(1, 10)]
        self._marks = {"centre": ids("center"), "framed": ids("frame"), "small": ids("smallest")}
        if name == "nano-llava":
            self.head, self.image = ids("user:"), ids(IMAGE)[0]
            self.before, self.after, self.ask = [], ids(BORDER), ids("assistant:")
            self.end = [text.eos_token_id]
        else:
            start, end, self.image, _ = text.convert_tokens_to_ids(QWEN)
            self.head, self.before, self.after = ids(f"{START}user"), [start], [end]
            self.ask = ids(f"{END}{START}assistant")
            self.end = [text.eos_token_id]

    @property
    def project(self) -> Any:
        """What makes visual tokens of the tower's: LLaVA's projector, Qwen's merger."""
        model = self.model.model
        return model.multi_modal_projector if self.name == "nano-llava" else model.visual.merger

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.spread

    @torch.no_grad()
    def measure(self, batch: Batch) -> None:
        """Standardise the tower's channels from here on, by their mean and spread over a batch.

        A few of DINOv2's channels are a hundred times the others, and the projector has no norm in front. What is
        learnt behind this is folded into the projector by ``fold``. Qwen's merger has a norm and needs none of it.
        """
        if self.name != "nano-llava":
            return
        pixels = moved(batch.images, self.mean.device)["pixel_values"]
        hidden = self.model.model.vision_tower(pixels).last_hidden_state[:, 1:].float().flatten(0, 1)
        self.mean.copy_(hidden.mean(0))
        self.spread.copy_(hidden.std(0) + 1e-6)

    @torch.no_grad()
    def fold(self) -> None:
        """Put the standardisation into the projector's first matrix, and stop standardising."""
        if self.name == "nano-llava":
            first = self.project.linear_1
            first.weight.div_(self.spread)
            first.bias.sub_(first.weight @ self.mean)
        self.mean.zero_()
        self.spread.fill_(1)

    def features(self, images: dict[str, Tensor]) -> list[Tensor]:
        """(tokens, D) of every picture, projected."""
        found = self.model.model.get_image_features(**images, return_dict=True, **self._layers())
        return list(found.pooler_output)

    def read(self, images: dict[str, Tensor]) -> list[Tensor]:
        """`features` with no gradient behind the projector; the tower is not run again for the last ``images``."""
        if id(images) not in self._seen:
            entered: list[Tensor] = []
            # in front of the standardisation, which the projector does again
            watch = self.project.register_forward_pre_hook(lambda _, args: entered.append(args[0]), prepend=True)
            try:
                with torch.no_grad():
                    order, sizes = self.order(moved(images, next(self.parameters()).device))
            finally:
                watch.remove()
            while len(self._seen) >= self.remember:
                del self._seen[next(iter(self._seen))]
            self._seen[id(images)] = images, entered[0], order, sizes  # as long as they are held, the number is theirs
        _, hidden, order, sizes = self._seen[id(images)]
        return list(self.project(hidden).flatten(0, -2)[order].split(sizes))

    def order(self, images: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
        """Where among the projector's outputs each picture's tokens are (Qwen's go by windows), and how many."""
        watch = self.project.register_forward_hook(_numbered)
        try:
            found = self.features(images)
        finally:
            watch.remove()
        return torch.cat(found)[:, 0].long(), [len(own) for own in found]

    def _layers(self) -> dict[str, Any]:
        config = self.model.config
        if self.name != "nano-llava":
            return {}
        return {
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }

    def vectors(self) -> dict[str, tuple[Tensor, int]]:
        """(words, D) of each kind of word as a symbol holds them, and by how many quarters it turns them."""
        table = self.model.get_input_embeddings().weight.detach().float()
        sums = {
            name: torch.stack([table[ids].mean(0) if ids else 0 * table[0] for ids in words])
            for name, words in self._words.items()
        }
        order = torch.stack([0 * table[0], *(table[ids].mean(0) for ids in self._order)])
        # the embeddings of characters have half of their length in common: what tells them apart would be a quarter of
        # a symbol, and nothing was read in 3000 batches
        for apart in (sums["character"], order):
            apart[1:] -= apart[1:].mean(0)
        loud = {name: LOUD.get(name, 1.0) * vectors for name, vectors in (sums | {"order": order}).items()}
        turned = {"next": (loud["character"], 2), "order": (loud["order"], 1)}
        return {name: (loud[name], 0) for name in sums} | turned

    def words(self, truth: list[Labels], device: torch.device) -> list[Tensor]:
        """(tokens, D) of every picture: the embeddings of the words for what each token looks at, added up.

        Besides names, colours and characters these are the place, "center" where a thing or a character has its own,
        "frame" inside one, more or less of "smallest" on a thing, and, turned by a half and a quarter of the channels,
        a second character in the same cell and the number of the character in its word.
        """
        table = self.model.get_input_embeddings().weight.detach().float()
        marks, words = self.marks(), self.vectors()
        found = []
        for own in truth:
            total = self._places(table, *own.thing.shape)
            for name, vector in marks.items():
                total = total + getattr(own, name).flatten().to(device)[:, None] * vector
            for name, (vectors, quarters) in words.items():
                index = getattr(own, name).flatten().to(device).clamp(min=0)
                total = total + vectors.roll(quarters * vectors.shape[1] // 4, -1)[index]
            found.append(total)
        return found

    def marks(self) -> dict[str, Tensor]:
        """(D,) of each word that a symbol holds more or less of."""
        table = self.model.get_input_embeddings().weight.detach().float()
        return {name: table[ids].mean(0) for name, ids in self._marks.items()}

    def _places(self, table: Tensor, rows: int, columns: int) -> Tensor:
        """(tokens, D) between the words left and right, top and bottom.

        LLaVA's language model counts tokens row after row, and cannot tell columns from that; Qwen's knows how far
        apart two tokens are, and learnt nothing of places from it in 2000 batches. Both towers' features know where
        they are: a linear reading misses by 4 % of a side with LLaVA's, by 6 to 10 % with Qwen's.
        """
        left, right, top, bottom = (table[ids].mean(0) for ids in self._sides)
        across = torch.linspace(0, 1, columns, device=table.device)[None, :, None]
        down = torch.linspace(0, 1, rows, device=table.device)[:, None, None]
        across, down = ((1.5 * (x - 0.5) + 0.5).clamp(0, 1) for x in (across, down))
        total = (1 - across) * left + across * right + (1 - down) * top + down * bottom
        return LOUD["place"] * total.flatten(0, 1)

    def _kept(self, truth: list[Labels]) -> list[Tensor]:
        """(kept,) indices of the tokens of every picture that stay."""
        found = []
        for own, shares in zip(truth, self._shares(), strict=False):
            shown = ((own.thing > 0) | own.framed).flatten()
            stays = torch.rand(len(shown)) < torch.where(shown, shares[0], shares[1])
            found.append((stays | own.centre.flatten()).nonzero()[:, 0])
        return found

    def _shares(self) -> Iterator[Tensor]:
        """(2,) shares that stay of what is shown and of the background, picture by picture, without an end."""
        while True:
            yield torch.rand(2) ** 2 * torch.tensor(self.sparse)

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean loss over the questions, each weighing the same, and the share of answers that are right, by task."""
        device = next(self.parameters()).device
        features = self.words(batch.labels, device) if self.symbols else self.read(batch.images)
        if self.blend is not None:
            words = self.words(batch.labels, device)
            shares = (self.blend + (1 - self.blend) * torch.rand(len(words))).tolist()
            features = [word + share * (own - word) for word, share, own in zip(words, shares, features, strict=True)]
        flat = [grid for own in batch.grids for grid in own]
        if self.pool > 1:
            features = [pooled(own, grid, self.pool) for own, grid in zip(features, flat, strict=True)]
        kept = [torch.arange(len(own)) for own in features] if self.sparse is None else self._kept(batch.labels)
        features = [own[index.to(device)] for own, index in zip(features, kept, strict=True)]
        answers = self.answers(batch, features, kept)
        tasks = [t.task for turns in batch.turns for t in turns]
        loss, numbers = score(answers.logits, answers.target, answers.turn, tasks)
        if self.hints is None or self.hints.states is None:
            return loss, numbers
        embed = self.model.get_input_embeddings()
        hint, right = self.hints.loss(batch, answers.starts, len(self.ask), embed.weight)
        return loss + HINT * hint, numbers | right

    def answers(self, batch: Batch, features: list[Tensor], kept: list[Tensor]) -> Answers:
        """What the model says to all questions of a batch.

        Parameters
        ----------
        batch : Batch
            Questions and grids.
        features : list of (kept, D) Tensor
            What stands of every picture.
        kept : list of (kept,) Tensor
            Where it stands, ascending.
        """
        device = next(self.parameters()).device
        embed = self.model.get_input_embeddings()
        left = iter(kept)
        closed = self.name == "nano-llava" and torch.rand(()).item() < self.close
        rows = [
            self._row(grids, turns, [next(left).tolist() for _ in grids], closed)
            for grids, turns in zip(batch.grids, batch.turns, strict=True)
        ]
        longest = max(len(row["ids"]) for row in rows)
        shape = len(rows), longest
        ids, labels, block = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE), torch.full(shape, -1)
        positions = torch.zeros(3, *shape, dtype=torch.long)
        for number, row in enumerate(rows):
            size = len(row["ids"])
            ids[number, :size] = torch.tensor(row["ids"])
            labels[number, :size] = torch.tensor(row["labels"])
            block[number, :size] = torch.tensor(row["block"])
            positions[:, number, :size] = torch.tensor(row["positions"]).T
        ids, labels, block, positions = (x.to(device) for x in (ids, labels, block, positions))
        inputs = embed(ids)
        inputs = inputs.masked_scatter((ids == self.image)[..., None], torch.cat(features).to(inputs.dtype))
        hidden = self.model.model.language_model(
            inputs_embeds=inputs,
            attention_mask=mask(block, inputs.dtype),
            position_ids=positions if self.name == "nano-qwen" else positions[0],
            use_cache=False,
        ).last_hidden_state
        starts = [
            [row["block"].index(tail) for tail in range(1, len(turns) + 1)]
            for row, turns in zip(rows, batch.turns, strict=True)
        ]
        # only answers meet the vocabulary; column i predicts label i + 1
        answers = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        logits = self.model.lm_head(hidden[:, :-1][answers]).float()
        target = labels[:, 1:][answers]
        turn = block[:, 1:][answers] + answers[0] * ITEM
        return Answers(logits, target, turn, starts)

    def _row(
        self,
        grids: list[tuple[int, int]],
        turns: list[Turn],
        kept: list[list[int]] | None = None,
        closed: bool = False,
    ) -> dict[str, list[Any]]:
        ids: list[int] = list(self.head)
        positions = [[i] * 3 for i in range(len(ids))]
        begin = len(ids)
        for number, (height, width) in enumerate(grids):
            start = self._text(self.before, ids, positions, begin)
            cells = [(y, x) for y in range(0, height, self.pool) for x in range(0, width, self.pool)]
            if kept is not None:
                cells = [cells[index] for index in kept[number]]
            ids += [self.image] * len(cells)
            if self.name == "nano-qwen":
                positions += [[start, start + y, start + x] for y, x in cells]
                start += max(height, width)
            elif closed:
                positions += [[start + i] * 3 for i in range(len(cells))]
                start += len(cells)
            else:
                positions += [[start + y * width + x] * 3 for y, x in cells]
                start += height * width
            begin = self._text(self.after, ids, positions, start)
        labels, block = [IGNORE] * len(ids), [0] * len(ids)
        for number, turn in enumerate(turns, 1):
            asked, said = [*turn.question, *self.ask], [*turn.answer, *self.end]
            ids += asked + said
            labels += [IGNORE] * len(asked) + said
            block += [number] * (len(asked) + len(said))
            positions += [[begin + i] * 3 for i in range(len(asked) + len(said))]
        return {"ids": ids, "labels": labels, "block": block, "positions": positions}

    @staticmethod
    def _text(part: list[int], ids: list[int], positions: list[list[int]], start: int) -> int:
        """Append text at a position; where the next thing begins. Behind a picture that is one past its largest."""
        ids += part
        positions += [[start + i] * 3 for i in range(len(part))]
        return start + len(part)


def _numbered(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """Each token's number in place of what it is, fp32."""
    shape = output.shape[:-1]
    return torch.arange(shape.numel(), dtype=torch.float32, device=output.device).view(*shape, 1)
