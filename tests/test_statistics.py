"""Statistics that methods read equal those of eager attention maps (DESIGN.md section 5, point 5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import vtok
from vtok.api import session_of

from .conftest import LAYERS
from .models import FAMILIES, SCENARIOS, Batch, inputs, real_of, scenarios, visual_mask
from .oracle import hidden_columns, masked, text_model


@dataclass(frozen=True)
class Probe(vtok.Method):
    """Takes every statistic down and keeps the first tokens."""

    seen: list = field(default_factory=list)
    layer: int = 2
    site = "decoder"

    def stages(self, shape: vtok.Shape) -> tuple[vtok.Stage, ...]:
        reads = frozenset({"attention", "qkv", "transition"})
        observed = (self.layer - 2, self.layer - 1)
        return (vtok.Stage("decoder", self.layer, self.select, reads=reads, share=1 / self.layer, observed=observed),)

    def select(self, view: vtok.DecoderView, count: int) -> Tensor:
        q, k, v_last, v = view.projections()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        found = {
            "last": view.attention("last"),
            "instruction": view.attention("instruction"),
            "next last": view.attention("last", of="next"),
            "next instruction": view.attention("instruction", of="next"),
            "text to visual": view.mass()[0],
            "visual to text": view.mass()[1],
            "transition": view.transition(),
            "relation": ((k @ q[..., None])[..., 0] * q.shape[-1] ** -0.5).softmax(-1).mean(1),
            "value": torch.cat((v, v_last[:, :, None]), 2),
        }
        for i, number in enumerate(view.spans):
            self.seen.append((number, view.tokens[i], {name: value[i] for name, value in found.items()}))
        return torch.arange(count).expand(view.features.shape[0], -1)


STATISTICS = [(family, name) for family in FAMILIES for name in ("ragged", "adjacent", "video", "mixed")]


@pytest.mark.parametrize(("family", "name"), [case for case in STATISTICS if case[1] in scenarios(case[0])])
def test_statistics_equal_those_of_attention_maps(tiny: Any, family: str, name: str) -> None:
    """Before a first and before a second cut, against maps, inputs and outputs of the (masked) plain eager model."""
    model = tiny(family, attn="eager")
    batch = inputs(family, model, SCENARIOS[name])
    probes = [Probe([], 2), Probe([], 5)]
    vtok.compress(model, probes, keep=0.6)
    model(**batch)
    gone, spans = hidden_columns(model, batch), session_of(model).last.spans
    vtok.restore(model)
    for probe in probes:
        assert {number for number, *_ in probe.seen} == set(range(len(spans)))
        still = [gone[min(layer, probe.layer - 1)] for layer in range(LAYERS)]  # up to this cut
        maps, taken = watch(model, batch, still)
        for number, tokens, found in probe.seen:
            where, row = spans[number].columns[tokens], spans[number].sample
            expected = by_hand(batch, maps, taken, still, probe.layer, row, where)
            assert found.keys() == expected.keys()
            for key, value in found.items():
                torch.testing.assert_close(
                    value.double(), expected[key].double(), atol=1e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
                )


Taken = dict[tuple[int, str], tuple[Tensor, Tensor]]


def watch(model: PreTrainedModel, batch: Batch, gone: list[Tensor]) -> tuple[Any, Taken]:
    """Attention maps of the masked plain model, and what goes into and comes out of its attention, mlp and values."""
    taken: Taken = {}

    def after(key: tuple[int, str], module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        taken[key] = entering, output[0] if isinstance(output, tuple) else output

    handles = []
    for i, layer in enumerate(text_model(model).layers):
        parts = {"attention": layer.self_attn, "mlp": layer.mlp, "v": layer.self_attn.v_proj}
        handles += [m.register_forward_hook(partial(after, (i, k)), with_kwargs=True) for k, m in parts.items()]
    with masked(model, gone, batch["attention_mask"]):
        maps = model(**batch, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    return maps, taken


def by_hand(
    batch: Batch, maps: Any, taken: Taken, gone: list[Tensor], layer: int, row: int, where: Tensor
) -> dict[str, Tensor]:
    """The probe's statistics before `layer`, for the image of sample `row` that stands at columns `where`."""
    real, visual = real_of(batch)[row], visual_mask(batch)[row]
    before, coming = (maps[i][row].double().mean(0) for i in (layer - 1, layer))
    last = int(real.nonzero()[-1])
    tail = torch.arange(int(visual.nonzero()[-1]) + 1, last + 1)
    first = int(visual.nonzero()[0])
    pictures = visual & ~gone[layer - 1][row]
    words = ~visual & real & (torch.arange(len(real)) > first)
    relation = maps[layer - 1][row][:, last, where].double()
    value = taken[layer - 1, "v"][1][row][torch.cat((where, torch.tensor([last])))]
    transition = torch.zeros(len(real)).double()
    for i in {0, 1} | {layer - 2, layer - 1}:
        standing = real & ~gone[i][row]
        for part in ("attention", "mlp"):
            x, y = (side[row].double() for side in taken[i, part])
            turn = (1 - torch.cosine_similarity(x, y, dim=-1)).exp()
            transition += y.norm(dim=-1) / x.norm(dim=-1) * turn / turn[standing].sum()
    return {
        "last": before[last, where],
        "instruction": before[tail][:, where].mean(0),
        "next last": coming[last, where],
        "next instruction": coming[tail][:, where].mean(0),
        "text to visual": before[words][:, pictures].sum(1).mean(),
        "visual to text": before[pictures][:, words].sum(1).mean(),
        "transition": transition[where],
        "relation": (relation / relation.sum(-1, keepdim=True)).mean(0),
        "value": value.unflatten(-1, (2, -1)).transpose(0, 1),
    }
