"""Second stage: questions and answers. An item's pictures are read once; each question sees them and itself only."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok_eval.models.nano import END, IMAGE, QWEN, START
from vtok_eval.train.data import Batch, Turn, moved

IGNORE = -100


class Talk(nn.Module):
    """A nano model with the loss of its answers.

    A sequence is one prefix (role, pictures) and many tails (question, answer, end). A block mask keeps the tails apart
    and every tail's positions go on where the prefix stops, so each is what a single question would be.

    Parameters
    ----------
    name : str
        ``"nano-llava"`` or ``"nano-qwen"``.
    model, processor
        The model and its processor.
    pool : int
        Average features over so many tokens each way; a pooled token stands at its first one's position, so what is
        learnt holds for all tokens. Four times faster at 2.
    """

    def __init__(self, name: str, model: Any, processor: Any, pool: int = 1) -> None:
        super().__init__()
        self.name, self.model, self.pool = name, model, pool
        text = processor.tokenizer
        ids = lambda string: text(string, add_special_tokens=False).input_ids  # noqa: E731
        if name == "nano-llava":
            self.head, self.image = ids("user:"), ids(IMAGE)[0]
            self.before, self.after, self.ask = [], [], ids("assistant:")
            self.end = [text.eos_token_id]
        else:
            start, end, self.image, _ = text.convert_tokens_to_ids(QWEN)
            self.head, self.before, self.after = ids(f"{START}user"), [start], [end]
            self.ask = ids(f"{END}{START}assistant")
            self.end = [text.eos_token_id]

    def features(self, images: dict[str, Tensor]) -> list[Tensor]:
        """(tokens, D) of every picture, projected."""
        found = self.model.model.get_image_features(**images, return_dict=True, **self._layers())
        return list(found.pooler_output)

    def _layers(self) -> dict[str, Any]:
        config = self.model.config
        if self.name != "nano-llava":
            return {}
        return {
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean loss over the questions, each weighing the same, and the share of answers that are right, by task."""
        device = next(self.parameters()).device
        features = self.features(moved(batch, device))
        if self.pool > 1:
            flat = [grid for own in batch.grids for grid in own]
            features = [_pooled(own, grid, self.pool) for own, grid in zip(features, flat, strict=True)]
        embed = self.model.get_input_embeddings()
        rows = [self._row(grids, turns) for grids, turns in zip(batch.grids, batch.turns, strict=True)]
        longest = max(len(row["ids"]) for row in rows)
        ids = torch.full((len(rows), longest), 0)
        labels = torch.full((len(rows), longest), IGNORE)
        block = torch.full((len(rows), longest), -1)
        positions = torch.zeros(3, len(rows), longest, dtype=torch.long)
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
            attention_mask=_mask(block, inputs.dtype),
            position_ids=positions if self.name == "nano-qwen" else positions[0],
            use_cache=False,
        ).last_hidden_state
        # only answers meet the vocabulary; column i predicts label i + 1
        spots = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        logits = self.model.lm_head(hidden[:, :-1][spots]).float()
        target = labels[:, 1:][spots]
        turn = block[:, 1:][spots] + spots[0] * 1000
        return _score(logits, target, turn, [t.task for turns in batch.turns for t in turns])

    def _row(self, grids: list[tuple[int, int]], turns: list[Turn]) -> dict[str, list[Any]]:
        ids: list[int] = list(self.head)
        positions = [[i] * 3 for i in range(len(ids))]
        begin = len(ids)
        for height, width in grids:
            start = self._text(self.before, ids, positions, begin)
            cells = [(y, x) for y in range(0, height, self.pool) for x in range(0, width, self.pool)]
            ids += [self.image] * len(cells)
            if self.name == "nano-qwen":
                positions += [[start, start + y, start + x] for y, x in cells]
                start += max(height, width)
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


def _pooled(features: Tensor, grid: tuple[int, int], pool: int) -> Tensor:
    """(tokens, D) averaged over squares of the grid; the last squares of an odd grid are smaller."""
    planes = features.view(1, *grid, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(planes, pool, ceil_mode=True).flatten(2)[0].T


def _mask(block: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L) additive: causal, the prefix (0) for all, a tail for itself, padding (-1) for nobody but itself."""
    same = block[:, :, None] == block[:, None, :]
    prefix = (block[:, None, :] == 0) & (block[:, :, None] >= 0)
    length = block.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=block.device).tril()
    seen = (same | prefix) & causal
    return torch.zeros(seen.shape, dtype=dtype, device=block.device).masked_fill(~seen, float("-inf"))[:, None]


def _score(logits: Tensor, target: Tensor, turn: Tensor, tasks: list[str]) -> tuple[Tensor, dict[str, float]]:
    each = F.cross_entropy(logits, target, reduction="none")
    _, number = turn.unique_consecutive(return_inverse=True)
    count = len(tasks)
    zeros = torch.zeros(count, device=logits.device)
    sizes = zeros.index_add(0, number, torch.ones_like(each))
    loss = (zeros.index_add(0, number, each) / sizes).mean()
    wrong = zeros.index_add(0, number, (logits.argmax(-1) != target).float())
    right: dict[str, list[float]] = defaultdict(list)
    for task, misses in zip(tasks, wrong.tolist(), strict=True):
        right[task].append(float(misses == 0))
    return loss, {task: sum(own) / len(own) for task, own in sorted(right.items())}
