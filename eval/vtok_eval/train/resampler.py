"""Recipes of the resamplers of nano-llava and nano-qwen: distilled from these models as they stand.

Each batch of scenes is drawn and seen once: what the tower makes of it and what the model answers with all tokens is
kept on disk, and every stage learns from that.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtok.api import adapter_of
from vtok.errors import VtokError
from vtok.io import plain
from vtok.progress import progress
from vtok.resampler import FeatureReader, OrderedResampler, ResamplerConfig, files
from vtok.resampler.agreement import agreement_loss, same_answers
from vtok.resampler.learn import Features, Picture, answer_loss, prefixes, salience
from vtok.resampler.resampler import Read
from vtok.resampler.starts import planned
from vtok.training import Stage, train
from vtok_eval.train.data import Batch, Scenes, moved
from vtok_eval.train.language import ITEM, Answers, Talk
from vtok_eval.train.tower import matmul_patches

#: how often the long prefix of the stage of answers is all tokens
WHOLE = 0.25

#: what the nano models learnt last: what is hard is drawn and asked more, or few tokens cost counts and small things
_SCENES: dict[str, Any] = {
    "size": 8,
    "questions": 12,
    "pairs": 0.15,
    "lists": 0.1,
    "crowds": 0.1,
    "kinds": {"mixed": 0.19, "count": 0.35, "text": 0.22, "detail": 0.24},
    "rare": {"exists": 0.2, "colour": 0.2, "position": 0.2, "objects": 0.6},
}

#: sizes, batches that are drawn, and steps of each stage
RECIPES: dict[str, dict[str, Any]] = {
    "nano-llava": {
        "config": {"width": 192, "blocks": 3, "tokens": 256, "halting": True, "scheme": "salient"},
        "drawn": 160,
        "scenes": _SCENES,
        "saliency": {"steps": 120, "rate": 3e-3},
        "features": {"steps": 150, "rate": 1e-3},
        "answers": {"steps": 400, "rate": 3e-4},
        "halting": {"steps": 500, "rate": 3e-3},
    }
}
# its tokens have fewer channels
RECIPES["nano-qwen"] = RECIPES["nano-llava"] | {"config": RECIPES["nano-llava"]["config"] | {"width": 128}}


def run(
    name: str,
    out: Path,
    *,
    source: Path | None = None,
    seed: int = 0,
    scale: float = 1.0,
    device: str = "cpu",
    workers: int = 0,
    resume: bool = True,
    start: Path | None = None,
    loaded: tuple[Any, Any] | None = None,
) -> Path:
    """Distil a nano model's resampler.

    Parameters
    ----------
    name : str
        ``"nano-llava"`` or ``"nano-qwen"``.
    out : Path
        For what was drawn, checkpoints, log and the finished ``resampler/``.
    source : Path, optional
        Folder of the trained model; the embedded weights otherwise.
    seed : int
        Of weights and scenes.
    scale : float
        All step counts times this.
    device : str
        ``"cpu"`` or ``"cuda"``.
    workers : int
        Processes that read what was drawn.
    resume : bool
        Go on from what is in ``out``.
    start : Path, optional
        Folder of a finished resampler: its tokens stay, and only the head behind ``keep="auto"`` is learnt anew.
    loaded : tuple, optional
        Model and processor, instead of a folder.

    Returns
    -------
    Path
        The folder of the finished resampler.

    Raises
    ------
    VtokError
        Unknown name, a model whose weights are not there, or a start that belongs to another model.
    """
    if name not in RECIPES:
        raise VtokError(f"there is no recipe for a resampler of {name!r}; known are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    model, processor = loaded or _loaded(name, source)
    model = model.to(device).eval().requires_grad_(False)
    talk = Talk(name, model, processor)
    count = max(2, round(recipe["drawn"] * scale))
    data = Scenes(name, processor, steps=count, seed=f"{name}/resampler/{seed}", pixels=False, **recipe["scenes"])
    drawn = Drawn(name, processor, data, out / "drawn")
    with matmul_patches(model):
        drawn.fill(talk, resume)
    torch.manual_seed(seed)
    door = files.door(adapter_of(model))
    config = files.made_for(ResamplerConfig(dim=door.dim, **recipe["config"]), door)
    learned = Features(OrderedResampler(config), FeatureReader(config)).to(device)
    if start is not None:
        _tokens(learned.resampler, files.load(start), door, start)
        recipe = recipe | {"saliency": None, "features": None, "answers": None}
    else:
        some = torch.cat([x for i in range(min(4, count)) for x, _ in drawn.pictures(i)])
        learned.resampler.measure(some.to(device))
    learned.reader.measure(learned.resampler)
    distil = Answering(talk, learned.resampler)

    def features(seen: Seen) -> tuple[Tensor, dict[str, float]]:
        return learned.loss(_on(seen.pictures, device), seen.progress)

    # which tokens are picked comes first; the head behind keep="auto" learns last, from tokens as they are then
    stages: list[tuple[str, Callable[[Seen], tuple[Tensor, dict[str, float]]], list[nn.Module]]] = [
        ("saliency", distil.saliency, [learned.resampler.saliency]),
        ("features", features, [learned]),
        ("answers", distil.step, [learned.resampler]),
        ("halting", distil.halting, [learned.resampler.halting]),
    ]
    for stage, step, modules in stages:
        if recipe[stage] is None:
            continue
        total = max(1, round(recipe[stage]["steps"] * scale))
        if stage == "answers":  # the language model knows tokens as they are picked, and no reader's
            nn.init.zeros_(learned.resampler.leave.weight)
        what = Stage(stage, total, [(modules, recipe[stage]["rate"])], step, warmup=max(1, min(50, total // 10)))
        train(learned, what, Order(drawn, total, f"{seed}/{stage}"), out, workers=workers, resume=resume)
    return files.save(learned.resampler, out / "resampler", torch.bfloat16)


def _tokens(resampler: OrderedResampler, finished: OrderedResampler, door: files.Door, start: Path) -> None:
    """Take over all but the head."""
    files.check(finished.config, door, str(start))
    if replace(finished.config, halting=True, fingerprint=resampler.config.fingerprint) != resampler.config:
        raise VtokError(f"{start} has other sizes than the recipe: {finished.config}; train it anew, without --start")
    kept = {key: value for key, value in finished.state_dict().items() if not key.startswith("halting.")}
    resampler.load_state_dict(resampler.state_dict() | kept)


def _loaded(name: str, source: Path | None) -> tuple[Any, Any]:
    import transformers

    from vtok_eval import models

    if source is None:
        return models.load(name)
    return plain(source, dtype=torch.float32), transformers.AutoProcessor.from_pretrained(source)


def _on(pictures: Sequence[Picture], device: str | torch.device) -> list[Picture]:
    return [(x.to(device), grid) for x, grid in pictures]


class Seen:
    """A batch of scenes as every stage sees it.

    Attributes
    ----------
    pictures : list of Picture
        Features in front of the resampler, with their grids.
    batch : Batch
        Its questions.
    teacher : (A, V) Tensor
        What the model answers with all tokens.
    progress : float
        Of the stage, in [0, 1].
    """

    def __init__(self, pictures: list[Picture], batch: Batch, teacher: Tensor, progress: float) -> None:
        self.pictures, self.batch, self.teacher, self.progress = pictures, batch, teacher, progress


class Drawn:
    """Batches of scenes on disk: a tower and a language model run once over each.

    Parameters
    ----------
    name : str
        Of the model.
    processor
        Its processor.
    data : Scenes
        Without pixels: questions are drawn anew each time, they cost little.
    folder : Path
        A file a batch.
    """

    def __init__(self, name: str, processor: Any, data: Scenes, folder: Path) -> None:
        self.name, self.processor, self.data, self.folder = name, processor, data, folder

    def __len__(self) -> int:
        return len(self.data)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    @torch.no_grad()
    def fill(self, talk: Talk, resume: bool) -> None:
        """Draw what is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [i for i in range(len(self)) if not (resume and self.path(i).exists())]
        full = Scenes(
            self.name, self.processor, self.data.size, len(self), self.data.seed, self.data.questions,
            self.data.pairs, self.data.crowds, self.data.lists, kinds=self.data.kinds, rare=self.data.rare,
        )  # fmt: skip
        with progress("drawing scenes", len(missing)) as advance:
            for number in missing:
                batch = full[number]
                found = entering(talk, moved(batch.images, next(talk.parameters()).device))
                answers = talk.answers(batch, projected(talk, found), [torch.arange(len(x)) for x in found])
                tensors = {"teacher": answers.logits.half(), "features": torch.cat(found).half()}
                part = self.path(number).with_suffix(".part")
                save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, part)
                part.replace(self.path(number))
                advance(1)

    def pictures(self, number: int) -> list[Picture]:
        """Features of a batch's pictures, fp32."""
        return self.read(number, 1.0).pictures

    def read(self, number: int, progress: float) -> Seen:
        tensors, batch = load_file(self.path(number)), self.data[number]
        grids = [grid for own in batch.grids for grid in own]
        sizes = [rows * columns for rows, columns in grids]
        features = tensors["features"].float().split(sizes)
        return Seen(list(zip(features, grids, strict=True)), batch, tensors["teacher"].float(), progress)


class Order(Dataset):
    """Step number i of a stage: every batch once, in a drawn order, then all again in another."""

    def __init__(self, drawn: Drawn, steps: int, seed: str) -> None:
        self.drawn, self.steps, self.seed = drawn, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Seen:
        turn, place = divmod(step, len(self.drawn))
        order = list(range(len(self.drawn)))
        random.Random(f"train/{self.seed}/{turn}").shuffle(order)
        return self.drawn.read(order[place], step / max(1, self.steps - 1))


def entering(talk: Talk, images: dict[str, Tensor]) -> list[Tensor]:
    """(n, D) of every picture where the resampler stands: before LLaVA's projector, after Qwen's merger."""
    if talk.name != "nano-llava":
        return talk.features(images)
    entered: list[Tensor] = []
    watch = talk.project.register_forward_pre_hook(lambda _, args: entered.append(args[0]), prepend=True)
    try:
        talk.features(images)
    finally:
        watch.remove()
    return list(entered[0])


def projected(talk: Talk, tokens: Sequence[Tensor]) -> list[Tensor]:
    """Tokens as the language model gets them."""
    if talk.name != "nano-llava":
        return list(tokens)
    return list(talk.project(torch.cat(list(tokens))).split([len(own) for own in tokens]))


class Answering:
    """The language model, frozen, must say with a prefix what it says with all tokens.

    Parameters
    ----------
    talk : Talk
        The model.
    resampler : OrderedResampler
        What it is told.
    """

    def __init__(self, talk: Talk, resampler: OrderedResampler) -> None:
        self.talk, self.resampler = talk, resampler

    def step(self, seen: Seen) -> tuple[Tensor, dict[str, float]]:
        device = next(self.talk.parameters()).device
        total = torch.zeros((), device=device)
        numbers: dict[str, float] = {}
        chosen = prefixes(self.resampler.config.tokens, seen.progress, WHOLE)
        whole = self._read(seen, max(chosen))
        for name, k in zip(("long", "some"), chosen, strict=True):
            said = self._said(seen, whole, k)
            loss, found = answer_loss(said.logits, seen.teacher.to(device), said.target)
            total = total + loss / 2
            numbers |= {f"{key} {name}": value for key, value in found.items()}
        return total, numbers

    def saliency(self, seen: Seen) -> tuple[Tensor, dict[str, float]]:
        """Stage of saliency: which tokens of an item's pictures the answer to one of its questions hangs on."""
        device = next(self.talk.parameters()).device
        tokens = [x.to(device).requires_grad_() for x, _ in seen.pictures]
        said = self.talk.answers(seen.batch, projected(self.talk, tokens), [torch.arange(len(x)) for x in tokens])
        numbers = said.turn.unique()
        items = numbers // ITEM
        # one question of each item, at random; items do not see each other
        drawn = torch.rand(len(numbers), device=device)
        chosen = torch.stack([numbers[torch.where(items == item, drawn, -1.0).argmax()] for item in items.unique()])
        best = seen.teacher.to(device).argmax(-1, keepdim=True)
        likely = said.logits.log_softmax(-1).gather(1, best)[torch.isin(said.turn, chosen)]
        gradients = torch.autograd.grad(likely.sum(), tokens)
        return salience(self.resampler, [x.detach() for x in tokens], gradients)

    def halting(self, seen: Seen) -> tuple[Tensor, dict[str, float]]:
        """Stage of halting: whether answers stay the same with a prefix."""
        with torch.no_grad():
            k = prefixes(self.resampler.config.tokens)[1]
            whole = self._read(seen, k)
            said = self._said(seen, whole, k)
            same = same_answers(said.logits.argmax(-1), seen.teacher.to(said.logits).argmax(-1), said.turn)
        # an item's questions are about all of its pictures, and items have equally many
        head = self.resampler.halting(torch.cat([read.registers[:, -1:] for read in whole]))
        items = head.view(len(seen.batch.turns), -1)
        asked = [own for own, turns in zip(items, seen.batch.turns, strict=True) for _ in turns]
        return agreement_loss(asked, same), {"same": same.float().mean().item()}

    def _read(self, seen: Seen, k: int) -> list[Read]:
        pictures = _on(seen.pictures, next(self.talk.parameters()).device)
        return [self.resampler.read(x[None], grid, k) for x, grid in pictures]

    def _said(self, seen: Seen, whole: Sequence[Read], k: int) -> Answers:
        """Answers with the first k tokens of what was read."""
        laid = [
            own
            for read, (_, grid) in zip(whole, seen.pictures, strict=True)
            for own in planned(read.starts, [k], grid, self.resampler.config.scheme)
        ]
        order = [own.places.argsort() for own in laid]
        tokens = [read.tokens[0, own.to(read.tokens.device)] for read, own in zip(whole, order, strict=True)]
        kept = [own.places[by] for own, by in zip(laid, order, strict=True)]
        return self.talk.answers(seen.batch, projected(self.talk, tokens), kept)


def distill(model: str, out: Path, **options: Any) -> Path:
    """``vtok tokenizer distill --data scenes``: an embedded model by name, or a folder of one that was trained anew.

    Entry point of the group ``vtok.distill``.

    Raises
    ------
    VtokError
        A model that no scenes are drawn for.
    """
    if model in RECIPES:
        return run(model, out, **options)
    folder = Path(model)
    name = _kind(folder) if (folder / "config.json").is_file() else None
    if name is None:
        raise VtokError(
            f"scenes are drawn for {', '.join(RECIPES)} and folders of such models, and {model} is none; pass a folder "
            "of questions and pictures as --data"
        )
    return run(name, out, source=folder, **options)


def _kind(folder: Path) -> str | None:
    """Which nano model a folder holds."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("text_config", {}).get("hidden_size") != 160:
        return None
    return {"llava": "nano-llava", "qwen2_5_vl": "nano-qwen"}.get(config.get("model_type", ""))
