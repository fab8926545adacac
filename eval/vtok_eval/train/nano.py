"""Recipes of nano-llava and nano-qwen: a tower that sees, then a language model that answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtok.errors import VtokError
from vtok_eval import assets, scenes
from vtok_eval.models import nano, surgery
from vtok_eval.train.data import Scenes, prepared
from vtok_eval.train.hints import Hints
from vtok_eval.train.language import Talk
from vtok_eval.train.loop import Stage, train
from vtok_eval.train.tower import Tower, matmul_patches

#: pictures in a batch of each stage, batches, and peak learning rates
_SYMBOLS = {"size": 16, "steps": 2600, "rate": 2e-3, "sparse": (0.6, 0.2), "crowds": 0.3, "questions": 20, "layers": 4}
# what is learnt by then is asked less, and what is looked up by its place, its size or its order more
_LOOKUPS = _SYMBOLS | {"steps": 900, "rate": 1.5e-3, "rare": {"exists": 0.15, "colour": 0.15, "position": 0.15}}
_READING = _LOOKUPS | {
    "steps": 4500,
    "crowds": 0.1,
    "kinds": {"mixed": 0.15, "count": 0.3, "text": 0.45, "detail": 0.1},
    "rare": {"exists": 0.1, "colour": 0.1, "position": 0.1, "objects": 0.3, "detail": 0.5},
}
_WORDS = {"size": 8, "steps": 300, "rate": 3e-3}
_SPARSE = {"size": 8, "steps": 1000, "rate": 1.5e-3, "sparse": (1.0, 0.4), "crowds": 0.1}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "nano-llava": {
        "tower": {"size": 8, "steps": 700, "rate": 1e-4},
        "symbols": _SYMBOLS,
        "lookups": _LOOKUPS,
        "reading": _READING,
        "words": _WORDS,
        "sparse": _SPARSE,
        "full": {"size": 8, "steps": 500, "rate": 1e-3},
    },
    "nano-qwen": {
        "tower": {"size": 8, "steps": 1000, "rate": 3e-4},
        "symbols": _SYMBOLS,
        "lookups": _LOOKUPS,
        "reading": _READING,
        "words": _WORDS,
        "sparse": _SPARSE,
        "full": {"size": 8, "steps": 500, "rate": 1e-3},
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
        All step counts times this; 1 is what the shipped weights had.
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
    language: list[nn.Module] = [model.model.language_model]
    hinted = hints.watch(model.model.language_model.layers[_chosen(12, 4)[1]])
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)  # a fifth of a step's time, for half a minute once
    idle_layers(model.model.language_model, recipe["symbols"]["layers"])
    # the tower stays as it is from here on: its backward pass is most of a step, and it sees already
    language += [model.model.multi_modal_projector] if name == "nano-llava" else [model.model.visual.merger]
    for stage, own in recipe.items():
        steps = max(1, round(own["steps"] * scale))
        talk.symbols = stage in ("symbols", "lookups", "reading")
        if stage == "tower":
            trained: nn.Module = tower
            groups: list[Any] = [([tower.tower], own["rate"]), ([tower.heads], 2e-3)]
            step: Any = tower.step
        elif stage == "words":
            talk.measure(Scenes(name, processor, 16, 1, f"{name}/{seed}/measure", crowds=0.5)[0])
            trained, step, groups = talk, talk.align, [(language[1:], own["rate"])]
        else:
            trained, step = talk, talk.step
            talk.sparse = own.get("sparse")
            groups = [(language[:1] if talk.symbols else language, own["rate"])]
            groups += [([hints], 2e-3)] if stage != "full" else []
            if stage == "full":
                hinted.remove()
                hints.states = None
        mix = (
            {"crowds": 0.8}
            if stage in ("tower", "words")
            else {"pairs": 0.12, "crowds": own.get("crowds", 0.0), "lists": 0.15}
        )
        mix |= {"pixels": False, "reuse": 2, "rare": own.get("rare"), "kinds": own.get("kinds")} if talk.symbols else {}
        asked = own.get("questions", 10)
        data = Scenes(name, processor, own["size"], steps, f"{name}/{seed}/{stage}", asked, **mix)
        plan = Stage(stage, steps, groups, step, warmup=max(1, min(200, steps // 10)))
        with matmul_patches(model), some_layers(model.model.language_model, own.get("layers")):
            train(trained, plan, data, out, workers=workers, resume=resume)
    talk.fold()
    folder = out / "model"
    save(model, processor, folder)
    return folder


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
