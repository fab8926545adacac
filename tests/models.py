"""Tiny random vision-language models of the six supported families, and inputs that fit them.

Everything comes from configs and seeds: nothing is downloaded, and the same call gives the same weights and pixels. The
weights are drawn so that attention is far from uniform and the logits depend on the image and on every position axis.

A prompt is one list of segments per sample (see `Sample`)::

    model = build("qwen2_vl")
    batch = inputs("qwen2_vl", model, [[5, "image", 4], [3, "image:84x56", 2, "image#7", 6], [9]])
    logits = model(**batch).logits
    alone = model(**single(batch, 1)).logits  # sample 1 without the others and without padding
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

FAMILIES: tuple[str, ...] = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
QWEN: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
HAS_VIDEO: tuple[str, ...] = ("llava_onevision", *QWEN)

Segment = int | str
"""An int: that many random text tokens. "image" or "video" is one at the family's default size; ":WxH" asks for another
size in pixels (llava has only one), "#k" names the pixels: two with the same k and size are the same picture."""
Sample = Sequence[Segment]

VOCAB = 200
PAD, BOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 3, 4, 5, 6
FIRST_TEXT = 10
"""Random text draws its ids from here on; `build` makes sure that greedy decoding never yields an id below."""

SIDE, PATCH, CELLS = 56, 7, 8  # of a CLIP or SigLIP tile: 56 px, 7 px a patch, 8 x 8 patches
MERGE = 2
FRAMES = 3  # frames of a llava_onevision video, temporal patches (of two frames) of a Qwen video
DEFAULT_SIZE: dict[str, tuple[int, int]] = {"llava_next": (112, 84), "llava_onevision": (112, 98)}
"""Width and height of "image" where it is not 56 x 56: four tiles, to unpad, and for onevision to shrink."""
VIDEO_SIZE = (42, 28)

SCENARIOS: dict[str, list[list[Segment]]] = {
    "one": [[5, "image", 7]],
    "two_images": [[4, "image", 3, "image:84x56", 6]],
    "ragged": [[5, "image", 4], [3, "image:84x56", 2, "image:42x70", 6], [9]],
    "text": [[9], [5]],
    "adjacent": [[3, "image", "image:84x56", 5]],
    "video": [[4, "video", 6]],
    "mixed": [[4, "video", 6], [3, "image", 2, "video", 5], [7, "image:84x56", 3], [8]],
}


def scenarios(family: str) -> list[str]:
    """The names in `SCENARIOS` that the family can run."""
    return [name for name in SCENARIOS if family in HAS_VIDEO or name not in ("video", "mixed")]


# Models


def build(
    family: str,
    *,
    attn: str = "sdpa",
    layers: int = 8,
    vision_layers: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A tiny random `...ForConditionalGeneration` in eval mode, with a config of its own, that never stops early.

    A weight depends on the seed and its name only: more layers or another attention leave the rest as it is.
    """
    name = {
        "llava": "Llava",
        "llava_next": "LlavaNext",
        "llava_onevision": "LlavaOnevision",
        "qwen2_vl": "Qwen2VL",
        "qwen2_5_vl": "Qwen2_5_VL",
        "qwen3_vl": "Qwen3VL",
    }[family]
    config = getattr(transformers, f"{name}Config")(**_config(family, layers, vision_layers or 4))
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    model = cls._from_config(config, attn_implementation=attn, dtype=dtype)
    _randomize(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = BOS
    model.generation_config.pad_token_id = PAD
    return model.eval()


def _config(family: str, layers: int, vision_layers: int) -> dict:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    vision: dict = {"hidden_size": 32, "intermediate_size": 48, "patch_size": PATCH}
    if family in QWEN:
        vision |= {"depth": vision_layers, "num_heads": 2, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
        # The usual theta of 1e6 and so few frequencies leave the column of a token without effect: moving an image by a
        # column changes the logits by 0.0002, and with this theta by 0.06.
        rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
        if family == "qwen2_vl":
            del vision["intermediate_size"]
            vision |= {"embed_dim": 32, "hidden_size": text["hidden_size"], "mlp_ratio": 2}
        elif family == "qwen2_5_vl":  # every second layer is full; the others see windows of 2 x 2 merged cells
            full = list(range(1, vision_layers, 2)) or [0]
            vision |= {"out_hidden_size": text["hidden_size"], "window_size": 2 * MERGE * PATCH, "tokens_per_second": 2}
            vision |= {"fullatt_block_indexes": full}
        else:
            taps = sorted({vision_layers * k // 4 for k in (1, 2, 3)})
            vision |= {"out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": taps}
            vision |= {"num_position_embeddings": 36}
            rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
            text |= {"head_dim": 16}
        ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
        ids |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
        return {"text_config": text | {"rope_parameters": rope}, "vision_config": vision, **ids}

    vision |= {"num_hidden_layers": vision_layers, "num_attention_heads": 2, "image_size": SIDE}
    if family == "llava_onevision":
        return {
            "text_config": text | {"model_type": "qwen2"},
            "vision_config": vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "image_grid_pinpoints": [[56, 56], [56, 112], [112, 56], [112, 112]],
            "vision_aspect_ratio": "anyres_max_2",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
        }
    config = {
        "text_config": text | {"model_type": "llama"},
        "vision_config": vision | {"model_type": "clip_vision_model", "projection_dim": 32},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_token_index": IMAGE,
        "image_seq_length": CELLS**2,
    }
    if family == "llava_next":
        config["text_config"] = text | {"model_type": "mistral", "sliding_window": None}
        config["image_grid_pinpoints"] = [[56, 112], [112, 56], [112, 112]]
    return config


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    for name, weight in model.named_parameters():
        value = torch.randn(weight.shape, generator=_generator("weight", seed, name))
        if name.endswith("bias"):
            value *= 0.1
        elif weight.ndim == 1 and name.endswith("weight"):  # of a norm; those of q and k set how peaked attention is
            value = (1 + 0.1 * value) * (1.5 if re.search(r"[qk]_norm", name) else 1.0)
        elif re.search(r"pos(ition)?_embed", name):
            value *= 0.5
        elif weight.ndim > 1 and "embed_tokens" not in name:
            peaked = re.search(r"\.(q_proj|k_proj|qkv)\.", name)
            value *= (1.5 if peaked else 1.0) / math.sqrt(weight[0].numel())
        if name == "lm_head.weight":
            value[:FIRST_TEXT] = 0.0
        weight.copy_(value)


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


# Inputs


class Batch(dict):
    """The keyword arguments of a model's forward. Its attributes say what belongs to which sample."""

    def __init__(self, tensors: dict[str, Tensor], images: list[int], videos: list[int], tiles: list[int]):
        super().__init__(tensors)
        self.images = images  # of every sample
        self.videos = videos  # of every sample
        self.tiles = tiles  # of every image, where pixel_values is padded with empty tiles; else empty


@dataclass
class _Visual:
    """One image or video: what stands for it in the prompt, and what the family's processor makes of it."""

    ids: list[int]
    pixels: Tensor
    size: tuple[int, ...]  # the grid (t, h, w) for Qwen, else (height, width)


def inputs(
    family: str,
    model: PreTrainedModel,
    prompts: Sequence[Sample],
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    nested: bool = True,
) -> Batch:
    """What the family's processor would return for the prompts: left-padded ids, mask, pixels, sizes or grids.

    Ids and pixels depend on the seed and the sample alone (and, for a sample that occurs before in the prompts, on how
    often), so that `single(inputs(..., prompts), i)` equals `inputs(..., [prompts[i]])`.

    `nested` is about llava_onevision, whose processor makes a single tile of an image that has others beside it in its
    sample if it gets one list of images per sample (as a chat template gives it), but splits every image, and says 1 in
    `batch_num_images` for each, if it gets one flat list.
    """
    rows: list[list[int]] = []
    visuals: dict[str, list[list[_Visual]]] = {"image": [], "video": []}
    seen: Counter[str] = Counter()
    for sample in prompts:
        key = (seed, repr(list(sample)), seen[repr(list(sample))])
        seen[key[1]] += 1
        words = _generator("text", *key)
        rows.append([])
        for found in visuals.values():
            found.append([])
        split = not nested or sum(str(segment).startswith("image") for segment in sample) == 1
        for place, segment in enumerate(sample):
            if isinstance(segment, int):
                rows[-1] += _words(words, segment)
                continue
            kind, width, height, name = _parse(family, segment)
            pixels = _generator("pixels", seed, name) if name else _generator("pixels", *key, place)
            visual = _visual(family, model.config, kind, (height, width), split, pixels, words)
            rows[-1] += visual.ids
            visuals[kind][-1].append(visual)

    length = max(map(len, rows))
    tensors = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
    if family in QWEN:
        ids = tensors["input_ids"]
        tensors["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    images, videos = (list(chain(*visuals[kind])) for kind in ("image", "video"))
    if images:
        tensors |= _collate_images(family, images)
    if videos:
        tensors |= _collate_videos(family, videos)
    counts = {kind: [len(found) for found in visuals[kind]] for kind in visuals}
    if images and family == "llava_onevision":
        tensors["batch_num_images"] = torch.tensor([n for n in counts["image"] if n] if nested else [1] * len(images))
    tiles = [len(image.pixels) for image in images] if "image_sizes" in tensors else []
    return Batch({k: v.to(device) for k, v in tensors.items()}, counts["image"], counts["video"], tiles)


def text_only(
    family: str,
    model: PreTrainedModel,
    lengths: Sequence[int],
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Batch:
    """Samples of text only, of the given lengths."""
    return inputs(family, model, [[length] for length in lengths], seed=seed, device=device)


def single(batch: Batch, i: int) -> Batch:
    """Sample i alone: without padding, with only its own images and videos."""
    keep = batch["attention_mask"][i].bool()
    out = {key: value[i : i + 1, keep] for key, value in batch.items() if key in _PER_TOKEN}
    tiles: list[int] = []
    for counts, key, grids in (
        (batch.images, "pixel_values", "image_grid_thw"),
        (batch.videos, "pixel_values_videos", "video_grid_thw"),
    ):
        mine = slice(sum(counts[:i]), sum(counts[: i + 1]))
        if not counts[i]:
            continue
        if grids in batch:
            ends = [0, *batch[grids].prod(-1).cumsum(0).tolist()]
            out[key], out[grids] = batch[key][ends[mine.start] : ends[mine.stop]], batch[grids][mine]
        else:
            out[key] = batch[key][mine]
        if key == "pixel_values" and batch.tiles:
            tiles = batch.tiles[mine]
            out[key] = out[key][:, : max(tiles)]
            out["image_sizes"] = batch["image_sizes"][mine]
        if key == "pixel_values" and "batch_num_images" in batch:
            numbers = batch["batch_num_images"]
            out["batch_num_images"] = numbers[mine] if len(numbers) == sum(counts) else numbers.new_tensor([counts[i]])
        if key == "pixel_values_videos" and "second_per_grid_ts" in batch:
            out["second_per_grid_ts"] = batch["second_per_grid_ts"][mine]
    return Batch(out, [batch.images[i]], [batch.videos[i]], tiles)


def sample_images(batch: Batch, i: int) -> tuple[int, int]:
    """How many images and how many videos sample i has."""
    return batch.images[i], batch.videos[i]


def visual_mask(batch: Batch) -> Tensor:
    """Where the placeholders of images and videos are: bool, of the shape of the ids."""
    return (batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)


def pad_right(batch: Batch) -> Batch:
    """The same batch, padded on the other side."""
    shifts = batch["attention_mask"].sum(-1).tolist()
    out = dict(batch)
    for key in _PER_TOKEN & batch.keys():
        rows = [row.roll(shift) for row, shift in zip(batch[key], shifts, strict=True)]
        out[key] = torch.stack(rows)
    return Batch(out, batch.images, batch.videos, batch.tiles)


def labels(batch: Batch) -> Tensor:
    """Next-token labels: the ids, with -100 on padding, on placeholders and on the token that follows a placeholder.

    So no prediction that counts is made at a visual token, which a compressed model may not have.
    """
    visual = visual_mask(batch)
    after = F.pad(visual[:, :-1], (1, 0))
    return batch["input_ids"].masked_fill(visual | after | (batch["attention_mask"] == 0), -100)


_PER_TOKEN = {"input_ids", "attention_mask", "mm_token_type_ids"}


def _words(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(FIRST_TEXT, VOCAB, (count,), generator=generator).tolist()


def _parse(family: str, segment: str) -> tuple[str, int, int, str | None]:
    match = re.fullmatch(r"(image|video)(?::(\d+)x(\d+))?(?:#(\w+))?", segment)
    if match is None or (match[1] == "video" and family not in HAS_VIDEO):
        raise ValueError(f"{family} has no {segment!r}")
    width, height = VIDEO_SIZE if match[1] == "video" else DEFAULT_SIZE.get(family, (SIDE, SIDE))
    return match[1], int(match[2] or width), int(match[3] or height), match[4]


def _visual(
    family: str,
    config: PreTrainedConfig,
    kind: str,
    size: tuple[int, int],
    split: bool,
    generator: torch.Generator,
    words: torch.Generator,
) -> _Visual:
    if family in QWEN:
        factor = PATCH * MERGE
        height, width = (max(round(side / factor), 1) * factor for side in size)
        if kind == "image":
            frames = _pixels(generator, 1, height, width).expand(2, -1, -1, -1)
        else:
            frames = _pixels(generator, 2 * FRAMES, height, width)
        patches, grid = _patchify(frames)
        token = IMAGE if kind == "image" else VIDEO
        count = grid[1] * grid[2] // MERGE**2
        if family == "qwen3_vl" and kind == "video":  # a time stamp in words before every frame
            parts = [[*_words(words, 3), VISION_START, *[token] * count, VISION_END] for _ in range(grid[0])]
            return _Visual(list(chain(*parts)), patches, grid)
        return _Visual([VISION_START, *[token] * (count * grid[0]), VISION_END], patches, grid)
    if kind == "video":
        pooled = math.ceil(CELLS / 2) ** 2
        return _Visual([VIDEO] * (FRAMES * pooled + 1), _pixels(generator, FRAMES, SIDE, SIDE), size)
    if family == "llava":
        return _Visual([IMAGE] * CELLS**2, _pixels(generator, 1, SIDE, SIDE), (SIDE, SIDE))
    image = _pixels(generator, 1, *size)
    if family == "llava_onevision" and not split:
        height, width = size
        square = F.pad(image, _centre(max(size) - width) + _centre(max(size) - height))
        return _Visual([IMAGE] * (CELLS**2 + 1), _resize(square, SIDE, SIDE), size)
    tiles, (rows, columns) = _split(image, config.image_grid_pinpoints)
    rows, columns = unpad_image(torch.empty(1, rows, columns), size).shape[1:]
    if family == "llava_onevision":
        limit = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (limit * CELLS**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return _Visual([IMAGE] * (CELLS**2 + rows * (columns + 1)), tiles, size)


def _pixels(generator: torch.Generator, frames: int, height: int, width: int) -> Tensor:
    """Noise on top of something smooth, so that near patches are more alike than far ones."""
    smooth = torch.randn(frames, 3, 4, 4, generator=generator)
    return _resize(smooth, height, width) + 0.5 * torch.randn(frames, 3, height, width, generator=generator)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True)


def _centre(missing: int) -> tuple[int, int]:
    return missing // 2, missing - missing // 2


def _split(image: Tensor, pinpoints: list[list[int]]) -> tuple[Tensor, tuple[int, int]]:
    """The whole image as a tile, then those of its best resolution by rows; and the grid of patches of the latter."""
    height, width = image.shape[-2:]
    best_height, best_width = select_best_resolution((height, width), pinpoints)
    scale = min(best_width / width, best_height / height)
    inner = min(math.ceil(height * scale), best_height), min(math.ceil(width * scale), best_width)
    padded = F.pad(_resize(image, *inner), _centre(best_width - inner[1]) + _centre(best_height - inner[0]))
    rows, columns = best_height // SIDE, best_width // SIDE
    tiles = padded.view(3, rows, SIDE, columns, SIDE).permute(1, 3, 0, 2, 4).reshape(-1, 3, SIDE, SIDE)
    return torch.cat([_resize(image, SIDE, SIDE), tiles]), (rows * CELLS, columns * CELLS)


def _patchify(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames (2t, 3, h, w) as Qwen's packed patches, those of a merged cell next to each other; and the grid."""
    t, h, w = len(frames) // 2, frames.shape[-2] // PATCH, frames.shape[-1] // PATCH
    cells = frames.reshape(t, 2, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    return cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)


def _collate_images(family: str, images: list[_Visual]) -> dict[str, Tensor]:
    sizes = torch.tensor([image.size for image in images])
    if family in QWEN:
        return {"pixel_values": torch.cat([image.pixels for image in images]), "image_grid_thw": sizes}
    if family == "llava":
        return {"pixel_values": torch.cat([image.pixels for image in images])}
    most = max(len(image.pixels) for image in images)
    padded = [F.pad(image.pixels, (0, 0, 0, 0, 0, 0, 0, most - len(image.pixels))) for image in images]
    return {"pixel_values": torch.stack(padded), "image_sizes": sizes}


def _collate_videos(family: str, videos: list[_Visual]) -> dict[str, Tensor]:
    if family not in QWEN:
        return {"pixel_values_videos": torch.stack([video.pixels for video in videos])}
    out = {"pixel_values_videos": torch.cat([video.pixels for video in videos])}
    out["video_grid_thw"] = torch.tensor([video.size for video in videos])
    if family == "qwen2_5_vl":
        out["second_per_grid_ts"] = torch.ones(len(videos))
    return out


def real_of(batch: Batch) -> Tensor:
    """(B, L) bool: columns that are no padding."""
    return batch["attention_mask"].bool()


def close(a: Tensor, b: Tensor, atol: float = 2e-5) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(a, b, atol=atol, rtol=0)
