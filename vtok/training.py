"""The training loop that every recipe shares: seeded, resumable, logged."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from vtok.errors import VtokError


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    Attributes
    ----------
    name : str
        Names its checkpoint and its lines in the log.
    steps : int
        Batches.
    groups : sequence of (modules, peak learning rate)
        What is trained, and how fast; everything else is frozen.
    step : callable
        batch -> (loss, numbers for the log).
    warmup : int
        Steps from 0 to the peak; a cosine leads down to 2 % of it at the end.
    decay : float
        AdamW's, on matrices.
    """

    name: str
    steps: int
    groups: Sequence[tuple[Sequence[nn.Module], float]]
    step: Callable[[Any], tuple[Tensor, dict[str, float]]]
    warmup: int = 200
    decay: float = 0.05


def train(
    model: nn.Module,
    stage: Stage,
    data: Dataset,
    folder: Path,
    *,
    workers: int = 0,
    every: float = 180.0,
    resume: bool = True,
    console: Console | None = None,
) -> None:
    """Run a stage, from its checkpoint if there is one.

    Batch number i depends on the seed and on i alone, so a resumed run sees what an uninterrupted one would.

    Parameters
    ----------
    model : nn.Module
        Holds everything that is trained; its state goes into the checkpoint.
    stage : Stage
        What to do.
    data : Dataset
        ``data[i]`` is batch i.
    folder : Path
        For ``{stage}.safetensors`` (checkpoint) and ``log.jsonl``.
    workers : int
        Processes that make batches.
    every : float
        Seconds between checkpoints.
    resume : bool
        ``False`` starts the stage anew.

    Raises
    ------
    VtokError
        The loss is no longer a number.
    """
    device = next(model.parameters()).device
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = _checkpoint(folder, stage.name), folder / "log.jsonl"
    optimizer = _optimizer(model, stage)
    first = 0
    if resume and checkpoint.exists():
        first = _load(checkpoint, model, optimizer)
        if first >= stage.steps:
            return
    rates = [rate for _, rate in stage.groups for _ in range(2)]
    batches: Iterable[Any] = DataLoader(
        Subset(data, range(first, stage.steps)), batch_size=None, num_workers=workers, collate_fn=same
    )
    started = saved_at = time.monotonic()
    mean = _Means()
    with _bar(console) as bar:
        task = bar.add_task(stage.name, total=stage.steps, completed=first, note="")
        for number, batch in enumerate(batches, first):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(number, stage.steps, stage.warmup)
            torch.manual_seed(number)  # whatever a step draws, it draws again after a resume
            with mixed(device):
                loss, numbers = stage.step(batch)
            if not math.isfinite(loss.item()):
                raise VtokError(f"the loss of {stage.name} is {loss.item()} at step {number}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            mean.add({"loss": loss.item(), **numbers})
            means = mean.now()
            bar.update(task, advance=1, note=f"loss {means['loss']:.3f}")
            now, done = time.monotonic(), number + 1
            if done % 50 == 0 or done == stage.steps:
                line = {"stage": stage.name, "step": done, "seconds": round(now - started, 1)}
                with log.open("a") as file:
                    file.write(json.dumps(line | {key: round(value, 4) for key, value in means.items()}) + "\n")
            if now - saved_at > every or done == stage.steps:
                saved_at = now
                _save(checkpoint, done, model, optimizer if done < stage.steps else None)


class _Means:
    """Running means over about 50 values each; young ones are means of what there is, not bound to the first."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.sums[key] = 0.98 * self.sums.get(key, 0.0) + value
            self.weights[key] = 0.98 * self.weights.get(key, 0.0) + 1

    def now(self) -> dict[str, float]:
        return {key: total / self.weights[key] for key, total in self.sums.items()}


def halves(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; a CPU without them takes far longer than in fp32."""
    if device.type != "cpu":
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def mixed(device: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=halves(device))


def same(batch: Any) -> Any:
    """For a loader that must not collate: a batch is made as one."""
    return batch


def _checkpoint(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.safetensors"


def _step(checkpoint: Path) -> int:
    with safe_open(checkpoint, "pt") as file:
        return int(file.metadata()["step"])


def _save(checkpoint: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    if optimizer is not None:
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    part = checkpoint.with_suffix(".part")
    # copies: tied weights share memory, which a file cannot
    copies = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(copies, part, {"step": str(step)})
    part.replace(checkpoint)


def _load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(checkpoint, device=str(next(model.parameters()).device)).items():
        kind, name = key.split(".", 1)
        if kind == "model":
            weights[name] = value
        else:
            index, name = name.split(".")
            moments.setdefault(int(index), {})[name] = value
    model.load_state_dict(weights)
    if moments:  # none in a finished stage's
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return _step(checkpoint)


def done(folder: Path, stage: str, steps: int) -> bool:
    """Whether a stage has ended."""
    checkpoint = _checkpoint(folder, stage)
    return checkpoint.exists() and _step(checkpoint) >= steps


def _optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only; whatever is in no group is frozen."""
    model.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    for modules, rate in stage.groups:
        own = list({id(p): p for module in modules for p in module.parameters()}.values())
        for p in own:
            p.requires_grad_(True)
        groups.append({"params": [p for p in own if p.ndim > 1], "lr": rate, "weight_decay": stage.decay})
        groups.append({"params": [p for p in own if p.ndim <= 1], "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))


def _bar(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    console = console or Console(stderr=True)
    bar = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    return bar if console.is_terminal else _Quiet(bar)  # type: ignore[return-value]


class _Quiet(nullcontext):
    """A bar that draws nothing where there is no terminal."""

    def __enter__(self) -> Any:
        return self

    def add_task(self, *_: Any, **__: Any) -> int:
        return 0

    def update(self, *_: Any, **__: Any) -> None:
        return None
