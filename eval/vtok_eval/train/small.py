"""Recipe of small-llava: two frozen models learn to understand each other.

Low-rank changes of DINOv2-small and SmolLM2, and a projector. First the tower learns to say what every token looks at,
and the projector to say it in the language model's own words; then questions are answered, over a part of the tokens
first (cheaper, and what a compressed picture is like), over all tokens at the end.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtok.errors import VtokError
from vtok.training import Stage, halves, mixed
from vtok.training import train as run_stage
from vtok_eval import scenes
from vtok_eval.models import small
from vtok_eval.models.delta import DOWN, UP
from vtok_eval.samples import INSTRUCTION
from vtok_eval.train import lora
from vtok_eval.train.data import Batch, Scenes, Turn, moved, prepared
from vtok_eval.train.eyes import Eyes
from vtok_eval.train.language import Talk
from vtok_eval.train.spelling import Draws, Spelling

#: the first three blocks stay as they are: nothing is kept of them for a backward pass
TOWER_LAYERS = r"vision_tower\.encoder\.layer\.([3-9]|\d\d)\.(attention\.[qkvo]_proj|mlp\.fc[12])$"
DECODER_LAYERS = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)$"
TOWER_RANK, DECODER_RANK = 32, 16
#: spread of the projector's output in units of the word embeddings' spread
LOUDNESS = 3.0
_ASKED: dict[str, Any] = {
    "pairs": 0.15,
    "lists": 0.2,
    # what takes longest to learn is drawn and asked most
    "kinds": {"mixed": 0.3, "count": 0.25, "text": 0.27, "detail": 0.18},
    "rare": {"exists": 0.4, "colour": 0.3, "position": 0.4},
}
#: pictures in a batch of each stage (times ``GPU`` on one), batches, peak learning rates, what else `Chat` needs, and
#: under "scenes" what `Scenes` draws
RECIPE: dict[str, dict[str, Any]] = {
    "tower": {
        "size": 8,
        "steps": 700,
        "rates": {"tower": 5e-4, "heads": 2e-3, "projector": 1e-3},
        "scenes": {"crowds": 0.8},
    },
    "words": {
        "size": 8,
        "steps": 1500,
        "rates": {"projector": 1e-3},
        "scenes": {"crowds": 0.5},
    },
    "sparse": {
        "size": 4,
        "steps": 1800,
        "rates": {"projector": 2e-4, "decoder": 7e-4},
        "sparse": (1.0, 0.4),
        # vtok closes the positions of LLaVA's tokens up; plain pictures do not
        "close": 0.5,
        # the tower stands still, and runs once for a picture that is asked about twice
        "scenes": _ASKED | {"reuse": 2, "mixed": 32},
    },
    "whole": {
        "size": 4,
        "steps": 60,
        "rates": {"projector": 2e-4, "decoder": 2e-4},
        "close": 0.5,
        "scenes": _ASKED,
    },
}

GPU = 4
#: batches of pictures whose tokens the stage of words draws from
PICTURES = 70


class Asked(Scenes):
    """Scenes whose questions come as people and harnesses put them: half in capitals, many with the instruction."""

    def __getitem__(self, step: int) -> Batch:
        batch = super().__getitem__(step)
        rng = random.Random(f"train/{self.seed}/{step}/asked")
        batch.turns = [[self._put(turn, rng) for turn in turns] for turns in batch.turns]
        return batch

    def _put(self, turn: Turn, rng: random.Random) -> Turn:
        capital, instructed = rng.random() < 0.5, rng.random() < 0.4
        question = self.processor.tokenizer.decode(turn.question)
        question = question[:1].upper() + question[1:] if capital else question
        return Turn(turn.task, self._ids(question + f"\n{INSTRUCTION}" * instructed), turn.answer)


class Chat(Talk):
    """``Talk`` in SmolLM2's ChatML, as ``small.TEMPLATE`` writes it.

    Parameters
    ----------
    model, processor
        As ``small.base`` gives them, with changes in place.
    tower : nn.ModuleList
        The tower's changes.
    """

    def __init__(self, model: Any, processor: Any, tower: nn.ModuleList) -> None:
        nn.Module.__init__(self)
        # nano-llava's layout: one grid a picture, positions in a row
        self.name, self.model, self.pool, self.symbols, self.sparse = "nano-llava", model, 1, False, None
        self.hints = self.blend = None
        self.remember, self._seen, self.tower = 1, {}, [tower]  # in a list: no part of this module
        text = processor.tokenizer

        def ids(string: str) -> list[int]:
            return list(text(string, add_special_tokens=False).input_ids)

        self.head, self.before, self.after = ids("<|im_start|>user\n"), [], ids("\n")
        self.image = processor.image_token_id
        self.ask, self.end = ids("<|im_end|>\n<|im_start|>assistant\n"), [text.eos_token_id]

    def _shares(self) -> Iterator[Tensor]:
        """One pair for the whole batch: rows of one length, and little padding."""
        return repeat(torch.rand(2) ** 4 * torch.tensor(self.sparse))

    def read(self, images: dict[str, Tensor]) -> list[Tensor]:
        """`features`, with a gradient for the tower's changes where they learn."""
        if any(weight.requires_grad for weight in self.tower[0].parameters()):
            return self.features(moved(images, self.model.device))
        return super().read(images)


class Standard(nn.Module):
    """The projector's input by mean and spread of each channel, and a projector that starts from there.

    A few of DINOv2's channels are many times the others, and the projector has no norm in front: Adam's steps, the same
    for every weight, would be far too long for those channels. ``folded`` moves this into the projector at the end.

    Parameters
    ----------
    model
        Its projector is initialised anew: ``LOUDNESS`` times the spread of the word embeddings goes out.
    pixels : Tensor
        (n, 3, side, side) pictures to measure on.
    """

    mean: Tensor
    spread: Tensor

    @torch.no_grad()
    def __init__(self, model: Any, pixels: Tensor) -> None:
        super().__init__()
        seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        seen = seen[model.config.vision_feature_layer][:, 1:].flatten(0, 1).float()
        self.register_buffer("mean", seen.mean(0))
        self.register_buffer("spread", seen.std(0).clamp(min=1e-6))
        projector = model.model.multi_modal_projector
        for linear in (projector.linear_1, projector.linear_2):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        projector.register_forward_pre_hook(lambda _, args: (self(args[0]),))
        loud = LOUDNESS * model.get_input_embeddings().weight.float().std()
        projector.linear_2.weight.mul_(loud / projector(seen).std())

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.spread

    def folded(self, projector: Any) -> dict[str, Tensor]:
        """The projector's parameters for features as they are."""
        found = {name: value.detach().float() for name, value in projector.named_parameters()}
        found["linear_1.weight"] = found["linear_1.weight"] / self.spread
        found["linear_1.bias"] = found["linear_1.bias"] - found["linear_1.weight"] @ self.mean
        return found


class Student:
    """A model made ready: frozen in bf16, with changes to train.

    Parameters
    ----------
    model, processor
        As ``small.base`` gives them.
    device : str or torch.device
        Where it trains.
    seed : int
        Of the new weights and of the scenes that settle the projector.
    compiled : bool
        Compile the layers: a minute once, and two thirds of a step's time from then on.
    """

    def __init__(
        self, model: Any, processor: Any, device: str | torch.device = "cpu", seed: int = 0, compiled: bool = False
    ) -> None:
        self.model, self.processor, self.seed = model, processor, seed
        model.requires_grad_(False).train()
        place = torch.device(device)
        with torch.random.fork_rng([place] if place.type == "cuda" else []):
            torch.manual_seed(seed)
            rng = random.Random(f"train/small-llava/{seed}/start")
            pictures = [scenes.make(rng.choice(scenes.KINDS), rng).image for _ in range(8)]
            self.standard = Standard(model, prepared("nano-llava", processor, pictures)[0]["pixel_values"]).to(place)
            if halves(place):
                for weight in model.parameters():  # not the module: rotary frequencies stay fp32
                    weight.data = weight.data.to(torch.bfloat16)
            model.to(place).model.multi_modal_projector.float()
            tower = lora.attach(model, TOWER_LAYERS, TOWER_RANK)
            decoder = lora.attach(model, DECODER_LAYERS, DECODER_RANK)
            # the fused kernel for CPUs takes a third of a step under a mask, most of it backward
            model.model.language_model.config._attn_implementation = "eager"
            self.eyes, self.chat = Eyes(model, processor, tower).to(place), Chat(model, processor, tower)
            width = model.config.text_config.hidden_size
            loud = LOUDNESS * float(model.get_input_embeddings().weight.float().std()) * width**0.5
            self.spelling = Spelling(model, self.eyes, loud)
        if compiled:
            for layer in (*model.model.vision_tower.encoder.layer, *model.model.language_model.layers):
                layer.compile(dynamic=True)
        parts = {"tower": tower, "decoder": decoder, "projector": model.model.multi_modal_projector}
        self.parts = nn.ModuleDict({**parts, "heads": self.eyes.heads})

    def stage(self, name: str, steps: int) -> Stage:
        """A stage of ``RECIPE`` for the training loop."""
        own = RECIPE[name]
        self.chat.sparse, self.chat.close = own.get("sparse"), own.get("close", 0.0)
        self.chat.remember = own["scenes"].get("mixed", 1)
        groups = [([self.parts[part]], rate) for part, rate in own["rates"].items()]
        step = {"tower": self.eyes.step, "words": self.spelling.step}.get(name, self.chat.step)
        return Stage(name, steps, groups, step, warmup=max(1, min(100, steps // 10)), decay=0.01)

    def scenes(self, name: str, size: int, steps: int) -> Scenes:
        """The stream of a stage."""
        mix = RECIPE[name]["scenes"] if name in RECIPE else {"pairs": 0.1}
        return Asked("nano-llava", self.processor, size, steps, f"small-llava/{self.seed}/{name}", questions=8, **mix)

    def delta(self) -> dict[str, Tensor]:
        """What ``small.assemble`` takes."""
        projector = self.standard.folded(self.model.model.multi_modal_projector)
        return {
            **lora.delta(self.model),
            **{f"model.multi_modal_projector.{name}": value.cpu() for name, value in projector.items()},
        }

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Begin with a finished delta, as ``delta`` gave it.

        Raises
        ------
        VtokError
            It belongs to other layers or ranks.
        """
        from safetensors.torch import load_file

        found = load_file(path)
        projector = self.model.model.multi_modal_projector
        unlike = set(found) ^ set(self.delta())
        if unlike:
            raise VtokError(f"{path} changes other layers than this recipe ({min(unlike)}); train without a start")
        for name, change in lora.pairs(self.model):
            ranks = len(found[name + DOWN]), len(change.down)
            if ranks[0] != ranks[1]:
                raise VtokError(f"{path} has rank {ranks[0]} at {name}, not {ranks[1]}; train without a start")
            change.down.copy_(found[name + DOWN])
            change.up.copy_(found[name + UP].float() / lora.SCALE)
        for name, value in projector.named_parameters():
            value.copy_(found[f"model.multi_modal_projector.{name}"])
        # what ``folded`` undoes
        first = projector.linear_1
        first.bias.add_(first.weight @ self.standard.mean)
        first.weight.mul_(self.standard.spread)

    @torch.no_grad()
    def check(self, batches: int = 8, size: int = 4) -> dict[str, dict[str, float]]:
        """Share of right answers by task on scenes of a stream of their own: as they are, and with a blank picture.

        An answer is right when every token is the likeliest one, the end included: what greedy decoding would write.
        """
        self.chat.sparse = None
        found: dict[str, dict[str, list[float]]] = {"seen": defaultdict(list), "blank": defaultdict(list)}
        device = next(self.parts.parameters()).device
        for number in range(batches):
            batch = self.scenes("check", size, batches)[number]
            for kind, into in found.items():
                if kind == "blank":
                    batch.images = {name: torch.zeros_like(value) for name, value in batch.images.items()}
                with mixed(device):
                    _, right = self.chat.step(batch)
                for task, share in right.items():
                    into[task].append(share)
        return {kind: {task: sum(own) / len(own) for task, own in sorted(into.items())} for kind, into in found.items()}


def train(
    out: str | Path,
    *,
    scale: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    resume: bool = True,
    steps: Mapping[str, int] | None = None,
    base: tuple[Any, Any] | None = None,
    start: str | Path | None = None,
) -> Path:
    """Train small-llava's delta.

    Parameters
    ----------
    out : str or Path
        For checkpoints, ``log.jsonl`` and the finished ``model/delta.safetensors``.
    scale : float
        All step counts times this; 1 is the whole recipe.
    seed : int
        Of new weights and scenes.
    device : str
        ``"cpu"`` or ``"cuda"``.
    workers : int
        Processes that draw scenes; 0 draws them in this one.
    resume : bool
        Go on from checkpoints in ``out``.
    steps : mapping, optional
        Steps by stage instead of the recipe's; a stage of 0 steps is left out.
    base : tuple of (model, processor), optional
        Another model than the two packages' (tests).
    start : str or Path, optional
        A finished delta to go on from: what it has learnt to see and to name stays, the first two stages are left out.

    Returns
    -------
    Path
        The finished delta.

    Raises
    ------
    VtokError
        The packages cannot be had; the start does not fit; the loss is no longer a number.
    """
    from safetensors.torch import save_file

    folder = Path(out)
    # without a compiler torch.compile fails at the first step; tests do not wait for it; in fp32 on a CPU it had not
    # made up for its own time after eight minutes
    compiled = (
        base is None and halves(torch.device(device)) and (device.startswith("cuda") or shutil.which("c++") is not None)
    )
    student = Student(*(base or small.base()), device=device, seed=seed, compiled=compiled)
    if start is not None:
        student.load(Path(start))
    for name, own in RECIPE.items():
        if start is not None and name in ("tower", "words"):
            continue
        count = steps.get(name, 0) if steps is not None else max(1, round(own["steps"] * scale))
        if count:
            size = own["size"] * (GPU if device.startswith("cuda") else 1)
            data: Dataset = student.scenes(name, size, count)
            if name == "words":  # steps draw tokens of a few batches
                student.spelling.stream = student.scenes(name, size, min(count, PICTURES))
                data = Draws(count)
            torch.compiler.reset()  # both models' layers share eight compiled variants; each stage needs others
            run_stage(student.parts, student.stage(name, count), data, folder, workers=workers, resume=resume)
    target = folder / "model" / small.DELTA
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(student.delta(), target, metadata={"format": "pt", "seed": str(seed), "scale": str(scale)})
    with (folder / "log.jsonl").open("a") as log:
        for pictures, right in student.check(8 if steps is None else 1).items():
            numbers = {task: round(share, 4) for task, share in right.items()}
            log.write(json.dumps({"stage": "check", "pictures": pictures, **numbers}) + "\n")
    return target
