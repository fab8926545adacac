"""Recipes of nano-llava and nano-qwen: a tower that sees, then a language model that answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import VtokError
from vtok.training import Stage, done, train
from vtok_eval import assets, scenes
from vtok_eval.models import nano, surgery
from vtok_eval.train.data import Scenes, prepared
from vtok_eval.train.hints import Hints
from vtok_eval.train.language import Talk
from vtok_eval.train.tower import Tower, matmul_patches
from vtok_eval.train.words import Words

# A stage: batches, peak rate, what else it needs, and under "scenes" what `Scenes` draws.
_ASKED: dict[str, Any] = {"size": 8, "questions": 20, "pairs": 0.12, "lists": 0.15}
_SYMBOLS: dict[str, Any] = {
    "steps": 2600,
    "rate": 2e-3,
    "layers": 4,
    "symbols": True,
    "sparse": (0.6, 0.2),
    "scenes": _ASKED | {"size": 16, "crowds": 0.3, "pixels": False, "reuse": 2},
}
# what is learnt by then is asked less, and what is looked up by its place, its size or its order more
_LOOKUPS: dict[str, Any] = _SYMBOLS | {
    "steps": 900,
    "rate": 1.5e-3,
    "scenes": _SYMBOLS["scenes"] | {"rare": {"exists": 0.15, "colour": 0.15, "position": 0.15}},
}
_READING: dict[str, Any] = _LOOKUPS | {
    "steps": 6700,
    "scenes": _SYMBOLS["scenes"]
    | {
        "crowds": 0.1,
        "kinds": {"mixed": 0.15, "count": 0.3, "text": 0.45, "detail": 0.1},
        "rare": {"exists": 0.1, "colour": 0.1, "position": 0.1, "objects": 0.3, "detail": 0.5},
    },
}
_WORDS: dict[str, Any] = {
    "steps": 3000,
    "rate": 3e-3,
    "tower": 1e-3,
    "tokens": 4096,
    "batches": 1100,
    "scenes": {"size": 8, "crowds": 0.3, "kinds": {"mixed": 0.3, "count": 0.1, "text": 0.4, "detail": 0.2}},
}
# what is right by then is asked less, what is not is drawn more
_SPARSE: dict[str, Any] = {
    "steps": 2400,
    "rate": 8e-4,
    "layers": 4,
    "sparse": (1.0, 0.4),
    "blend": 0.0,
    "scenes": _ASKED
    | {
        "crowds": 0.1,
        "reuse": 4,
        "mixed": 32,
        "kinds": {"mixed": 0.3, "count": 0.25, "text": 0.28, "detail": 0.17},
        "rare": {"exists": 0.25, "colour": 0.25, "position": 0.25},
    },
}
_STAGES: dict[str, dict[str, Any]] = {
    "tower": {"steps": 2500, "rate": 1.5e-4, "scenes": {"size": 8, "crowds": 0.8}},
    "symbols": _SYMBOLS,
    "lookups": _LOOKUPS,
    "reading": _READING,
    "words": _WORDS,
    "sparse": _SPARSE,
    # on what the tower says alone, which a picture shown four times has no news of
    "pictures": _SPARSE | {"steps": 1000, "rate": 4e-4, "blend": None, "scenes": _SPARSE["scenes"] | {"reuse": 2}},
    # all layers, but few tokens: a third of the time of a step on all of them
    "wide": _SPARSE
    | {
        "steps": 6000,
        "rate": 4e-4,
        "layers": None,
        "close": 0.5,
        "blend": None,
        "scenes": _SPARSE["scenes"]
        | {
            "reuse": 2,
            "pairs": 0.18,
            "kinds": {"mixed": 0.19, "count": 0.35, "text": 0.22, "detail": 0.24},
            "rare": {"exists": 0.2, "colour": 0.2, "position": 0.2, "objects": 0.6},
        },
    },
    "full": {"steps": 200, "rate": 2e-4, "scenes": _ASKED | {"reuse": 2, "mixed": 32}},
}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "nano-llava": _STAGES,
    # a cell of its tower is four patches: fewer of them cost as much
    "nano-qwen": _STAGES
    | {
        "tower": _STAGES["tower"] | {"steps": 1500, "rate": 3e-4},
        "words": _WORDS | {"tokens": 1024, "batches": 600},
    },
}


def run(
    name: str,
    out: Path,
    *,
    seed: int = 0,
    scale: float = 1.0,
    device: str = "cpu",
    workers: int = 0,
    resume: bool = True,
) -> Path:
    """Train a nano model and save it as a plain folder.

    Parameters
    ----------
    name : str
        ``"nano-llava"`` or ``"nano-qwen"``.
    out : Path
        For checkpoints, log and the finished ``model/``.
    seed : int
        Of weights and scenes.
    scale : float
        All step counts times this; 1 is the whole recipe.
    device : str
        ``"cpu"`` or ``"cuda"``.
    workers : int
        Processes that draw scenes; 0 draws them in this one.
    resume : bool
        Go on from checkpoints in ``out``.

    Returns
    -------
    Path
        The folder of the finished model.
    """
    if name not in RECIPES:
        raise VtokError(f"there is no recipe for {name!r}; known are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    model, processor = nano.blank(name, scenes.words(), seed)
    teacher = start_tower(name, model, seed).to(device)
    model.train().to(device)
    talk, tower = Talk(name, model, processor), Tower(name, model, teacher).to(device)
    hints = Hints(processor.tokenizer, model.config.text_config.hidden_size).to(device)
    talk.hints = hints
    language = model.model.language_model
    hinted = hints.watch(language.layers[_chosen(12, 4)[1]])
    for layer in language.layers:
        layer.compile(dynamic=True)  # a fifth of a step's time, for half a minute once
    idle_layers(language, recipe["symbols"]["layers"])
    # but for its last feed-forward, the tower stays as it is after its own stage: its backward pass is most of a step
    for stage, own in recipe.items():
        steps, rate = max(1, round(own["steps"] * scale)), own["rate"]
        talk.symbols, talk.sparse, talk.blend = own.get("symbols", False), own.get("sparse"), own.get("blend")
        talk.close = own.get("close", 0.0)
        talk.remember = own["scenes"].get("mixed", 1)
        trained: nn.Module = talk
        step: Callable[[Any], tuple[Tensor, dict[str, float]]] = talk.step
        data = _drawn(name, processor, steps, f"{seed}/{stage}", own["scenes"])
        if stage == "tower":
            trained, step = tower, tower.step
            groups = [([tower.tower], rate), ([tower.heads], 2e-3)]
        elif stage == "words":
            words = Words(talk, own["tokens"])
            talk.measure(_drawn(name, processor, 1, f"{seed}/measure", {"size": 16, "crowds": 0.5})[0])
            if not (resume and done(out, stage, steps)):
                words.measure(_drawn(name, processor, 1, f"{seed}/marks", {"size": 64, "pixels": False})[0])
                words.collect(_drawn(name, processor, own["batches"], f"{seed}/{stage}", own["scenes"]))
            step, data = words.step, range(steps)
            groups = [([talk.project], rate), (words.last, own["tower"])]
        elif stage == "pictures":
            groups = [([language, talk.project], rate), ([hints], 2e-3)]
        elif stage in ("wide", "full"):
            groups = [([language, talk.project], rate)]
            hinted.remove()
            hints.states = None
        else:
            groups = [([language], rate), ([hints], 2e-3)]
        plan = Stage(stage, steps, groups, step, warmup=max(1, min(200, steps // 10)))
        with matmul_patches(model), some_layers(language, own.get("layers")):
            train(trained, plan, data, out, workers=workers, resume=resume)
    talk.fold()
    folder = out / "model"
    save(model, processor, folder)
    return folder


def _drawn(name: str, processor: Any, steps: int, seed: str, mix: dict[str, Any]) -> Any:
    return Scenes(name, processor, steps=steps, seed=f"{name}/{seed}", **mix)


def _chosen(depth: int, count: int) -> list[int]:
    """Layers evenly apart: 1, 4, 7, 10 of 12 for four."""
    return [(2 * i + 1) * depth // (2 * count) for i in range(count)]


@torch.no_grad()
def idle_layers(language: Any, count: int) -> None:
    """Let all layers but ``count`` add nothing at first: they join later without a change of what is computed."""
    chosen = _chosen(len(language.layers), count)
    for number, layer in enumerate(language.layers):
        if number not in chosen:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


@contextmanager
def some_layers(language: Any, count: int | None) -> Iterator[None]:
    """Run a language model with ``count`` of its layers only: three times faster for four of twelve, and what needs two
    steps of attention is found sooner by four layers than by twelve."""
    whole, depth = language.layers, language.config.num_hidden_layers
    if count is not None:
        language.layers = nn.ModuleList([whole[number] for number in _chosen(depth, count)])
        language.config.num_hidden_layers = count
    try:
        yield
    finally:
        language.layers, language.config.num_hidden_layers = whole, depth


def start_tower(name: str, model: Any, seed: int) -> Any:
    """Fill a nano model's tower with what it takes from DINOv2-small; that teacher, cut to as many layers."""
    from transformers import Dinov2Model

    config, weights = assets.dinov2()
    teacher: Any = Dinov2Model(config).eval()
    teacher.load_state_dict(weights)
    rng = random.Random(f"train/{seed}/start")
    pictures = [scenes.make(rng.choice(scenes.KINDS), rng, size=(nano.SIDE, nano.SIDE)).image for _ in range(12)]
    pixels = prepared("nano-llava", nano.processor("nano-llava", scenes.words()), pictures)[0]["pixel_values"]
    own = model.config.vision_config
    layers = own.num_hidden_layers
    seen = surgery.observed(teacher, pixels, layers)
    if name == "nano-llava":
        found = surgery.clip_from_dinov2(weights, layers, own.intermediate_size, own.image_size // own.patch_size, seen)
        model.model.vision_tower.load_state_dict(found)
    else:
        found = surgery.qwen_from_dinov2(weights, layers, own.intermediate_size, own.num_heads, seen)
        missing, unexpected = model.model.visual.load_state_dict(found, strict=False)
        if unexpected or any(not key.startswith("merger") for key in missing):
            raise VtokError(f"DINOv2's weights do not fit {name}: {[*missing, *unexpected][:3]}")
    # its last hidden state is then that of the last layer taken over, without the final norm
    teacher.encoder.layer = teacher.encoder.layer[:layers]
    teacher.layernorm = nn.Identity()
    return teacher.requires_grad_(False)


def save(model: Any, processor: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a folder that plain ``from_pretrained`` loads, in bfloat16: half the size."""
    lean = type(model)(model.config)
    lean.config.vtok_instruction = False  # trained on bare questions: vtok eval puts no instruction behind them
    lean.load_state_dict(model.state_dict())
    lean.generation_config = model.generation_config
    lean.to(dtype).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
