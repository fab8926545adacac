"""The training loop: what is interrupted goes on to the same end, and what cannot go on says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vtok
from vtok.training import Stage, done, train

pytestmark = pytest.mark.grad


class Line(nn.Module):
    """Something to train in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def step(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        return (self.layer(batch) - batch.sum(-1, keepdim=True)).square().mean(), {"size": float(len(batch))}


class Draws(torch.utils.data.Dataset):
    """Batch i of a stream."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> Tensor:
        return torch.randn(8, 3, generator=torch.Generator().manual_seed(number))


def trained(folder: Path, stops: tuple[int, ...] = ()) -> Line:
    torch.manual_seed(0)
    for stop in (*stops, 40):
        torch.manual_seed(0)
        model = Line()
        stage = Stage("line", 40, [([model.layer], 0.05)], model.step, warmup=4)
        data = Cut(stop) if stop < 40 else Draws()
        try:
            train(model, stage, data, folder, every=0)
        except InterruptedError:
            continue
    return model


class Cut(Draws):
    """A stream that breaks off, as a killed run does."""

    def __init__(self, stop: int) -> None:
        self.stop = stop

    def __getitem__(self, number: int) -> Tensor:
        if number == self.stop:
            raise InterruptedError
        return super().__getitem__(number)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = trained(tmp_path / "a"), trained(tmp_path / "b", stops=(7, 23))
    assert torch.equal(whole.layer.weight, parts.layer.weight)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 40 and lines[-1]["loss"] > 0
    assert done(tmp_path / "a", "line", 40)
    assert not done(tmp_path / "a", "line", 41) and not done(tmp_path / "a", "other", 40)


def test_the_logs_means_do_not_hang_on_the_first_batch(tmp_path: Path) -> None:
    model = Line()
    counted = iter(range(1, 41))

    def step(batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        number = float(next(counted))
        return model.step(batch)[0], {"number": number, **({"rare": number} if number == 40 else {})}

    train(model, Stage("line", 40, [([model.layer], 0.05)], step, warmup=4), Draws(), tmp_path)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    weights = [0.98**age for age in range(40)]
    mean = sum(weight * (40 - age) for age, weight in enumerate(weights)) / sum(weights)
    assert line["number"] == pytest.approx(mean, abs=1e-3) and line["rare"] == 40


def test_a_run_without_a_number_stops(tmp_path: Path) -> None:
    model = Line()
    with torch.no_grad():
        model.layer.weight.fill_(float("inf"))
    with pytest.raises(vtok.VtokError, match="lower the learning rate"):
        train(model, Stage("line", 4, [([model.layer], 0.1)], model.step), Draws(), tmp_path)
