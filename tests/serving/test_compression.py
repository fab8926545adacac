"""The plug-in's own arithmetic, which needs no vLLM: settings, token counts, tokens and positions."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

import vtok
from tests.models import IMAGE, VISION_START, build, inputs
from vtok.serving import vllm as plugin
from vtok.serving.vllm import positions
from vtok.serving.vllm.compression import Compression, checked
from vtok.serving.vllm.settings import find, parse

SERVED = {
    "llava": ("divprune", "flowcut", "todre", "visionzip", "tome", "mctf", "uniform", "random", "flextok"),
    "llava_next": ("divprune", "flowcut", "todre", "visionzip", "tome", "mctf", "uniform", "random", "flextok"),
    "qwen2_5_vl": ("divprune", "todre", "uniform", "random", "flextok"),
    "qwen3_vl": ("divprune", "todre", "uniform", "random", "flextok"),
}
OPTIONS = {"todre": {"decision": None}, "flowcut": {"llm_layer": None}}
SIZES = ("image", "image:84x56", "image:42x70")


def compression(model, method, keep, **options):
    options = {**OPTIONS.get(method, {}), **options}
    model.config.architectures = [type(model).__name__]
    return Compression(model.config, parse({"method": method, "keep": keep, "options": options}, None, "a test"))


def call_of(family, batch):
    """What the plug-in is told of the one picture of a batch, beside its pixels."""
    if family == "llava":
        return {"pixel_values": [None]}
    name = "image_sizes" if family == "llava_next" else "image_grid_thw"
    return {name: batch[name].tolist()}


@pytest.mark.parametrize(("family", "method"), [(f, m) for f, names in SERVED.items() for m in names])
def test_tokens_are_those_that_transformers_keeps(family, method):
    """The count that the scheduler is told, and the tokens themselves, are those of ``vtok.compress``."""
    model = build(family, layers=2)
    for keep in (0.3, 0.5):
        served = compression(model, method, keep)
        packed = served.session.shape.packed
        vtok.compress(model, method, keep=keep, positions="keep" if packed else "reindex", **OPTIONS.get(method, {}))
        for segment in SIZES if family != "llava" else SIZES[:1]:
            batch = inputs(family, model, [[4, segment, 3]])
            with torch.no_grad():
                model(**batch)
            report = vtok.report(model)
            assert served.tokens("image", call_of(family, batch)) == report.tokens_kept
        watcher = type(vtok.api.session_of(model).tower)
        served.attach(model_tower(vtok.restore(model)), watcher)
        call = {**call_of(family, batch), "pixel_values": batch["pixel_values"]}
        with torch.no_grad():
            ((rows, tokens),) = served.encode("image", call, partial(features_of, model, batch))
        served.session.remove()
        assert tokens.tolist() == report.kept[0][0].tolist()
        assert rows.shape == (len(tokens), model.config.text_config.hidden_size)


@pytest.mark.parametrize("method", ["divprune", "flextok"])
def test_planes_go_the_way_of_their_tokens(method):
    """What Qwen3-VL adds after its first layers is, for every survivor, what transformers adds, too."""
    model = build("qwen3_vl", layers=4)
    batch = inputs("qwen3_vl", model, [[4, "image:84x56", 3, "image:42x70", 2, "image:84x56"]])
    served = compression(model, method, 5)
    vtok.compress(model, method, keep=5)
    given = {}
    seen = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    seen.remove()
    where, planes = given["visual_pos_masks"], given["deepstack_visual_embeds"]
    wanted = torch.cat([given["inputs_embeds"][where], *planes], 1)
    served.attach(model_tower(vtok.restore(model)), None)
    found = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    pooled = [len(x) for x in found.pooler_output]
    levels = [x.split(pooled) if isinstance(x, torch.Tensor) else x for x in found.deepstack_features]  # 5.17: joined
    beside = [torch.cat(rows, 1) for rows in zip(found.pooler_output, *levels, strict=True)]
    call = {**call_of("qwen3_vl", batch), "pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        rows = [rows for rows, _ in served.encode("image", call, lambda: beside, wanted.shape[1] // 4)]
    served.session.remove()
    assert len(set(pooled)) == 2 and len(wanted) == 15 and len(planes) == 3
    assert torch.allclose(torch.cat(rows), wanted, atol=1e-5)


def model_tower(model):
    return vtok.api.adapter_of(model).tower


def features_of(model, batch):
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    found = model.model.get_image_features(**{name: batch[name] for name in names if name in batch})
    return [x.flatten(0, -2) for x in found.pooler_output]


REFUSED = [
    ("fastv", {}, "inside the decoder"),
    ("todre", {}, "decision=None"),
    ("downsample", {}, "uniform"),
]


@pytest.mark.parametrize(("method", "options", "words"), REFUSED)
def test_refusals(method, options, words):
    model = build("llava", layers=16)
    model.config.architectures = [type(model).__name__]
    settings = {"method": method, "keep": 40, "options": options}
    with pytest.raises(vtok.VtokError, match=words):
        Compression(model.config, parse(settings, None, "a test"))


def test_kept_positions_are_refused_where_vllm_cannot_keep_them():
    model = build("llava", layers=2)
    model.config.architectures = [type(model).__name__]
    settings = {"method": "uniform", "keep": 9, "positions": "keep"}
    with pytest.raises(vtok.VtokError, match='positions="reindex"'):
        Compression(model.config, parse(settings, None, "a test"))


def test_a_count_that_differs_is_told():
    with pytest.raises(vtok.VtokError, match="3 tokens of a picture where the prompt has 4"):
        checked([(torch.zeros(3, 2), torch.arange(3))], [4], "mine")


# -- settings -------------------------------------------------------------------------------------------------------


def test_settings_come_from_the_folder_the_variable_and_the_override(tmp_path, monkeypatch):
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    assert find(tmp_path) is None
    model = vtok.compress(build("llava", layers=2), "divprune", keep=9)
    vtok.save(model, tmp_path, weights=False)
    found = find(tmp_path)
    assert (found.methods[0].name, found.keep, found.positions) == ("divprune", 9, "reindex")
    monkeypatch.setenv(plugin.VARIABLE, json.dumps({"method": "todre", "keep": 0.5, "options": {"seed": 3}}))
    assert (find(tmp_path).methods[0].seed, find(tmp_path).keep) == (3, 0.5)
    monkeypatch.setenv(plugin.VARIABLE, str(tmp_path))
    assert find("elsewhere").methods[0].name == "divprune"
    assert find(tmp_path, {"methods": ["uniform"], "keep": 4}).methods[0].name == "uniform"
    assert find(tmp_path, False) is None
    monkeypatch.setenv(plugin.VARIABLE, "off")
    assert find(tmp_path) is None
    plugin.register()  # leaves vLLM alone, which need not be there


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "divprune"}, "budget"),
        ({"keep": 4}, '"method"'),
        ({"method": "divprune", "keep": 4, "kep": 3}, "kep"),
        ({"method": "nothing", "keep": 4}, "nothing"),
        ([], "no JSON object"),
    ],
)
def test_settings_that_are_wrong(given, words, tmp_path):
    with pytest.raises(vtok.VtokError, match=words):
        parse(given, tmp_path, "a test")


@pytest.mark.parametrize("given", ["{", "/nowhere"])
def test_a_variable_that_is_wrong(given, tmp_path, monkeypatch):
    monkeypatch.setenv(plugin.VARIABLE, given)
    with pytest.raises(vtok.VtokError, match=plugin.VARIABLE):
        find(tmp_path)


# -- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[99], [7, 5, 99], [12, 99]])
def test_survivors_keep_their_places_and_text_its_own(chunks):
    """Positions of the short prompt are those of the long one, with the dropped columns left out; also in chunks."""
    model = build("qwen2_5_vl", layers=2)
    batch = inputs("qwen2_5_vl", model, [[3, "image:84x56", 2, "image:42x70", 6]])
    ids = batch["input_ids"][0]
    ids[0], ids[batch["input_ids"][0].eq(IMAGE).nonzero()[0, 0] - 1] = VISION_START, VISION_START
    whole, delta = model.model.get_rope_index(
        batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"]
    )
    columns = ids.eq(IMAGE).nonzero().flatten()
    grids = [(1, height // 2, width // 2) for _, height, width in batch["image_grid_thw"].tolist()]
    sizes = [rows * wide for _, rows, wide in grids]
    kept = [torch.arange(1, sizes[0], 2), torch.tensor([0, 3, sizes[1] - 1])]
    keep = torch.ones(len(ids), dtype=torch.bool)
    keep[columns] = False
    keep[columns[kept[0]]] = keep[columns[sizes[0] + kept[1]]] = True
    short = ids[keep]
    media = short.eq(IMAGE).nonzero().flatten()
    offsets = [int(media[0]), int(media[len(kept[0])])]
    relative = [positions.grid_positions(*grid) for grid in grids]
    runs = [
        positions.Run(offset, len(own), int(grid.max()) + 1)
        for offset, own, grid in zip(offsets, kept, relative, strict=True)
    ]
    packed = [
        positions.pack(torch.zeros(len(own), 4, dtype=torch.bfloat16), grid[:, own])
        for own, grid in zip(kept, relative, strict=True)
    ]
    found, added = positions.prompt_positions(len(short), runs)
    start = 0
    for size in chunks:
        end = min(start + size, len(short))
        parts = []
        for offset, rows in zip(offsets, packed, strict=True):
            first, last = max(start, offset) - offset, min(end, offset + len(rows)) - offset
            if first < last:
                parts.append(rows[first:last])
        features, found, added = positions.place(media, parts, found, start)
        assert all(rows.shape[1] == 4 for rows in features)
        start = end
    assert torch.equal(found, whole[:, 0, keep])
    assert added == int(whole.max()) + 1 - len(short)
    assert int(delta) == int(whole.max()) + 1 - len(ids)


def test_positions_beside_embeddings_survive_half_precision():
    ranks = torch.tensor([0, 127, 128, 300, 4095])
    packed = positions.pack(torch.zeros(4096, 2, dtype=torch.bfloat16), torch.arange(4096).expand(3, -1))
    _, rank, relative = positions.unpack(packed[ranks])
    assert torch.equal(rank, ranks)
    assert torch.equal(relative, ranks.expand(3, -1))
