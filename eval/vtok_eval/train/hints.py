"""Supervision half way: what a question's words have to have found in the pictures before an answer can be given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok_eval.train.data import Batch, Turn
from vtok_eval.train.labels import CHARACTERS, COLOURS, IGNORE, THINGS, Labels

#: classes of what is read at a name: in the first picture, in the second, in which ninth of the picture where it is
#: there once, how often, of which colour
SIZES = {
    "first": 2,
    "second": 2,
    "across": 3,
    "down": 3,
    "count": 8,
    "colour": len(COLOURS),
}


class Hints(nn.Module):
    """Linear readings of question tokens behind the first half of the layers; thrown away after training.

    From answers alone a name learnt to look for itself in the picture after 1500 to 3000 batches, and places were not
    learnt within 4000: nothing leads there step by step. With these readings places were at 83 % after 450. The word
    before a question's mark is to hold the embedding of what is to be named, or of the number, and every character that
    of the next: with a linear reading of its own for that, nothing was named for 1200 batches.

    Parameters
    ----------
    tokenizer
        Of the model.
    width : int
        Of a token.
    """

    def __init__(self, tokenizer: Any, width: int) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(width), nn.Linear(width, sum(SIZES.values()))
        found = {name: tuple(tokenizer(name, add_special_tokens=False).input_ids) for name in THINGS[1:]}
        self._names = {ids: number for number, (name, ids) in enumerate(found.items(), 1) if name != "text"}
        self._first = {ids[0] for ids in self._names}
        self._longest = max(map(len, self._names))
        self._answers = [list(ids) for ids in found.values()]
        # a character is one token at a word's beginning and another one inside
        pieces = [piece for letter in CHARACTERS[1:] for piece in (letter, f"##{letter}")]
        tokens = tokenizer.convert_tokens_to_ids(pieces)
        self._characters = {token: number for number, token in enumerate(tokens, len(self._answers))}
        self._answers += [[token] for token in tokens]
        self.states: Tensor | None = None

    def watch(self, layer: nn.Module) -> Any:
        """Keep what leaves a layer, for ``loss``; a handle that ends it."""

        def keep(_: Any, __: Any, output: Any) -> None:
            self.states = output[0] if isinstance(output, tuple) else output

        return layer.register_forward_hook(keep)

    def targets(self, turn: Turn, truth: Sequence[Labels], between: int) -> list[tuple[int, dict[str, int]]]:
        """Positions in a turn, and what can be read there; ``between`` tokens stand between question and answer."""
        found, position = [], 0
        while position < len(turn.question):
            size, number = self._name(turn.question[position:])
            if size:
                found.append((position + size - 1, _about(number, truth)))
            position += max(1, size)
        last = len(turn.question) - 2
        if turn.task in ("objects", "detail"):
            found.append((last, {"answer": self._names[tuple(turn.answer)] - 1}))
        if turn.task == "count":
            found.append((last, {"answer": self._characters[turn.answer[0]]}))
        if turn.task == "text":
            spelt = [self._characters.get(token) for token in turn.answer]  # a few words to be read are one token
            places = [last, *range(len(turn.question) + between - 1, len(turn.question) + between + len(spelt) - 1)]
            read = zip(places, spelt[:1] + spelt, strict=True)
            found += [(place, {"answer": number}) for place, number in read if number is not None]
        return found

    def _name(self, ids: list[int]) -> tuple[int, int]:
        if ids[0] in self._first:
            for size in range(min(self._longest, len(ids)), 0, -1):
                if tuple(ids[:size]) in self._names:
                    return size, self._names[tuple(ids[:size])]
        return 0, 0

    def loss(
        self, batch: Batch, starts: Sequence[Sequence[int]], between: int, table: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean cross entropy of all readings, and how many are right.

        Parameters
        ----------
        batch : Batch
            That ran.
        starts : sequence of sequence of int
            Column of each question's first token, by item.
        between : int
            Tokens between a question and its answer.
        table : Tensor
            (vocabulary, width) embeddings.
        """
        if self.states is None:
            raise AssertionError("no layer is being watched")
        labels, rows, columns, wanted = iter(batch.labels), [], [], []
        for number, (grids, turns, begins) in enumerate(zip(batch.grids, batch.turns, starts, strict=True)):
            truth = [next(labels) for _ in grids]
            for turn, start in zip(turns, begins, strict=True):
                for position, target in self.targets(turn, truth, between):
                    rows.append(number)
                    columns.append(start + position)
                    wanted.append(target)
        device = self.states.device
        states = self.norm(self.states[rows, columns])
        logits = dict(zip(SIZES, self.read(states).float().split(list(SIZES.values()), -1), strict=True))
        answers = torch.stack([table[ids].float().mean(0) for ids in self._answers])
        logits["answer"] = states.float() @ answers.T
        total, right = states.new_zeros((), dtype=torch.float32), {}
        for name, own in logits.items():
            classes = torch.tensor([each.get(name, IGNORE) for each in wanted], device=device)
            if (classes == IGNORE).all():
                continue
            total = total + F.cross_entropy(own, classes, ignore_index=IGNORE)
            right[f"hint {name}"] = (own.argmax(-1) == classes)[classes != IGNORE].float().mean().item()
        self.states = None
        return total, right


def _about(number: int, truth: Sequence[Labels]) -> dict[str, int]:
    cells = [(own.centre & (own.thing == number)).nonzero() for own in truth]
    found = {"first": int(len(cells[0]) > 0)}
    if len(truth) > 1:
        return found | {"second": int(len(cells[1]) > 0)}
    found["count"] = min(len(cells[0]), SIZES["count"] - 1)
    if len(cells[0]) == 1:
        row, column = cells[0][0].tolist()
        rows, columns = truth[0].thing.shape
        found["down"], found["across"] = 3 * row // rows, 3 * column // columns
        colour = int(truth[0].colour[row, column])
        found |= {"colour": colour} if colour > 0 else {}
    return found
