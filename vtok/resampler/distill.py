"""Distilling a resampler from any model that vtok knows: stages behind the model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import vtok
from vtok.api import adapter_of
from vtok.errors import VtokError
from vtok.resampler import files
from vtok.resampler.agreement import agreement_loss
from vtok.resampler.config import ResamplerConfig
from vtok.resampler.data import Batches, Prompts, Question, Singles
from vtok.resampler.learn import Features, Picture, answer_loss, prefixes, salience
from vtok.resampler.lora import Lora
from vtok.resampler.reader import FeatureReader
from vtok.resampler.resampler import OrderedResampler
from vtok.resampler.starts import SALIENT
from vtok.resampler.watching import Capture, Probe, Watch
from vtok.training import Stage, train

#: on log-probabilities whose gradients are taken
FACTOR = 1024.0


@dataclass(frozen=True)
class Recipe:
    """How a resampler is distilled.

    Attributes
    ----------
    saliency, features, answers, halting : int
        Steps of each stage; 0 leaves it out. The first is for the scheme ``"salient"`` alone.
    batch : int
        Questions in a step.
    rate : float
        Peak learning rate; of the answers half of it.
    temperature : float
        Of the divergence.
    best : int
        So many of the model's logits are compared, its largest.
    seed : int
        Of weights and order.
    lora : int
        Rank of a change of the language model's attention that is learnt along with the answers (LoRA, by peft); 0:
        the model stays as it is.
    """

    saliency: int = 500
    features: int = 2000
    answers: int = 5000
    halting: int = 300
    batch: int = 8
    rate: float = 2e-4
    temperature: float = 1.0
    best: int = 64
    seed: int = 0
    lora: int = 0

    def __post_init__(self) -> None:
        if self.lora < 0 or (self.lora and not self.answers):
            raise VtokError("lora is a rank of 1 or more, and learnt along with answers; give those steps")
        if self.batch < 1 or min(self.saliency, self.features, self.answers, self.halting) < 0 or not self.rate > 0:
            raise VtokError("a recipe needs a batch of 1 or more, steps of 0 or more and a rate above 0")


class Distillation:
    """A frozen model, and what is learnt from it.

    Parameters
    ----------
    model : nn.Module
        Any that has an adapter; frozen from here on, and compressed only inside a step.
    learned : Features
        The resampler with its reader.
    recipe : Recipe
        How.
    lora : Lora, optional
        Of the same model. What it is taught is what the model says without.
    """

    def __init__(self, model: Any, learned: Features, recipe: Recipe, lora: Lora | None = None) -> None:
        self.model, self.learned, self.recipe = model.eval().requires_grad_(False), learned, recipe
        self.lora = lora

    def pictures(self, batch: Prompts) -> list[Picture]:
        """Visual tokens of a batch's pictures (tiles, frames) where the resampler stands."""
        capture = Capture()
        with torch.no_grad(), vtok.compressed(self.model, capture, keep=1):
            self.model(**self._inputs(batch), use_cache=False, logits_to_keep=1)
        return capture.seen

    def saliency(self, batch: Prompts) -> tuple[Tensor, dict[str, float]]:
        """A step of the stage of saliency: which tokens an answer hangs on."""
        probe, resampler = Probe(), self.learned.resampler
        # what keeps everything is not asked, so a tenth is left out, drawn anew each time
        with vtok.compressed(self.model, probe, keep=0.9):
            said = self._said(self._inputs(batch), batch).float().log_softmax(-1)
        if not probe.seen:
            return 0.0 * resampler.saliency.out.weight.sum(), {}
        # rows do not see each other: one gradient for all is each one's own. Shares do not hang on the factor, and in
        # half precision small gradients would vanish without
        return salience(resampler, *probe.pictures(FACTOR * said.amax(-1).sum()))

    def features(self, batch: Prompts) -> tuple[Tensor, dict[str, float]]:
        """A step of the stage of features."""
        return self.learned.loss(self.pictures(batch), batch.progress)

    def answers(self, batch: Prompts) -> tuple[Tensor, dict[str, float]]:
        """A step of the stage of answers: what the model says with prefixes, against what it says with all tokens."""
        inputs = self._inputs(batch)
        target = batch.target.to(inputs["input_ids"].device)
        with torch.no_grad(), self.lora.off() if self.lora else nullcontext():
            best = self._said(inputs, batch).topk(min(self.recipe.best, self.model.config.get_text_config().vocab_size))
        resampler = self.learned.resampler
        # pictures of no more tokens than a prefix stay whole, and teach nothing
        total = 0.0 * resampler.registers.sum()
        numbers: dict[str, float] = {}
        for name, k in zip(("long", "some"), prefixes(resampler.config.tokens, batch.progress), strict=True):
            with vtok.compressed(self.model, "flextok", keep=k, weights=resampler):
                said = self._said(inputs, batch)
            loss, found = answer_loss(said, (best.values, best.indices), target, self.recipe.temperature)
            total = total + loss / 2
            numbers |= {f"{key} {name}": value for key, value in found.items()}
        return total, numbers

    def halting(self, questions: Sequence[Prompts]) -> tuple[Tensor, dict[str, float]]:
        """A step of the stage of halting: whether answers stay the same with a prefix. One question at a time, so
        that it is plain which pictures, tiles or frames an answer hangs on."""
        resampler = self.learned.resampler
        registers, same = [], []
        for one in questions:
            k = prefixes(resampler.config.tokens)[1]
            watch = Watch(weights=resampler)
            inputs = self._inputs(one)
            with torch.no_grad():
                with self.lora.off() if self.lora else nullcontext():
                    wanted = self._said(inputs, one).argmax(-1)
                with vtok.compressed(self.model, watch, keep=k):
                    said = self._said(inputs, one).argmax(-1)
            # pictures of no more tokens than a prefix stay whole, and teach nothing
            if watch.last:
                registers.append(torch.cat(watch.last))
                same.append(torch.equal(said, wanted))
        if not same:
            return 0.0 * resampler.halting.out.weight.sum(), {}
        loss = agreement_loss([resampler.halting(own) for own in registers], torch.tensor(same))
        return loss, {"same": sum(same) / len(same)}

    def _said(self, inputs: dict[str, Tensor], batch: Prompts) -> Tensor:
        """(A, V) logits of the answers' tokens, row after row."""
        longest = max(batch.lengths) + 1
        logits = self.model(**inputs, use_cache=False, logits_to_keep=longest).logits
        return torch.cat([row[-length - 1 : -1] for row, length in zip(logits, batch.lengths, strict=True)])

    def _inputs(self, batch: Prompts) -> dict[str, Tensor]:
        weight = next(self.model.parameters())
        return {
            key: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for key, value in batch.inputs.items()
        }


def distill(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    workers: int = 0,
    resume: bool = True,
    console: Console | None = None,
    **sizes: Any,
) -> OrderedResampler:
    """Distil a resampler and save it in ``out/resampler``.

    Parameters
    ----------
    model, processor
        A vision-language model of a family that vtok knows, where it shall run, and its processor.
    questions : sequence of Question
        About its pictures.
    out : str or Path
        For checkpoints, log and the finished resampler.
    recipe : Recipe, optional
        The defaults are for a GPU.
    workers : int
        Processes that prepare batches.
    resume : bool
        Go on from checkpoints in ``out``.
    console : rich.Console, optional
        For the progress bar.
    **sizes
        Fields of ``ResamplerConfig``: ``tokens``, ``width``, ``blocks``, ``scheme``, ``halting``.

    Returns
    -------
    OrderedResampler
        As saved. A change of the language model is in ``out/adapter``, and switched off in ``model``.

    Raises
    ------
    VtokError
        A model of no known family, sizes that cannot be, or ``lora`` without peft.
    """
    recipe, out = recipe or Recipe(), Path(out)
    door = files.door(adapter_of(model))
    torch.manual_seed(recipe.seed)
    config = files.made_for(ResamplerConfig(**{"dim": door.dim, "halting": recipe.halting > 0, **sizes}), door)
    learned = Features(OrderedResampler(config), FeatureReader(config)).to(door.device)
    lora = Lora(model, recipe.lora) if recipe.lora else None
    distillation = Distillation(model, learned, recipe, lora)
    first = Batches(questions, processor, recipe.batch, 1, f"{recipe.seed}/measure")[0]
    learned.resampler.measure(torch.cat([x for x, _ in distillation.pictures(first)]))
    learned.reader.measure(learned.resampler)
    changed = [lora] if lora else []
    stages: list[tuple[str, int, Any, list[nn.Module], float]] = []
    if config.scheme == SALIENT:
        head = learned.resampler.saliency
        stages.append(("saliency", recipe.saliency, distillation.saliency, [head], recipe.rate))
    stages += [
        ("features", recipe.features, distillation.features, [learned], recipe.rate),
        ("answers", recipe.answers, distillation.answers, [learned.resampler, *changed], recipe.rate / 2),
    ]
    if config.halting:
        stages.append(("halting", recipe.halting, distillation.halting, [learned.resampler.halting], recipe.rate))
    for name, steps, step, modules, rate in stages:
        if steps:
            what = Stage(name, steps, [(modules, rate)], step, warmup=max(1, min(200, steps // 10)))
            kind = Singles if name == "halting" else Batches
            batches = kind(questions, processor, recipe.batch, steps, f"{recipe.seed}/{name}")
            whole = nn.ModuleList([learned, *changed]) if lora else learned
            train(whole, what, batches, out, workers=workers, resume=resume, console=console)
    if lora:
        lora.save(out / "adapter")
    resampler = learned.resampler.eval().requires_grad_(False)
    files.save(resampler, out / "resampler")
    return resampler
