"""The vision graph gives the tokens of the hooked model: as a module, as a torch.export program, in ONNX Runtime."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vtok
from vtok.api import adapter_of, session_of
from vtok.errors import VtokError
from vtok.export.vision import VisionGraph, vision_graph
from vtok.method import Method
from vtok.resampler import OrderedResampler, ResamplerConfig, files
from vtok.resampler.starts import TRAINED

from ...models import IMAGE, build, inputs

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen2_vl")
METHODS = ("divprune", "todre", "flowcut", "visionzip", "tome", "mctf", "uniform", "random", "downsample", "flextok")
EARLY: dict[str, dict[str, Any]] = {"todre": {"decision": None}, "flowcut": {"llm_layer": None}}
"""What leaves stages inside the decoder out."""


@cache
def model_of(family: str, vision_layers: int = 6) -> Any:
    return build(family, layers=4, vision_layers=vision_layers)


def pictures(family: str, model: Any, count: int, segment: str = "image") -> Any:
    return inputs(family, model, [[5, f"{segment}#{i + 1}", 7] for i in range(count)])


def pixels(family: str, batch: Any, count: int) -> Tensor:
    return batch["pixel_values"].unflatten(0, (count, -1)) if "qwen" in family else batch["pixel_values"]


def hooked(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Features and kept indices of each sample's picture, as the language model of the hooked model is given them."""
    seen: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["inputs_embeds"])

    handle = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    kept = torch.stack([row[0] for row in vtok.report(model).kept])
    start = int((batch["input_ids"][0] == IMAGE).nonzero()[0])
    return seen[0][:, start : start + kept.shape[1]], kept


def same(graph: VisionGraph, family: str, model: Any, segment: str = "image") -> None:
    for count in (3, 1):
        batch = pictures(family, model, count, segment)
        features, kept = hooked(model, batch)
        own, index = graph(pixels(family, batch, count))
        assert torch.equal(index, kept) and index.shape[1] == graph.plan.kept
        assert torch.allclose(own, features, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_tokens_of_the_hooked_model(method: str, family: str) -> None:
    model = model_of(family)
    with vtok.compressed(model, method, keep=0.3, **EARLY.get(method, {})):
        graph = vision_graph(model, pictures(family, model, 1))
        same(graph, family, model)
        assert graph.plan.method == method and graph.plan.pixel_shape == tuple(
            pixels(family, pictures(family, model, 1), 1).shape[1:]
        )


SETTINGS: list[tuple[str, Any, dict[str, Any]]] = [
    ("llava", ["visionzip", "divprune"], {"keep": 12}),
    ("llava", ["tome", "uniform"], {"keep": 12}),
    ("llava", "divprune", {"keep": 1.0}),
    ("llava", "visionzip", {"keep": 64}),
    ("llava", "mctf", {"keep": 20, "reuse_attention": False, "two_way": False}),
    ("llava", "mctf", {"keep": 40, "compat": True}),
    ("llava", "flowcut", {"keep": 9, "every": 1, "semantic": False}),
    ("llava", "tome", {"keep": 40, "prop_attn": False}),
    ("llava", "todre", {"keep": 9, "pivot": "random", "objective": "min", "decision": None}),
    ("llava_next", "todre", {"keep": 20, "pivot": "center", "decision": None}),
    ("llava_next", "tome", {"keep": 33}),
    ("llava_next", [vtok.get("flowcut", llm_layer=None), "divprune"], {"keep": 40}),
    ("qwen2_5_vl", "flowcut", {"keep": 3, "llm_layer": None}),
    ("qwen2_5_vl", ["tome", "random"], {"keep": 3}),
    ("llava", "flextok", {"keep": 12, "scheme": "farthest"}),
    ("llava_next", "flextok", {"keep": 30, "scheme": "farthest"}),
    ("qwen2_5_vl", "flextok", {"keep": 3, "scheme": "farthest"}),
]


@pytest.mark.parametrize(("family", "method", "options"), SETTINGS)
def test_options_and_chains(family: str, method: Any, options: dict[str, Any]) -> None:
    model = model_of(family)
    with vtok.compressed(model, method, **options):
        same(vision_graph(model, pictures(family, model, 1)), family, model)


@pytest.mark.parametrize("scheme", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_resampler(family: str, scheme: str) -> None:
    model = model_of(family)
    door = files.door(adapter_of(model))
    config = ResamplerConfig(dim=door.dim, width=32, head_dim=16, blocks=2, tokens=64, scheme=scheme)
    torch.manual_seed(0)
    resampler = OrderedResampler(config)
    torch.nn.init.normal_(resampler.leave.weight, std=0.2)
    if scheme == "salient":
        torch.nn.init.normal_(resampler.saliency.out.weight)
    with vtok.compressed(model, "flextok", keep=0.3, weights=resampler.eval().requires_grad_(False)):
        same(vision_graph(model, pictures(family, model, 1)), family, model)


@pytest.mark.parametrize(
    ("family", "segment"),
    [("llava_next", "image:56x112"), ("llava_next", "image:100x40"), ("qwen2_5_vl", "image:98x70")],
)
@pytest.mark.parametrize("method", ["flowcut", "visionzip", "tome", "mctf", "flextok"])
def test_other_layouts(method: str, family: str, segment: str) -> None:
    """Pictures that are unpadded otherwise, and windows of three lengths."""
    model = model_of(family)
    with vtok.compressed(model, method, keep=0.4, **EARLY.get(method, {})):
        same(vision_graph(model, pictures(family, model, 1, segment)), family, model, segment)


@pytest.mark.parametrize("method", ["flowcut", "visionzip", "todre", "mctf"])
def test_a_tower_without_class_token(method: str) -> None:
    small = build("llava", layers=2).config
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "patch_size": 7}
    vision |= {"num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 56, "vision_use_head": False}
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=small.text_config.to_dict(), vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_token_index=IMAGE, image_seq_length=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    vtok.compress(model, method, keep=0.3, **EARLY.get(method, {}))
    same(vision_graph(model, pictures("llava", model, 1)), "llava", model)


def test_the_decoder_stage_is_left_out_on_request() -> None:
    model = model_of("llava_next")
    example = pictures("llava_next", model, 1)
    with vtok.compressed(model, "flowcut", keep=0.3):
        graph = vision_graph(model, example, fixed=True)
    assert graph.plan.kept == round(0.3 * graph.plan.tokens_in) and "before the decoder" in graph.plan.left_out[0]
    with vtok.compressed(model, "flowcut", keep=0.3, llm_layer=None):
        same(graph, "llava_next", model)


def test_tiles_of_which_tokens_are_picked_are_refused() -> None:
    model = model_of("llava_next")
    with vtok.compressed(model, "flextok", keep=0.1, weights=picking("llava_next", model)):
        graph = vision_graph(model, pictures("llava_next", model, 1))
    given = pixels("llava_next", pictures("llava_next", model, 2), 2)
    with pytest.raises(VtokError, match="whose padding a graph cannot see; take averages"):
        torch.export.export(graph, (given,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)


class Ragged(Method):
    """Keeps what is above the mean: another number every time."""

    name = "ragged"

    def select(self, view: Any, count: int) -> Tensor:
        norms = view.features.norm(dim=-1)
        return norms > norms.mean(1, keepdim=True)


def test_refusals_of_the_tower() -> None:
    model = model_of("llava")
    example = pictures("llava", model, 1)
    for method, options, reason in (
        (Ragged(), {"keep": 0.3}, "another number of tokens of every picture"),
        ("visionzip", {"keep": 0.3, "compat": True}, "leave compat= and auto= out"),
        ("tome", {"keep": 2, "layers": (1, 2)}, "ask for at least 16"),
    ):
        with vtok.compressed(model, method, **options), pytest.raises(VtokError, match=reason):
            vision_graph(model, example)
    tiled = model_of("llava_next")
    with vtok.compressed(tiled, "mctf", keep=0.3, compat=True), pytest.raises(VtokError, match="leave compat out"):
        vision_graph(tiled, pictures("llava_next", tiled, 1))


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("llava")
    keys = list(model.state_dict())
    vtok.compress(model, "todre", keep=0.3, decision=None)
    example = pictures("llava", model, 1)
    graph = vision_graph(model, example)
    assert not session_of(model).tower.taps
    vtok.restore(model)
    assert list(model.state_dict()) == keys and not model.model.vision_tower.encoder.layers[0]._forward_pre_hooks
    assert graph(example["pixel_values"])[0].shape == (1, 19, 64)


def picking(family: str, model: Any) -> OrderedResampler:
    """A trained resampler that starts at tokens of the picture."""
    torch.manual_seed(0)
    door = files.door(adapter_of(model))
    config = ResamplerConfig(dim=door.dim, width=32, head_dim=16, blocks=1, tokens=64, scheme="farthest")
    resampler = OrderedResampler(config)
    torch.nn.init.normal_(resampler.leave.weight, std=0.2)
    return resampler.eval().requires_grad_(False)


EXPORTED = [("llava", method) for method in (*METHODS, "picking")]
EXPORTED += [("llava_next", method) for method in ("flowcut", "visionzip", "mctf")]
EXPORTED += [("qwen2_5_vl", method) for method in ("divprune", "flowcut", "visionzip", "mctf", "picking")]
"""An export costs ten seconds of a CPU and more: every method once, and what each family does by itself."""


@pytest.mark.parametrize(("family", "method"), EXPORTED)
def test_programs_and_onnx_runtime(family: str, method: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = model_of(family, 6 if method == "flowcut" else 4)
    example = pictures(family, model, 3)
    given = pixels(family, example, 3)
    name, options = method, EARLY.get(method, {})
    if method == "picking":
        name, options = "flextok", {"weights": picking(family, model)}
    with vtok.compressed(model, name, keep=0.3 if method in ("tome", "mctf") else 0.1, **options):
        graph = vision_graph(model, pictures(family, model, 1))
    features, kept = graph(given)
    open_batch = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(graph, (given[:2],), dynamic_shapes=open_batch, strict=False)
    exported = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    assert exported is not None
    exported.save(tmp_path / "vision.onnx")
    session = runtime.InferenceSession(tmp_path / "vision.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for count in (1, 3):
        for own, index in (
            program.module()(given[:count]),
            map(torch.from_numpy, session.run(None, {name: given[:count].numpy()})),
        ):
            assert torch.equal(index, kept[:count])
            assert torch.allclose(own, features[:count], atol=1e-4)
