"""What folds exactly is exact; what cannot is close: DINOv2 blocks inside CLIP's and Qwen2.5-VL's towers."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from vtok_eval.models import surgery

WIDTH, HEADS, LAYERS, NEURONS, SIDE = 64, 2, 3, 128, 6


@pytest.fixture(scope="module")
def teacher() -> transformers.Dinov2Model:
    config = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        mlp_ratio=2,
        image_size=84,
        patch_size=14,
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lambda" in name:
                weight.normal_(0.5, 0.2)
            elif "norm" in name:
                weight.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            elif "embeddings" in name:
                weight.normal_(0, 0.05)
            else:
                weight.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, SIDE * 14, SIDE * 14, generator=torch.Generator().manual_seed(1))


def last_hidden(model: transformers.Dinov2Model, pixels: Tensor) -> Tensor:
    norm, model.layernorm = model.layernorm, nn.Identity()
    with torch.no_grad():
        found = model(pixels).last_hidden_state
    model.layernorm = norm
    return found - found.mean(-1, keepdim=True)


def clip(intermediate: int) -> transformers.CLIPVisionModel:
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE * 14,
        patch_size=14,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    return transformers.CLIPVisionModel(config).eval()


def test_a_clip_tower_follows_its_teacher(
    teacher: transformers.Dinov2Model, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The further the push, the closer: what is left is of second order in its inverse."""
    wanted = last_hidden(teacher, pixels)
    away = []
    for push in (8.0, 64.0, 512.0):
        monkeypatch.setattr(surgery, "PUSH", push)
        seen = surgery.observed(teacher, pixels, LAYERS)
        student = clip(NEURONS)
        student.load_state_dict(surgery.clip_from_dinov2(teacher.state_dict(), LAYERS, NEURONS, SIDE, seen))
        with torch.no_grad():
            found = student(pixels).last_hidden_state
        found = found - found.mean(-1, keepdim=True)
        away.append(((found - wanted).norm() / wanted.norm()).item())
    # one direction of 64 is lost for good; a random model's stream has no idle one, a trained one's has
    assert away[0] < 0.2
    assert away[2] <= away[1] <= away[0]


def test_neurons_that_do_nothing_can_go(teacher: transformers.Dinov2Model, pixels: Tensor) -> None:
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    for layer in range(LAYERS):
        weights[f"encoder.layer.{layer}.mlp.fc2.weight"][:, ::2] = 0
    idle = transformers.Dinov2Model(teacher.config).eval()
    idle.load_state_dict(weights)
    seen = surgery.observed(idle, pixels, LAYERS)
    outputs = []
    for neurons in (NEURONS, NEURONS // 2):
        student = clip(neurons)
        student.load_state_dict(surgery.clip_from_dinov2(weights, LAYERS, neurons, SIDE, seen))
        with torch.no_grad():
            outputs.append(student(pixels).last_hidden_state)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)


def test_a_qwen_block_equals_its_teachers_where_nothing_turns(teacher: transformers.Dinov2Model) -> None:
    """Norms, attention, layer scale and feed-forward are exact on a stream without mean; only positions are new."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, 16, WIDTH, generator=generator)
    hidden = hidden - hidden.mean(-1, keepdim=True)
    seen = surgery.observed(teacher, torch.randn(1, 3, 84, 84, generator=generator), LAYERS)
    weights = surgery.qwen_from_dinov2(teacher.state_dict(), LAYERS, NEURONS, HEADS, seen)
    block = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionBlock(
        transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
            depth=LAYERS, hidden_size=WIDTH, intermediate_size=NEURONS, num_heads=HEADS, hidden_act="gelu"
        )
    ).eval()
    block.load_state_dict({k.removeprefix("blocks.0."): v for k, v in weights.items() if k.startswith("blocks.0.")})
    block.attn.config._attn_implementation = "sdpa"
    still = (torch.ones(16, WIDTH // HEADS), torch.zeros(16, WIDTH // HEADS))
    with torch.no_grad():
        found = block(hidden[0], cu_seqlens=torch.tensor([0, 16], dtype=torch.int32), position_embeddings=still)
        output = teacher.encoder.layer[0](hidden)
        wanted = (output if isinstance(output, Tensor) else output[0])[0]
    torch.testing.assert_close(found, wanted - wanted.mean(-1, keepdim=True), atol=2e-5, rtol=1e-4)


def test_channels_that_matter_turn_slowly() -> None:
    query, key = torch.zeros(16, 8), torch.zeros(16, 8)
    for weight in (query, key):
        weight[3] = weight[9] = 9.0  # one channel of each of two heads
    order = surgery.slow_last(query, key, heads=2)
    assert sorted(order.tolist()) == list(range(16))
    slowest = {3, 7}  # of 8 channels a head: pairs 1 and 3 turn slowest, with channels 1, 5 and 3, 7
    first, second = order[:8].tolist(), order[8:].tolist()
    assert first.index(3) in slowest and second.index(9) in slowest


def test_positions_are_resized_and_the_class_token_is_not() -> None:
    positions = torch.randn(1, 1 + 49, 4)
    found = surgery.interpolated(positions, 7)
    assert torch.allclose(found, positions, atol=1e-6)
    small = surgery.interpolated(positions, 3)
    assert small.shape == (1, 10, 4)
    assert torch.equal(small[:, 0], positions[:, 0])
    assert F.cosine_similarity(small[0, 5], positions[0, 25], 0) > 0  # the middle stays in the middle
