"""MCTF's training: the consistency loss, and the example that fine-tunes with it."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtok
from vtok.methods.mctf import consistency_loss

from .test_vit import make, pictures

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "mctf_finetune.py"


def draws(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "student": draw(6, 4), "teacher": 2 * draw(6, 4), "student_cls": draw(6, 5), "teacher_cls": draw(6, 5),
        "labels": torch.tensor([0, 3, 1, 2, 2, 0]),
    }  # fmt: skip


def naive(weight: float, confidence: float, **given: Tensor) -> float:
    """Two cross-entropies, and 3 times the mean squared distance of class tokens where the teacher is sure."""
    total = 0.0
    for logits in (given["student"].tolist(), given["teacher"].tolist()):
        terms = []
        for row, label in zip(logits, given["labels"].tolist(), strict=True):
            terms.append(math.log(sum(math.exp(value) for value in row)) - row[label])
        total += sum(terms) / len(terms)
    squares = []
    for i, label in enumerate(given["labels"].tolist()):
        exps = [math.exp(value) for value in given["teacher"][i].tolist()]
        if exps[label] / sum(exps) > confidence:
            pairs = zip(given["student_cls"][i].tolist(), given["teacher_cls"][i].tolist(), strict=True)
            squares += [(a - b) ** 2 for a, b in pairs]
    return total + (weight * sum(squares) / len(squares) if squares else 0.0)


@pytest.mark.parametrize(("weight", "confidence"), [(3.0, 0.4), (1.5, 0.1), (3.0, 0.999)])
def test_loss_equals_the_formula(weight: float, confidence: float) -> None:
    given = draws()
    found = consistency_loss(**given, weight=weight, confidence=confidence)
    assert found.item() == pytest.approx(naive(weight, confidence, **given), rel=1e-9)
    if (weight, confidence) == (3.0, 0.4):
        assert consistency_loss(**given) == found  # the released numbers are the defaults
        sure = given["teacher"].softmax(1).gather(1, given["labels"][:, None]) > confidence
        assert 0 < int(sure.sum()) < 6  # some count, some do not


@pytest.mark.grad
def test_the_teacher_is_no_student() -> None:
    """The teacher learns from its own cross-entropy, never from the distance of the class tokens."""
    given = draws()
    for name in ("student", "teacher", "student_cls", "teacher_cls"):
        given[name].requires_grad_()
    consistency_loss(**given).backward()
    assert given["teacher_cls"].grad is None
    assert given["student_cls"].grad is not None
    sure = given["teacher"].softmax(1).gather(1, given["labels"][:, None])[:, 0] > 0.4
    expected = 3 * 2 * (given["student_cls"] - given["teacher_cls"]) / (5 * sure.sum()) * sure[:, None]
    torch.testing.assert_close(given["student_cls"].grad, expected.detach())
    share = given["teacher"].softmax(1) - torch.nn.functional.one_hot(given["labels"], 4)
    torch.testing.assert_close(given["teacher"].grad, share.detach() / 6)  # nothing through the confidence


@pytest.mark.grad
def test_two_passes_with_their_own_reductions() -> None:
    """``vtok.budget`` gives the teacher pass another reduction; both graphs live until the backward pass."""
    model, x = make("timm_cls").train(), pictures(3)
    labels = torch.tensor([0, 1, 2])
    vtok.compress(model, "mctf", keep=8)

    def run() -> tuple[Tensor, Tensor]:
        features = model.forward_features(x)
        return features[:, 0], model.forward_head(features)

    student_cls, student = run()
    assert vtok.report(model).tokens_kept == 8
    with vtok.budget(model, 56):
        teacher_cls, teacher = run()
        assert vtok.report(model).tokens_kept == 56
    consistency_loss(student, teacher, student_cls, teacher_cls, labels, confidence=0.0).backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert missing == []
    run()
    assert vtok.report(model).tokens_kept == 8


@pytest.mark.grad
def test_matching_and_pooling_weights_carry_no_gradient() -> None:
    """As released: only what is pooled learns. Then scaling q and k of a merging block changes nothing upstream by way
    of the scores: the gradient is that of the plan and weights held fixed."""
    from vtok.methods.mctf import MCTF

    plans: list[Any] = []
    weights: list[Tensor] = []

    class Fixed(MCTF):
        def match(self, view: Any, r: int) -> Any:
            plans.append(super().match(view, r))
            return plans[-1]

        def weights(self, view: Any) -> Tensor:
            weights.append(super().weights(view))
            return weights[-1]

    model, x = make("timm_cls"), pictures(2).requires_grad_()
    vtok.compress(model, Fixed(), keep=16)
    model(x).square().sum().backward()
    assert plans
    assert not any(weight.requires_grad for weight in weights)

    class Replayed(MCTF):
        def match(self, view: Any, r: int) -> Any:
            return plans.pop(0)

        def weights(self, view: Any) -> Tensor:
            return weights.pop(0)

    free, x.grad = x.grad, None
    vtok.compress(model, Replayed(), keep=16)
    model(x).square().sum().backward()
    torch.testing.assert_close(x.grad, free)


def example() -> Any:
    pytest.importorskip("skimage")
    spec = importlib.util.spec_from_file_location("mctf_finetune", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.grad
def test_example_with_tiny_settings() -> None:
    numbers = example().run(keep=4, pretrain_steps=12, steps=3, batch=8, test=32)
    assert numbers["tokens left"] == 4
    assert all(math.isfinite(value) for value in numbers.values())
    for name, value in numbers.items():
        if "accuracy" in name:
            assert 0 <= value <= 1
    # the student's and the teacher's cross-entropy together start near twice log 10
    assert 3 < numbers["consistency loss, first steps"] < 8


@pytest.mark.grad
def test_example_learns() -> None:
    """Loss falls by ordinary training, and training crops never overlap test crops."""
    module = example()
    photographs = [module.photograph(name) for name in module.PHOTOGRAPHS]
    assert all(picture.shape[1] == 512 for picture in photographs)
    generator = torch.Generator().manual_seed(0)
    model = module.small_vit()
    first = module.pretrain(model, photographs, 1, 16, generator)
    torch.manual_seed(0)
    model = module.small_vit()
    assert module.pretrain(model, photographs, 40, 16, generator) < first - 0.3
    columns = torch.arange(512).float().expand(600, 512)
    for train, parity in ((True, 0), (False, 1)):
        images, _ = module.crops([columns], 20, train, generator)
        assert set((images.flatten().long() // 64 % 2).tolist()) == {parity}


def test_example_from_the_command_line() -> None:
    pytest.importorskip("skimage")
    arguments = ["--pretrain-steps", "2", "--steps", "1", "--batch", "4", "--test", "16", "--keep", "8"]
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for name in (
        "plain accuracy before",
        "compressed accuracy before",
        "compressed accuracy after",
        "consistency loss",
    ):
        assert name in result.stdout
