"""Vision transformers without a language model: transformers, timm and open_clip, encoder methods only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import vtok
from vtok.api import adapter_of, session_of

from .conftest import anatomy

DEPTH, SIDE = 8, 8
HF: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "image_size": 56, "patch_size": 7,
}  # fmt: skip
TIMM: dict[str, Any] = {
    "img_size": 56,
    "patch_size": 7,
    "depth": DEPTH,
    "embed_dim": 32,
    "num_heads": 4,
    "num_classes": 5,
}


def dinov2() -> nn.Module:
    settings = {name: value for name, value in HF.items() if name != "intermediate_size"}
    return Dinov2Model(Dinov2Config(**settings, layerscale_value=0.7))


def openclip() -> nn.Module:
    vision = open_clip.CLIPVisionCfg(layers=DEPTH, width=32, head_width=8, patch_size=7, image_size=56)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=32, width=16, heads=2, layers=1)
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


MODELS: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**HF)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**HF)),
    "dinov2": dinov2,
    "timm_cls": lambda: timm.create_model("vit_tiny_patch16_224", **TIMM, init_values=0.7, drop_path_rate=0.2),
    "timm_registers": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **TIMM),
    "timm_average": lambda: timm.create_model("vit_base_patch16_gap_224", **TIMM),
    "open_clip": openclip,
}
PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "timm_cls": 1, "timm_registers": 5, "timm_average": 0, "open_clip": 1}
METHODS = ("flowcut", "tome", "mctf")
pairs = pytest.mark.parametrize(("name", "method"), [(name, method) for name in MODELS for method in METHODS])


def make(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:  # attention far from uniform
                weight.normal_(0, (2.0 if any(part in key for part in ("q_proj", "k_proj", "qkv", "in_proj")) else 1.0)
                               * weight[0].numel() ** -0.5)  # fmt: skip
    return model


def pictures(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    smooth = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(smooth, (56, 56), mode="bilinear") + 0.3 * torch.randn(
        count, 3, 56, 56, generator=generator
    )


def forward(name: str, model: Any, x: Tensor) -> Tensor:
    """What people use of the model: pooled features or class scores."""
    if name == "open_clip":
        return model.encode_image(x)
    out = model(x)
    return out if isinstance(out, Tensor) else out.pooler_output


def block_lengths(model: Any, run: Callable[[], Any]) -> list[int]:
    lengths: list[int] = []
    handles = [
        layer.register_forward_hook(
            lambda m, a, out: lengths.append((out[0] if isinstance(out, tuple) else out).shape[1])
        )
        for layer in adapter_of(model).tower.layers
    ]
    run()
    for handle in handles:
        handle.remove()
    return lengths


@pairs
def test_keep_all_is_bit_equal_and_restore_leaves_nothing(name: str, method: str) -> None:
    model, x = make(name), pictures()
    plain = forward(name, model, x)
    before = anatomy(model)
    vtok.compress(model, method, keep=1.0)
    assert torch.equal(forward(name, model, x), plain)
    with vtok.budget(model, 0.25):
        assert not torch.equal(forward(name, model, x), plain)
    vtok.restore(model)
    assert anatomy(model) == before
    assert torch.equal(forward(name, model, x), plain)


@pairs
def test_counts(name: str, method: str) -> None:
    model, x = make(name), pictures(3)
    plain = block_lengths(model, lambda: forward(name, model, x))
    assert plain == [SIDE**2 + PREFIX[name]] * DEPTH
    vtok.compress(model, method, keep=20)
    lengths = block_lengths(model, lambda: forward(name, model, x))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 20 + PREFIX[name]
    report = vtok.report(model)
    assert [len(sample[0]) for sample in report.kept] == [20] * 3
    assert report.tokens_in == SIDE**2
    assert report.average_tokens == 20
    if method == "flowcut":
        assert report.groups == [[None]] * 3
        return
    for (tokens,), (groups,) in zip(report.kept, report.groups, strict=True):
        assert sorted(token for group in groups for token in group) == list(range(SIDE**2))
        assert all(token in group for token, group in zip(tokens.tolist(), groups, strict=True))


@pairs
def test_each_picture_is_what_it_is_alone(name: str, method: str) -> None:
    model, x = make(name), pictures(4)
    vtok.compress(model, method, keep=0.3)
    tower, ragged = session_of(model).tower, []
    mask = tower._key_mask
    tower._key_mask = lambda state, x: (ragged.append(state.ragged), mask(state, x))[1]
    together = forward(name, model, x)
    assert any(ragged) == (method == "flowcut")  # its schedule follows each picture: the batch is padded on the way
    kept = vtok.report(model).kept
    for i in range(4):
        torch.testing.assert_close(forward(name, model, x[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)
        assert torch.equal(vtok.report(model).kept[0][0], kept[i][0])


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_spoken_to_as_they_are(name: str) -> None:
    """The parts that merging calls add up to the block; a key bias of log 2 is the token standing twice."""
    model = make(name)
    spec = adapter_of(model).tower
    block, blocks = spec.layers[3], spec.blocks
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    whole = block(x, None) if name in ("clip", "siglip") else block(x)
    whole = whole[0] if isinstance(whole, tuple) else whole
    attended = x + blocks.attend(block, x, None, {})
    torch.testing.assert_close(attended + blocks.feed(block, attended), whole)
    q, k, v = blocks.project(block, x)
    heads = (q @ k.transpose(-1, -2) * blocks.scale(block)).softmax(-1) @ v
    torch.testing.assert_close(x + blocks.output(block, heads), attended)
    bias = torch.zeros(2, 1, 1, 9)
    bias[..., 4] = 2.0**0.5
    bias[..., 6] = torch.tensor(2.0).log()
    bias[..., 7] = -torch.inf
    twice = (q @ k.transpose(-1, -2) * blocks.scale(block) + bias).softmax(-1) @ v
    torch.testing.assert_close(blocks.attend(block, x, bias, {}), blocks.output(block, twice))
    bias[..., 4] = 0
    double = torch.cat((x[:, [0, 1, 2, 3, 4, 5, 6, 8]], x[:, 6:7]), 1)
    expected = blocks.attend(block, double, None, {})[:, :8]
    torch.testing.assert_close(blocks.attend(block, x, bias, {})[:, [0, 1, 2, 3, 4, 5, 6, 8]], expected)
    args, kwargs = blocks.with_mask(x, bias, (x, None) if name in ("clip", "siglip") else (x,), {})
    masked = block(*args, **kwargs)
    masked = masked[0] if isinstance(masked, tuple) else masked
    attended = x + blocks.attend(block, x, bias, {})
    torch.testing.assert_close(masked, attended + blocks.feed(block, attended))


@pytest.mark.parametrize("name", MODELS)
def test_pruned_equals_masked(name: str) -> None:
    """Survivors of the last block equal those of the plain model that may not look at what was dropped."""
    model, x = make(name), pictures(3)
    layers, prefix = adapter_of(model).tower.layers, PREFIX[name]
    out: list[Tensor] = []

    def last(module: nn.Module, args: tuple, output: Any) -> None:
        out.append(output[0] if isinstance(output, tuple) else output)

    handle = layers[-1].register_forward_hook(last)
    vtok.compress(model, "flowcut", keep=0.3)
    forward(name, model, x)
    report, spec = vtok.report(model), session_of(model).tower.spec
    vtok.restore(model)

    def before(number: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        stage = [stage for stage in report.stages if stage.layer is not None and stage.layer <= number]
        if not stage:
            return None
        bias = torch.full((3, 1, 1, SIDE**2 + prefix), -torch.inf)
        bias[..., :prefix] = 0
        for row, (kept,) in enumerate(stage[-1].kept):
            bias[row, ..., kept + prefix] = 0
        return spec.blocks.with_mask(args[0], bias, args, kwargs)

    handles = [layer.register_forward_pre_hook(partial(before, i), with_kwargs=True) for i, layer in enumerate(layers)]
    forward(name, model, x)
    for found in (handle, *handles):
        found.remove()
    for row, (kept,) in enumerate(report.kept):
        own = torch.cat((torch.arange(prefix), kept + prefix))
        torch.testing.assert_close(out[0][row], out[1][row, own], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in MODELS if PREFIX[name]])
def test_prefix_tokens_stay_themselves(name: str, method: str) -> None:
    """Class token and registers come first in every block and are never dropped, moved or merged."""
    model, x = make(name), pictures()
    layers = adapter_of(model).tower.layers
    prefix = PREFIX[name]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    plain: list[Tensor] = []

    def before(store: list[Tensor]) -> Callable[..., None]:
        return lambda module, args: store.append(args[0])

    handles = [layer.register_forward_pre_hook(before(plain)) for layer in layers]
    forward(name, model, x)
    for handle in handles:
        handle.remove()
    vtok.compress(model, method, keep=0.3)
    handles = [layer.register_forward_pre_hook(before(inputs)) for layer in layers]
    handles += [layer.register_forward_hook(lambda m, a, out: outputs.append(out)) for layer in layers]
    forward(name, model, x)
    for handle in handles:
        handle.remove()
    assert torch.equal(inputs[0], plain[0])
    for number in range(1, DEPTH):
        assert torch.equal(inputs[number][:, :prefix], outputs[number - 1][:, :prefix])
    first = session_of(model).tower.first or 0
    for number in range(1, first + 1):
        torch.testing.assert_close(inputs[number][:, :prefix], plain[number][:, :prefix])
    groups = vtok.report(model).groups[0][0]
    assert groups is None or min(token for group in groups for token in group) == 0


@pairs
@pytest.mark.grad
def test_gradients_reach_the_pixels(name: str, method: str) -> None:
    model = make(name).train() if name == "clip" else make(name)
    x = pictures(1).requires_grad_()
    vtok.compress(model, method, keep=16)
    forward(name, model, x).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    by_patch = x.grad.unfold(2, 7, 7).unfold(3, 7, 7).abs().amax((0, 1, 4, 5)).flatten()
    assert (by_patch > 0).all()  # every patch is seen by the first blocks, or is part of a merged token
    touched = [
        key for key, weight in model.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0
    ]
    assert any("mlp" in key for key in touched)


@pytest.mark.parametrize("method", ["tome", "mctf"])
@pytest.mark.grad
def test_merged_gradients_are_those_of_finite_differences(method: str) -> None:
    """The scores are constants; everything else is differentiated."""
    model = make("timm_cls").double()
    x = pictures(1).double().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    vtok.compress(model, method, keep=24)
    value = forward("timm_cls", model, x).sum()
    (gradient,) = torch.autograd.grad(value, x)
    step = 1e-5
    with torch.no_grad():
        change = (
            forward("timm_cls", model, x + step * direction).sum()
            - forward("timm_cls", model, x - step * direction).sum()
        ) / (2 * step)
    expected = (gradient * direction).sum().item()
    if method == "tome":
        assert change.item() == pytest.approx(expected, rel=1e-3)
    else:  # the pooling weights move with the picture and carry no gradient, as released
        assert change.item() == pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_average_pooling_is_over_survivors(method: str) -> None:
    name = "timm_average"
    model, x = make(name), pictures()
    vtok.compress(model, method, keep=10)
    seen: list[Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    out = forward(name, model, x)
    handle.remove()
    torch.testing.assert_close(out, model.head(model.fc_norm(model.norm(seen[0]).mean(1))))


@pytest.mark.parametrize("method", ["divprune", "fastv", "transprune", "todre", "random", "downsample", "visionzip"])
@pytest.mark.parametrize("name", ["clip", "timm_cls", "open_clip"])
def test_methods_of_language_models_are_refused(name: str, method: str) -> None:
    model = make(name)
    before = anatomy(model)
    with pytest.raises(vtok.VtokError, match=f"{method} cannot serve .*vit: .*; methods that can: .*tome"):
        vtok.compress(model, method, keep=0.5)
    assert anatomy(model) == before


def test_methods_that_can_are_listed() -> None:
    for family in ("hf_vit", "timm_vit", "open_clip_vit"):
        assert set(METHODS) <= set(vtok.methods(family))
        for method in vtok.methods(family):
            model = make({"hf_vit": "clip", "timm_vit": "timm_cls", "open_clip_vit": "open_clip"}[family])
            vtok.compress(model, method, keep=0.5)  # what is listed works


def unknown(kind: str) -> Any:
    if kind.endswith("ScalingBlock") or kind == "ResPostBlock":
        return timm.create_model("vit_tiny_patch16_224", **TIMM, block_fn=getattr(timm.models.vision_transformer, kind))
    if kind == "CustomResidualAttentionBlock":
        vision = open_clip.CLIPVisionCfg(
            layers=2, width=32, head_width=8, patch_size=7, image_size=56, block_type="custom", qk_norm=True
        )
        text = open_clip.CLIPTextCfg(context_length=8, vocab_size=32, width=16, heads=2, layers=1)
        return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    if kind == "SwinTransformer":
        return timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1, 1, 1))
    model = make("siglip")
    other = type("Other", (type(model.encoder.layers[0]),), {})
    model.encoder.layers = nn.ModuleList(other(model.config) for _ in range(2))
    return model


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("ParallelScalingBlock", "built from ParallelScalingBlock, and vtok knows timm's plain pre-norm Block"),
        ("ResPostBlock", "built from ResPostBlock"),
        ("CustomResidualAttentionBlock", "uses custom or sequence-first blocks"),
        ("SwinTransformer", "SwinTransformer belongs to no family vtok knows"),
        ("Other", "known blocks: CLIPEncoderLayer, SiglipEncoderLayer, Dinov2Layer"),
    ],
)
def test_unknown_blocks_are_refused(kind: str, reason: str) -> None:
    model = unknown(kind)
    before = anatomy(model)
    with pytest.raises(vtok.VtokError, match=reason):
        vtok.compress(model, "tome", keep=0.5)
    assert anatomy(model) == before


def test_too_few_merging_blocks_say_so() -> None:
    model = make("timm_cls")
    vtok.compress(model, "tome", keep=4, layers=(3,))
    with pytest.raises(vtok.VtokError, match="at least 32"):
        forward("timm_cls", model, pictures())


@pytest.mark.parametrize("method", METHODS)
def test_dropout_and_stochastic_depth_in_training(method: str) -> None:
    model = make("timm_cls").train()
    vtok.compress(model, method, keep=0.4)
    torch.manual_seed(0)
    a = forward("timm_cls", model, pictures())
    b = forward("timm_cls", model, pictures())
    assert not torch.equal(a, b)  # stochastic depth is on
    assert torch.isfinite(a).all()


@pytest.mark.parametrize("name", ["timm_cls", "open_clip"])
@pytest.mark.grad
def test_recomputed_blocks_are_refused(name: str) -> None:
    model = make(name).train()
    model.set_grad_checkpointing(True)
    vtok.compress(model, "tome", keep=0.5)
    with pytest.raises(vtok.VtokError, match=r"recomputes its blocks in the backward pass.*set_grad_checkpointing"):
        forward(name, model, pictures())
    vtok.compress(model.eval(), "flowcut", keep=0.5)
    with torch.no_grad():
        recomputing = forward(name, model, pictures())
        model.set_grad_checkpointing(False)
        torch.testing.assert_close(recomputing, forward(name, model, pictures()))


@pytest.mark.parametrize("method", METHODS)
def test_features_without_the_forward(method: str) -> None:
    """timm users call forward_features and forward_intermediates."""
    model, x = make("timm_cls"), pictures()
    vtok.compress(model, method, keep=20)
    out = model(x)
    kept = vtok.report(model).kept
    last, _ = model.forward_intermediates(x, indices=[0], output_fmt="NLC")
    for features in (last, model.forward_features(x)):
        assert features.shape[1] == 21
        torch.testing.assert_close(model.forward_head(features), out)
        assert torch.equal(vtok.report(model).kept[1][0], kept[1][0])


def test_torchvision_is_not_needed() -> None:
    """A transformers tower is compressed and run without torchvision (a dependency of its processors)."""
    code = """
import sys
sys.modules["torchvision"] = None
import torch, vtok
from transformers import CLIPVisionConfig, CLIPVisionModel
config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                          image_size=56, patch_size=7)
model = CLIPVisionModel(config).eval()
for method in ("flowcut", "tome", "mctf"):
    vtok.compress(model, method, keep=0.4)
    model(torch.randn(1, 3, 56, 56))
    assert len(vtok.report(model).kept[0][0]) == 26
assert sys.modules["torchvision"] is None
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
