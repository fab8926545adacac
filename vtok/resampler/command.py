"""``vtok tokenizer distill``: train a resampler for ``vtok.compress(model, "flextok", weights=...)``."""

from __future__ import annotations

import json
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.errors import VtokError

#: installed packages register data to distil on: (model, out, **options) -> folder of the resampler
DATA = "vtok.distill"
#: and models by name: name -> folder
MODELS = "vtok.models"


def distill(
    model: Annotated[str, typer.Option(help="A folder that from_pretrained loads, an embedded model, a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and the finished resampler/.")],
    data: Annotated[
        str, typer.Option(help="A folder of JSON Lines (image, question, answer) and pictures, or a name: scenes.")
    ] = "scenes",
    tokens: Annotated[int, typer.Option(help="K, the most tokens of a picture.", min=1)] = 256,
    width: Annotated[int, typer.Option(help="Channels inside.", min=4)] = 512,
    blocks: Annotated[int, typer.Option(help="How many.", min=1)] = 4,
    scheme: Annotated[
        str, typer.Option(help="What tokens start as: averages (haar, quadtree) or tokens (farthest, salient).")
    ] = "salient",
    saliency: Annotated[
        int, typer.Option(help="Steps of learning which tokens matter; of the scheme salient.", min=0)
    ] = 500,
    features: Annotated[int, typer.Option(help="Steps of learning from features.", min=0)] = 2000,
    answers: Annotated[int, typer.Option(help="Steps of learning from answers.", min=0)] = 5000,
    halting: Annotated[int, typer.Option(help='Steps of the head behind keep="auto"; 0: no head.', min=0)] = 300,
    lora: Annotated[
        int, typer.Option(help="Rank of a change of the language model, learnt along and saved as adapter/.", min=0)
    ] = 0,
    batch: Annotated[int, typer.Option(help="Questions in a step.", min=1)] = 8,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    scale: Annotated[float, typer.Option(help="Multiply the steps of a named data's recipe by this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one by default.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the frozen model: float32, bfloat16 or float16.")] = "float32",
    workers: Annotated[int, typer.Option(help="Processes that prepare batches.", min=0)] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints in the folder.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Distil an ordered resampler from a frozen model; interrupted, the same command goes on."""
    import torch

    from vtok.resampler import files

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    named = {entry.name: entry for entry in entry_points(group=DATA)}
    if data in named and not Path(data).is_dir():
        if lora:
            raise VtokError(f"--data {data} has a recipe of its own, without lora; give a folder of questions")
        # sizes and steps are the recipe's, times --scale
        folder = named[data].load()(model, out, seed=seed, scale=scale, device=place, workers=workers, resume=resume)
    else:
        from vtok.resampler.data import read
        from vtok.resampler.distill import Recipe
        from vtok.resampler.distill import distill as run

        questions = read(_existing(data, sorted(named)))
        network, processor = _loaded(model, place, dtype)
        recipe = Recipe(saliency, features, answers, halting, batch, rate, seed=seed, lora=lora)
        sizes: dict[str, Any] = {"tokens": tokens, "width": width, "blocks": blocks, "scheme": scheme}
        run(network, processor, questions, out, recipe, workers=workers, resume=resume, **sizes)
        folder = out / "resampler"
    found = files.load(folder)
    parameters = sum(p.numel() for p in found.parameters())
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "parameters": parameters, "tokens": found.config.tokens}))
    else:
        if lora:
            typer.echo(f'wrote {out / "adapter"}: model.load_adapter("{out / "adapter"}") first')
        typer.echo(f'wrote {folder}: vtok.compress(model, "flextok", keep=17, weights="{folder}")')


def _existing(data: str, named: list[str]) -> Path:
    if not Path(data).is_dir():
        raise VtokError(
            f"there is no folder {data}, and no data of that name; named data here: {', '.join(named) or 'none'}"
        )
    return Path(data)


def _loaded(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    import torch
    import transformers

    from vtok.io import is_folder, plain

    if dtype not in ("float32", "bfloat16", "float16"):
        raise VtokError(f"dtype {dtype!r} is unknown; take float32, bfloat16 or float16")
    named = {entry.name: entry for entry in entry_points(group=MODELS)}
    source = str(named[model].load()(model)) if model in named and not is_folder(model, named) else model
    try:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists():
            auto: Any = transformers.AutoModelForImageTextToText
            network = auto.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
        else:
            network = plain(source, dtype=getattr(torch, dtype))
        processor: Any = transformers.AutoProcessor.from_pretrained(source)
    except VtokError:
        raise
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VtokError(f"transformers cannot load model and processor of {source}: {reason}") from error
    return network.to(device), processor
