"""With ``compat=True`` a method keeps what its authors' released code keeps (tests/data, DESIGN.md section 5.6).

Real CLIP, SigLIP and Llama blocks run here; only their projections are replaced, by the closed formulas of the golden
files. The hidden states carry the number of each original token, so whatever the engine gathers, cuts or re-orders
between two layers decides what the next layer's q, k and v are. That is how the files were made, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import vtok
import vtok_kernels as kernels
from vtok.engine import rows
from vtok.method import Method
from vtok.methods.flowcut import FlowCut
from vtok.methods.mctf import MCTF
from vtok.methods.tome import ToMe
from vtok.methods.transprune import TransPrune
from vtok.methods.visionzip import VisionZip
from vtok.protocol import Adapter, Medium, Part
from vtok.view import DecoderView, Shape, Stage, TowerView, View
from vtok_adapters.vit import huggingface_tower

from .models import build, inputs

DATA = Path(__file__).parent / "data"
GOLDEN = {name: json.loads((DATA / f"{name}.json").read_text())
          for name in ("flowcut", "transprune", "divprune", "fastv", "visionzip", "golden_fusion")}  # fmt: skip
IMAGE = 3
sin, cos = torch.sin, torch.cos


def cases(name: str, kind: str | None = None) -> Any:
    found = [case for case in GOLDEN[name]["cases"] if kind is None or case["kind"] == kind]
    return pytest.mark.parametrize("case", found, ids=lambda case: case["name"])


def close(found: Any, expected: Any, rtol: float = 5e-5) -> None:
    """Stored scores carry seven digits."""
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=rtol, atol=1e-8
    )


# Models whose hidden states carry token numbers


class Formula(nn.Module):
    """A module that computes a formula of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(x)


def zeros_like(width: int) -> Formula:
    return Formula(lambda x: x.new_zeros(*x.shape[:-1], width))


def heads(count: int, width: int, function: Callable[..., Tensor]) -> Formula:
    """A projection: ``function(i, b, h, c)`` of the token number (channel 0) and the batch label (channel 1)."""
    h = torch.arange(count, dtype=torch.float64)[:, None]
    c = torch.arange(width, dtype=torch.float64)[None]

    def project(x: Tensor) -> Tensor:
        i, b = (x[..., channel].double()[..., None, None] for channel in (0, 1))
        return (function(i, b, h, c) + 0.0 * (i + h + c)).float().flatten(-2)

    return Formula(project)


def numbered(labels: Sequence[int], count: int, width: int, start: int = 0) -> Tensor:
    """(B, count, width) hidden states: channel 0 is the token number, channel 1 the batch label."""
    x = torch.zeros(len(labels), count, width)
    x[..., 0] = torch.arange(start, start + count)
    x[..., 1] = torch.tensor(labels)[:, None]
    return x


Projections = Callable[[int], tuple[nn.Module, nn.Module, nn.Module]]


def tower(layers: int, width: int, count: int, projections: Projections, cls: bool = True) -> Any:
    """A CLIP or SigLIP tower of ``layers`` whose blocks leave the hidden states alone; the pixels are these states."""
    config: Any = {"hidden_size": width, "intermediate_size": 8, "num_attention_heads": count, "image_size": 8}
    config |= {"num_hidden_layers": layers, "patch_size": 4}
    model: Any
    if cls:
        model = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
        model.pre_layrnorm = nn.Identity()
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**config, vision_use_head=False)).eval()
    model.embeddings = Formula(lambda pixels: pixels)
    for number, block in enumerate(model.encoder.layers):
        block.layer_norm1 = block.layer_norm2 = nn.Identity()
        attention = block.self_attn
        attention.q_proj, attention.k_proj, attention.v_proj = projections(number)
        attention.out_proj = block.mlp = zeros_like(width)
    return model


def unchanged(layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return nn.Identity(), nn.Identity(), nn.Identity()


class Stub(nn.Module):
    """A vision-language model of which tests give the pieces and the whole prompt."""

    def __init__(self, text: Any, vision: Any = None, tile: int = 0) -> None:
        super().__init__()
        self.vision = tower(2, 8, 1, unchanged) if vision is None else vision
        self.projector, self.language_model, self.tile = nn.Identity(), text, tile
        self.config = SimpleNamespace(image_token_id=IMAGE)

    def get_image_features(self, lengths: Sequence[int], pixel_values: Tensor | None = None) -> Any:
        if pixel_values is None:
            return SimpleNamespace(pooler_output=[torch.zeros(length, 8) for length in lengths])
        states = self.vision(pixel_values, output_hidden_states=True).hidden_states
        return SimpleNamespace(pooler_output=self.projector(states[-2][:, 1:]))

    def forward(
        self, input_ids: Tensor, embeds: Tensor, lengths: Sequence[int], attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Any:  # fmt: skip
        self.features = self.get_image_features(lengths, pixel_values).pooler_output
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return self.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)


class StubAdapter(Adapter):
    family = "stub"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, Stub)

    def __init__(self, model: Any) -> None:
        self.base, self.text, self.length = model, model.language_model, model.tile
        self.tower = huggingface_tower(model.vision, -2, model.projector)

    def media(self, modality: str, call: Any) -> list[Medium]:
        return [Medium("image", (Part(1, length),), slice(i, i + 1)) for i, length in enumerate(call["lengths"])]

    def tile_length(self, modality: str) -> int:
        return self.length


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(vtok.api._ADAPTERS, "stub", StubAdapter)
    with torch.no_grad():
        yield


def decoder(layers: int, projections: Projections, kv_heads: int = 4, head: int = 8, rope: bool = False) -> Any:
    """A Llama whose blocks leave the hidden states alone."""
    width = 16
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=head, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model: Any = LlamaModel(config).eval()
    if not rope:
        model.rotary_emb = StandStill(head)
    for number, layer in enumerate(model.layers):
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        attention = layer.self_attn
        attention.q_proj, attention.k_proj, attention.v_proj = projections(number)
        attention.o_proj = layer.mlp = zeros_like(width)
    return model


class StandStill(nn.Module):
    """Rotary embedding by almost nothing: the sine is the position times 1e-12, for `Seen` to read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        sine = position_ids[..., None].float().expand(-1, -1, self.width) * 1e-12
        return torch.ones_like(sine), sine


def prompt(lengths: Sequence[int], starts: Sequence[int], images: Sequence[int], labels: Sequence[int]) -> dict:
    """Left-padded prompts with one image each; the hidden states number the real tokens from 0."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    embeds = torch.zeros(len(lengths), width, 16)
    for row, (length, start, image, label) in enumerate(zip(lengths, starts, images, labels, strict=True)):
        first = width - length
        mask[row, first:] = 1
        ids[row, first:] = 5
        ids[row, first + start : first + start + image] = IMAGE
        embeds[row, first:] = numbered([label], length, 16)[0]
    return {"input_ids": ids, "attention_mask": mask, "embeds": embeds, "lengths": list(images)}


class Seen:
    """What a decoder layer was given: token numbers and positions of real columns, per row."""

    def __init__(self, layer: Any) -> None:
        self.handle = layer.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.numbers = x[..., 0].round().long().tolist()
        sine = kwargs["position_embeddings"][1][..., 0]
        self.positions = (sine.expand(x.shape[0], -1) * 1e12).round().long().tolist()


# FlowCut


def flowcut_projections(layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    l = layer
    return (
        heads(4, 8, lambda i, b, h, c: 2.0 * sin(0.7 * l + 1.3 * h + 0.9 * c + 0.31 * i + 0.5 * b)),
        heads(4, 8, lambda i, b, h, c: 2.0 * sin(0.37 * (i + 1) * (c + 1) + 0.5 * h + 0.23 * l + 0.8 * b)),
        heads(4, 8, lambda i, b, h, c: (0.8 + 0.3 * sin(1.7 * i + 0.9 * b))
              * cos(0.29 * (i + 1) * (c + 2) + 0.7 * h + 0.19 * l + 0.6 * b)),
    )  # fmt: skip


def record(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Results of a method or function, in order of its calls."""
    original, results = getattr(owner, name), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, spy)
    return results


def events_of(model: nn.Module, sample: int) -> dict[int, list[int]]:
    """Kept tokens of a sample's only image after every stage of the tower, by the block that the stage came after."""
    return {s.layer - 1: s.kept[sample][0].tolist() for s in vtok.report(model).stages if s.layer is not None}


@cases("flowcut", "clip")
def test_flowcut_tower(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = tower(24, 32, 4, flowcut_projections)
    model = Stub(decoder(1, lambda _: (zeros_like(32),) * 3), vision, tile=48)
    scores = record(monkeypatch, FlowCut, "observe")
    labels = case["batch_labels"]
    vtok.compress(model, "flowcut", keep=case["target_patches"], compat=True)
    model(**prompt([60] * len(labels), [4] * len(labels), [48] * len(labels), labels),
          pixel_values=numbered(labels, 49, 32))  # fmt: skip
    close(scores[0], case["first_layer_score"])
    report = vtok.report(model)
    assert [sample[0].tolist() for sample in report.kept] == case["final_kept"]
    for row in range(len(labels)):
        events = events_of(model, row)
        assert set(events) == set(range(1, 22, 2))
        for layer, kept in events.items():
            golden = next((event["kept"][row] for event in case["events"] if event["layer"] == layer), None)
            assert kept == (case["final_kept"][row] if golden is None else golden)
    assert len(scores) == 1 + max(event["layer"] for event in case["events"])


@pytest.mark.parametrize("name", ["clip_b01_T24", "clip_b01_T12", "clip_b01_T6"])
def test_flowcut_schedules_each_picture_by_itself_unless_compat(name: str) -> None:
    """The released batch takes the longest schedule of its rows; by default each row gets what it gets alone."""
    batch = next(c for c in GOLDEN["flowcut"]["cases"] if c.get("name") == name)
    model = Stub(decoder(1, lambda _: (zeros_like(32),) * 3), tower(24, 32, 4, flowcut_projections), tile=48)
    vtok.compress(model, "flowcut", keep=batch["target_patches"])
    model(**prompt([60] * 2, [4] * 2, [48] * 2, [0, 1]), pixel_values=numbered([0, 1], 49, 32))
    different = 0
    for row in range(2):
        alone = next(c for c in GOLDEN["flowcut"]["cases"] if c.get("name") == name.replace("b01", f"b{row}"))
        events = events_of(model, row)
        assert events[21] == alone["final_kept"][0]
        for event, of_batch in zip(alone["events"], batch["events"], strict=True):
            assert events[event["layer"]] == event["kept"][0]
            different += event["kept"][0] != of_batch["kept"][row]
    assert different  # else the test could not tell


def test_flowcut_budgets_of_tiled_pictures() -> None:
    """LLaVA-NeXT "640", "320", "160": half of it for every tile, all of it after decoder layer 1."""
    from vtok.budget import Profile, solve

    method = FlowCut()
    shape = Shape(depth=32, tower_depth=23, has_cls=True, packed=False, tiled=True)
    cut = method.stages(shape)[-1]
    assert (cut.site, cut.layer) == ("decoder", 2)
    profile = Profile((cut.layer or 0,), (cut.share,))
    for total in (640, 320, 160):
        keep = FlowCut.presets[f"next-{total}"]["keep"]
        counts = solve(2880, keep, 32, profile, has_entry=True)
        assert (counts.entry, counts.cuts) == (5 * total // 2, (total,))


@dataclass(frozen=True)
class Late(Method):
    """FlowCut's decoder cut alone, to a given number of tokens."""

    site = "decoder"
    positions = "reindex"
    target: int = 0

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        return (Stage("decoder", 2, self.cut, reads=frozenset({"qkv", "attention"}), share=0.5),)

    def cut(self, view: DecoderView, count: int) -> Tensor:
        return FlowCut(compat=True).cut_decoder(view, min(self.target, view.size))


class Spy:
    """The kernels as a method's module sees them; remembers what was ranked."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(kernels, name)

    def topk(self, scores: Tensor, count: int) -> Tensor:
        self.scores.append(scores)
        return kernels.topk(scores, count)


def flowcut_language(kv_heads: int) -> Projections:
    return lambda layer: (
        heads(4, 8, lambda i, b, h, c: (0.8 + 0.7 * h) * sin(1.3 * h + 0.9 * c + 0.31 * i + 0.5 * b)),
        heads(kv_heads, 8, lambda i, b, h, c: 2.0 * sin(0.37 * (i + 1) * (c + 1) + 0.5 * h + 0.8 * b)),
        heads(kv_heads, 8, lambda i, b, h, c: (1.6 + 0.4 * sin(1.7 * i + 0.9 * b))
              * cos(0.29 * (i + 1) * (c + 2) + 0.7 * h + 0.6 * b)),
    )  # fmt: skip


@cases("flowcut", "llm")
def test_flowcut_decoder(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows from ``last_instruct_pos`` on are answers and padding in the authors' batches: no part of our prompt."""
    model = Stub(decoder(4, flowcut_language(case["kv_heads"]), case["kv_heads"]))
    spy = Spy()
    monkeypatch.setattr(sys.modules["vtok.methods.flowcut"], "kernels", spy)
    vtok.compress(model, Late(target=case["target"]), keep=0.75)
    seen = Seen(model.language_model.layers[2])
    model(**prompt(case["last_instruct_pos"], case["visual_start"], case["visual_len"], case["batch_labels"]))
    found = {len(scores[0]): scores[0] for scores in spy.scores}
    for row, sample in enumerate(case["samples"]):
        size = case["visual_len"][row]
        kept = vtok.report(model).kept[row][0].tolist()
        assert kept == (sample["kept_relative"] if sample["pruned"] else list(range(size)))
        if sample["pruned"]:
            close(found[size], sample["score"])
        numbers = [number for number in case["rows_after_prune"][row] if 0 <= number < case["last_instruct_pos"][row]]
        count = len(numbers)
        assert seen.numbers[row][-count:] == numbers
        assert seen.positions[row][-count:] == list(range(count))


@cases("flowcut", "qwen_vit")
def test_flowcut_mean_query(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower without class token. The authors cut patches (of which a Qwen merger then makes nonsense), vtok cuts
    cells: one patch a cell, as a SigLIP tower has it, gives theirs."""
    vision = tower(9, 32, 4, qwen_projections, cls=False)
    scores = record(monkeypatch, FlowCut, "observe")
    vtok.compress(vision, "flowcut", keep=case["vit_target_patches"], compat=True)
    vision(numbered([0], 64, 32))
    close(scores[0][0], case["first_block_score"])
    events = events_of(vision, 0)
    assert set(events) == {1, 3, 5, 7}
    for event in case["events"]:
        assert events[event["layer"]] == event["kept"]
    assert vtok.report(vision).kept[0][0].tolist() == case["final_kept"]


def qwen_projections(layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    l = layer
    return (
        heads(4, 8, lambda i, b, h, c: 1.5 * sin(0.7 * l + 1.3 * h + 0.9 * c)
              + 0.8 * sin(0.31 * (i + 1) * (c + 1) + 0.2 * h)),
        heads(4, 8, lambda i, b, h, c: 2.0 * sin(0.37 * (i + 1) * (c + 1) + 0.5 * h + 0.23 * l)),
        heads(4, 8, lambda i, b, h, c: (1.2 + 0.4 * sin(1.7 * i)) * cos(0.29 * (i + 1) * (c + 2) + 0.7 * h + 0.19 * l)),
    )  # fmt: skip


def test_flowcut_scores_cells_of_a_qwen_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real Qwen2-VL tower the released patch scores are averaged over each 2x2 cell."""
    case = next(case for case in GOLDEN["flowcut"]["cases"] if case["kind"] == "qwen_vit")
    model: Any = build("qwen2_vl", layers=4, vision_layers=4)
    visual = model.model.visual
    visual.patch_embed = Formula(lambda pixels: numbered([0], 64, 32)[0])
    visual.rotary_pos_emb = Turnless()
    for number, block in enumerate(visual.blocks):
        projections = qwen_projections(number)
        block.norm1 = block.norm2 = nn.Identity()
        block.attn.num_heads, block.attn.scaling = 4, 8**-0.5
        block.attn.qkv = Formula(lambda x, p=projections: torch.cat([part(x) for part in p], -1))
        block.attn.proj = block.mlp = zeros_like(32)
    scores = record(monkeypatch, FlowCut, "observe")
    vtok.compress(model, "flowcut", keep=0.3)
    batch = inputs("qwen2_vl", model, [[3, "image:56x56", 4]])
    model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    close(scores[0][0], torch.tensor(case["first_block_score"]).unflatten(0, (-1, 4)).mean(1))


class Turnless(nn.Module):
    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(len(x), 8), torch.zeros(len(x), 8)


@cases("flowcut", "prune_count")
def test_flowcut_prune_count(case: dict) -> None:
    n, index = case["n"], torch.arange(48.0)
    attention = {
        "count_uniform": torch.ones(n),
        "count_one_hot": torch.where(index == 0, 1.0, 1e-12),
        "count_ramp": (index + 1) ** 2,
        "count_geometric": 0.8**index,
    }[case["name"]].log()
    # a query of ones against keys of log p in one channel: the attention row is p
    view = TowerView(
        features=torch.zeros(1, n, 2), tokens=torch.arange(n)[None], layer=10, q=torch.ones(1, 1, n + 1, 1),
        k=torch.cat((torch.full((1,), -1e4), attention))[None, None, :, None], prefix=1, has_cls=True,
        carry=torch.rand(1, n), target=case["target_patches"],
    )  # fmt: skip
    kept = FlowCut(compat=True).cut(10 + case["rpl"], view, case["target_patches"])
    assert int(kept.sum()) == n - case["pruned"]


# TransPrune


class Attends(nn.Module):
    """What TransPrune sees of an attention module: its input, its output, and the next layer's q and k."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.scaling = layer, 8, 8**-0.5
        l = layer
        self.q_proj = heads(4, 8, lambda i, b, h, c: 1.5 * sin(0.7 * l + 1.3 * h + 0.9 * c + 0.31 * i))
        self.k_proj = heads(4, 8, lambda i, b, h, c: 1.5 * sin(0.37 * (i + 1) * (c + 1) + 0.5 * h + 0.23 * l))
        self.q_proj = on_normed(self.q_proj)
        self.k_proj = on_normed(self.k_proj)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return transition_pairs(self.layer, number_of(hidden_states))[1], None


CARRY = 1e-12  # a channel this small carries the number through norms and cosines unseen


def number_of(normed: Tensor) -> Tensor:
    return (normed[..., 12] / CARRY).round()


def on_normed(projection: nn.Module) -> Formula:
    """A projection of a layer norm's output."""
    return Formula(lambda x: projection(torch.stack((number_of(x), torch.zeros_like(number_of(x))), -1)))


def transition_pairs(layer: int, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input and output of attention and feed-forward, 12 channels each, for token numbers (B, N)."""
    i, l, c = numbers.double()[..., None], layer, torch.arange(12, dtype=torch.float64)
    pairs = (
        sin(0.41 * (i + 1) * (c + 1) + 0.3 * l),
        (0.6 + 0.3 * sin(1.9 * i + 0.4 * l)) * sin(0.41 * (i + 1) * (c + 1) + 0.3 * l + 1.5 * sin(0.7 * i + l)),
        cos(0.33 * (i + 2) * (c + 1) + 0.2 * l),
        (0.5 + 0.3 * cos(2.3 * i + 0.6 * l)) * cos(0.33 * (i + 2) * (c + 1) + 0.2 * l + 1.2 * cos(1.1 * i + 0.5 * l)),
    )
    return tuple(nn.functional.pad(part, (0, 4)).float() for part in pairs)  # type: ignore[return-value]


def transprune_decoder(rope: bool) -> Any:
    """The residual stream keeps numbers in channel 12, which no output writes."""
    model = decoder(32, lambda _: (zeros_like(32),) * 3, rope=rope)

    def normed(layer: int, part: int, x: Tensor) -> Tensor:
        out = transition_pairs(layer, x[..., 12])[part]
        out[..., 12] = x[..., 12] * CARRY
        return out

    for number, layer in enumerate(model.layers):
        layer.input_layernorm = Formula(partial(normed, number, 0))
        layer.post_attention_layernorm = Formula(partial(normed, number, 2))
        layer.self_attn = Attends(number)
        layer.mlp = Formula(lambda x, number=number: transition_pairs(number, number_of(x))[3])
    return model


@cases("transprune", "chain")
def test_transprune(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stub(transprune_decoder(case["rope"] != "none"))
    spy, parts = Spy(), record(monkeypatch, rows, "transition")
    monkeypatch.setattr(sys.modules["vtok.methods.transprune"], "kernels", spy)
    shares = record(monkeypatch, sys.modules["vtok.methods.transprune"], "_shares")
    vtok.compress(model, "transprune", preset="high", compat=True)
    assert TransPrune().ratios == tuple(case["ratios"])
    start, image = case["image_start"], case["image_len"]
    batch = prompt([case["seq_len"]], [start], [image], [0])
    batch["embeds"] = torch.roll(batch["embeds"], 12, -1)  # numbers in channel 12
    model(**batch)

    by_layer = [(parts[i] + parts[i + 1])[0] for i in range(0, len(parts), 2)]
    assert len(by_layer) == len(case["ttv_layers"])
    for found, golden in zip(by_layer, case["ttv_layers"], strict=True):
        close(found, golden["ttv"])
    stages = vtok.report(model).stages
    for number, (stage, golden) in enumerate(zip(stages, case["prunes"], strict=True)):
        assert stage.layer == golden["after_layer"] + 1
        assert (stage.kept[0][0] + start).tolist() == golden["kept_image_token_ids"]
        close(shares[2 * number][0], golden["ttv_normalised"])
        close(shares[2 * number + 1][0], golden["iga_normalised"])
        close(2 * spy.scores[number][0], golden["score"])  # ours is the mean of the two


def test_transprune_denominator() -> None:
    """Released: one softmax over all rows of the batch. Default: each sample by itself."""
    case = next(case for case in GOLDEN["transprune"]["cases"] if case["kind"] == "denominator")
    numbers = torch.arange(case["tokens"])[None] + 3 * torch.arange(2)[:, None]
    pairs = transition_pairs(case["layer"], numbers)
    for couple, name in ((True, "batched"), (False, "row_by_row")):
        close(rows.transition(pairs[0], pairs[1], None, couple), case[name])  # attention's half alone


def test_transprune_couples_the_batch_only_in_compat(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    for compat in (True, False):
        model = Stub(transprune_decoder(False))
        parts = record(monkeypatch, rows, "transition")
        batch = prompt([45, 45], [5, 5], [32, 32], [0, 0])
        batch["embeds"] = torch.roll(batch["embeds"], 12, -1)
        vtok.compress(model, "transprune", preset="high", compat=compat)
        model(**batch)
        seen[compat] = parts[0]
    close(2 * seen[True], seen[False])


def test_transprune_accumulates_the_layers_it_is_told() -> None:
    shape = Shape(depth=32, tower_depth=0, has_cls=False, packed=False, tiled=False)
    assert [stage.observed for stage in TransPrune().stages(shape)] == [(6,), (7, 8), (9, 10, 11)]
    stages = TransPrune(accumulate=(5, 6, 9)).stages(shape)
    assert [stage.observed for stage in stages] == [(5, 6), (), (9,)]


# DivPrune


def divprune_features(case: dict) -> Tensor:
    i, c = torch.arange(40, dtype=torch.float64)[:, None], torch.arange(12, dtype=torch.float64)
    x = (1.0 + 0.5 * sin(1.3 * i)) * (sin(0.61 * (i + 1) * (c + 1)) + 0.8 * cos(0.31 * (i + 2) * (c + 3)))
    x = nn.functional.pad(x.float(), (0, 4))
    for copy, original in (case["duplicate_of"] or {}).items():
        x[int(copy)] = x[original]
    return x


@cases("divprune")
@pytest.mark.parametrize("compat", [True, False])
def test_divprune(case: dict, compat: bool) -> None:
    model = Stub(decoder(1, lambda _: (zeros_like(32),) * 3))
    batch = prompt([50], [4], [40], [0])
    batch["embeds"][:, 4:44] = divprune_features(case)
    vtok.compress(model, "divprune", keep=case["ratio"], compat=compat)
    model(**batch)
    kept = vtok.report(model).kept[0][0].tolist()
    assert len(kept) == case["keep"]
    twins = {int(copy): original for copy, original in (case["duplicate_of"] or {}).items()}
    # of two identical tokens either may stand for both
    same = lambda tokens: sorted(twins.get(token, token) for token in tokens)  # noqa: E731
    assert same(kept) == same(case["kept"])
    order = kernels.farthest_first(divprune_features(case)[None], case["keep"], sort=False)[0].tolist()
    assert [twins.get(token, token) for token in order] == [twins.get(t, t) for t in case["selection_order"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_divprune_in_the_precision_of_the_model(dtype: torch.dtype) -> None:
    """Released distances are those of half-precision products; the default does not round them."""
    x = torch.randn(2, 400, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    view = View(features=x, tokens=torch.arange(400).expand(2, -1))
    ours = vtok.get("divprune", compat=True).select(view, 150)
    for row in range(2):
        unit = x[row] / x[row].norm(dim=1, keepdim=True)
        distance = (1 - unit @ unit.T).float().numpy()
        picks = [int(np.sort(distance, axis=0)[1].argmax())]
        while len(picks) < 150:
            picks.append(int(distance[picks].min(0).argmax()))
        assert ours[row].tolist() == sorted(picks)
    assert not torch.equal(ours, vtok.get("divprune").select(view, 150))


# FastV


def fastv_projections(layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """z = 2 sin(A_j + B_q) as a product of two channels each; q is divided by the scale of the attention."""

    def query(i: Tensor, b: Tensor, h: Tensor, c: Tensor) -> Tensor:
        angle = 0.17 * i + 0.7 * h + 0.9 * layer + 0.4 * b
        return 2.0 * 2**0.5 * torch.where(c == 0, cos(angle), sin(angle))

    def key(i: Tensor, b: Tensor, h: Tensor, c: Tensor) -> Tensor:
        angle = 0.53 * (i + 1) * (h + 1) + 0.0 * b
        return torch.where(c == 0, sin(angle), cos(angle))

    return heads(4, 2, query), heads(4, 2, key), zeros_like(8)


@cases("fastv")
def test_fastv(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stub(decoder(32, fastv_projections, head=2))
    scores = record(monkeypatch, sys.modules["vtok.methods.fastv"].FastV, "score")
    vtok.compress(model, "fastv", preset=f"K{case['K']}R{case['R'] * 100:g}", compat=True)
    seen = Seen(model.language_model.layers[case["K"]])
    labels = case["batch_labels"]
    layout = ([case[name]] * len(labels) for name in ("seq_len", "image_start", "image_len"))
    model(**prompt(*layout, labels))
    kept = [sample[0].tolist() for sample in vtok.report(model).kept]
    assert kept == [case["kept_image_relative"]] * len(labels)
    assert len(kept[0]) == case["keep_count"]
    if "score" in case:
        close(scores[0][0], case["score"], 2e-4)
        assert seen.numbers == case["kept_rows"]
        assert seen.positions == case["position_ids"] * len(labels)


# VisionZip


def visionzip_projections(layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    scramble = 0.0 if layer == 22 else 1.0  # only the feature layer may count
    number = lambda x: x[..., 10:]  # noqa: E731  (the first ten channels are the golden features)
    query = heads(4, 8, lambda i, b, h, c: 2.0 * sin(1.3 * h + 0.9 * c + 0.31 * i + 0.5 * b + scramble))
    key = heads(4, 8, lambda i, b, h, c: 1.5 * sin(0.61 * (i + 1) * (c + 1) + 0.5 * h + 0.8 * b + scramble)
                + 0.5 * cos(0.2 * (i + 2) * (c + 2) + 0.3 * h))  # fmt: skip
    return Formula(lambda x: query(number(x))), Formula(lambda x: key(number(x))), zeros_like(32)


@cases("visionzip")
def test_visionzip(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    dominant, contextual = case["dominant_incl_cls"], case["contextual"]
    labels = [tile["tile_label"] for tile in case["tiles"]]
    pixels = nn.functional.pad(numbered(labels, 49, 22), (10, 0))
    i, c = torch.arange(49, dtype=torch.float64)[:, None], torch.arange(10, dtype=torch.float64)
    for row, label in enumerate(labels):
        pixels[row, :, :10] = (cos(0.23 * (i + 1) * (c + 1) + 0.6 * label) + 0.1 * c).float()
    model = Stub(decoder(1, lambda _: (zeros_like(32),) * 3), tower(24, 32, 4, visionzip_projections), tile=48)
    saliency = record(monkeypatch, VisionZip, "dominance")
    keep = dominant + contextual
    vtok.compress(model, "visionzip", keep=keep, contextual=contextual / keep, compat=True)
    model(**prompt([60] * len(labels), [4] * len(labels), [48] * len(labels), labels), pixel_values=pixels)
    report = vtok.report(model)
    if keep > 48:  # nothing is dropped: the patches are the released output less the class token, which has no place
        for row, tile in enumerate(case["tiles"]):
            rows_of = [*tile["dominant_raster"], *tile["contextual_targets"]]
            order = sorted(range(1, keep), key=rows_of.__getitem__)
            expected = torch.tensor(tile["output"])[order]
            torch.testing.assert_close(model.features[row, :, :10], expected, atol=2e-6, rtol=0)
        return
    for row, tile in enumerate(case["tiles"]):
        close(4 * saliency[0][row], tile["cls_attention_head_sum"])
        # class token, dominant tokens, contextual tokens, in this order at the first placeholders
        torch.testing.assert_close(model.features[row, :keep, :10], torch.tensor(tile["output"]), atol=2e-6, rtol=0)
        assert torch.equal(model.features[row, keep:], torch.zeros(48 - keep, 32))
        assert torch.equal(model.features[row, :dominant, 10], torch.tensor(tile["dominant_raster"]).float())
        patches = [token - 1 for token in tile["dominant_raster"][1:]]
        targets = [token - 1 for token in tile["contextual_targets"]]
        assert set(report.kept[row][0].tolist()) >= {*patches, *targets}
        members: dict[int, list[int]] = {target: [target] for target in targets}
        for token, slot in zip(tile["merged_token_ids"], tile["merged_into_slot"], strict=True):
            members[targets[slot]].append(token - 1)
        groups = [sorted(group) for group in report.groups[row][0] or []]
        assert all(sorted(group) in groups for group in members.values())


# ToMe and MCTF: groups. Ours are in spatial order, theirs in order of score.

B, N, D, H = 2, 13, 6, 2


def axis(size: int, *shape: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64).reshape(shape)


def fusion_x() -> Tensor:
    b, n, d = axis(B, B, 1, 1), axis(N, 1, N, 1), axis(D, 1, 1, D)
    return (sin(1 + 0.7 * b + 0.37 * n * (1 + 0.13 * d) + 0.9 * d) + 0.25 * cos(0.11 * n * (n + 1) + b)).float()


def fusion_attention() -> Tensor:
    b, h, q, k = axis(B, B, 1, 1, 1), axis(H, 1, H, 1, 1), axis(N, 1, 1, N, 1), axis(N, 1, 1, 1, N)
    return (sin(0.31 * q + 1.7 * k + h) + 0.5 * cos(0.23 * k * k + b)).softmax(-1)


def order_of(groups: list[list[int]], golden: list[list[int]]) -> list[int]:
    """Our slots in the authors' order."""
    assert sorted(map(sorted, groups)) == sorted(map(sorted, golden))
    return [[sorted(group) for group in groups].index(sorted(group)) for group in golden]


def fusion(name: str, fits: Callable[[dict], bool] = lambda case: True) -> Any:
    found = [case for case in GOLDEN["golden_fusion"][name] if fits(case)]
    return pytest.mark.parametrize("case", found, ids=lambda c: "-".join(str(v) for k, v in c.items() if k in FACTS))


FACTS = ("r", "cls", "dist", "bidirection", "num_protected", "pooling_type")


def fusion_view(x: Tensor, prefix: int, received: Tensor | None = None, sizes: Tensor | None = None) -> TowerView:
    """As the engine builds it for a merge: with the prefix tokens in features, k and received, not in tokens."""
    tokens = torch.arange(x.shape[1] - prefix).expand(x.shape[0], -1)
    own = None if sizes is None else sizes[:, prefix:]
    return TowerView(features=x, tokens=tokens, k=x[:, None], prefix=prefix, received=received, sizes=own)


@fusion("tome")
def test_tome_groups(case: dict) -> None:
    x, prefix = fusion_x(), case["cls"] + case["dist"]
    plan = ToMe(compat=True).match(fusion_view(x, prefix), case["r"])
    orders = torch.tensor([order_of(ours, theirs) for ours, theirs in zip(plan.groups(), case["groups"], strict=True)])
    merged = kernels.gather_tokens(plan.merge(x), orders)
    sizes = kernels.gather_tokens(plan.counts(), orders)
    close(merged[0, :, 0], case["x0"], 2e-5)
    # the second round starts from their order: alternation depends on it
    second = ToMe(compat=True).match(fusion_view(merged, prefix), 2)
    members = []
    for row, groups in enumerate(second.groups()):
        first = case["groups"][row]
        members.append([[token for slot in group for token in first[slot]] for group in groups])
    finals = torch.tensor([order_of(a, b) for a, b in zip(members, case["groups_after_r2"], strict=True)])
    assert kernels.gather_tokens(second.sum(sizes), finals).tolist() == case["size2"]
    assert second.merge(merged, sizes.float()).sum().item() == pytest.approx(case["x2_sum"], abs=1e-4)


@fusion("tome", lambda case: not case["dist"] and case["r"] < 6)
def test_tome_in_a_tower(case: dict) -> None:
    """The same through the engine: one merge inside a CLIP or SigLIP block whose keys are the recipe. (CLIP has no
    distillation token, and a budget never asks for more than half.)"""
    x, prefix = fusion_x(), case["cls"]
    vision = tower(2, D, 1, unchanged, cls=bool(prefix))
    vtok.compress(vision, "tome", keep=N - prefix - case["r"], layers=(0,), compat=True)
    out = vision(x, output_hidden_states=True).hidden_states[1]
    report = vtok.report(vision)
    for row in range(B):
        groups = [[token + prefix for token in group] for group in report.groups[row][0] or []]
        order = order_of([[i] for i in range(prefix)] + groups, case["groups"][row])
        if row == 0:
            close(out[0, order, 0], case["x0"], 2e-5)


@fusion("mctf")
def test_mctf_groups(case: dict) -> None:
    x, attention, prefix = fusion_x(), fusion_attention(), case["num_protected"]
    sizes = torch.tensor(case["sizes_in"]).expand(B, N).float()
    view = fusion_view(x, prefix, attention.mean((1, 2)).float(), sizes)
    method = MCTF(two_way=bool(case["bidirection"]), compat=True)
    plan = method.match(view, case["r"])
    orders = torch.tensor([order_of(ours, theirs) for ours, theirs in zip(plan.groups(), case["groups"], strict=True)])
    weights = method.weights(view)
    pooled = weights if case["pooling_type"] == 1 else sizes  # released runs all pool by attention and size
    close(kernels.gather_tokens(plan.merge(x, pooled), orders)[0, :, 0], case["x0"], 5e-5)
    assert kernels.gather_tokens(plan.sum(sizes), orders).tolist() == case["size_out"]
    fused = kernels.merge_attention(plan, attention.float(), weights)
    close(fused.sum(-1), torch.full_like(fused[..., 0], case["attn_rowsum"]))
    close(fused[0, 0, orders[0, 0], orders[0]], case["attn00"], 5e-5)


@pytest.mark.parametrize(
    ("method", "options", "lengths"),
    [
        ("tome", {"keep": 40, "compat": True}, list(range(184, 40, -13))),
        ("mctf", {"keep": 20, "compat": True}, [197, *range(181, 20, -16)]),
        ("mctf", {"keep": 55, "layers": (3, 6, 9)}, [197] * 3 + [129] * 3 + [85] * 3 + [56] * 3),
    ],
    ids=["tome r=13", "mctf r=16", "mctf fast"],
)
def test_published_schedules(method: str, options: dict, lengths: list[int]) -> None:
    """197 tokens through 12 blocks, as the papers' tables count them."""
    model = timm.create_model("vit_tiny_patch16_224", depth=12, embed_dim=16, num_heads=2, num_classes=2).eval()
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    vtok.compress(model, method, **options)
    model(torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    assert seen == lengths
