"""Runtimes: the tokens, kept indices and logits of the hooked model, in batches, with padding, streamed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vtok
from tests.models import Batch, build, inputs, pad_right, single
from vtok import VtokError
from vtok.export import onnx, openvino, pt2
from vtok.export.manifest import Manifest
from vtok.export.runtime import OnnxVLM, open_exported, pictures
from vtok.export.runtime.prompt import build as build_prompt
from vtok.export.runtime.sampling import Sampler
from vtok.export.runtime.settings import Settings
from vtok.export.trace import Program, trace_all
from vtok.export.vision import vision_graph

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

PROMPTS = [[5, "image", 4], [3, "image", 2, "image", 6], [9]]
STEPS = 5


class Exported:
    """A tiny compressed model, its traced graphs, and folders of them that are written when they are asked for."""

    def __init__(self, family: str, root: Path, **options: Any) -> None:
        self.family, self.root = family, root
        self.model = vtok.compress(build(family, layers=2, vision_layers=2), "divprune", keep=0.3, **options)
        graph = vision_graph(self.model, inputs(family, self.model, [["image"]]))
        self.plan = graph.plan
        self.programs: list[Program] = trace_all(self.model, graph)
        self.folders: dict[tuple[str, str], Path] = {}

    def folder(self, target: str, precision: str = "fp32") -> Path:
        if (target, precision) not in self.folders:
            folder = self.root / f"{target}-{precision}"
            folder.mkdir()
            importlib.import_module(f"vtok.export.{target}").write(self.programs, folder, precision)
            self.model.config.save_pretrained(folder)
            self.model.generation_config.save_pretrained(folder)
            plan = self.plan.to_json()
            Manifest(target=target, precision=precision, source={}, compression={}, plan=plan).write(folder)
            self.folders[target, precision] = folder
        return self.folders[target, precision]

    def inputs(self, prompts: list[list[Any]] = PROMPTS) -> Batch:
        return inputs(self.family, self.model, prompts)

    def answer(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, list[list[np.ndarray]]]:
        """Tokens, first logits and kept indices of the hooked model."""
        given = self.model.generate(
            **batch, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        kept = [[image.numpy() for image in own] for own in vtok.report(self.model).kept]
        return given.sequences[:, batch["input_ids"].shape[1] :].numpy(), given.logits[0].numpy(), kept


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    made: dict[Any, Exported] = {}

    def get(family: str, **options: Any) -> Exported:
        key = (family, *options.items())
        if key not in made:
            with torch.no_grad():
                made[key] = Exported(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target"),
    [("llava", "onnx"), ("llava", "openvino"), ("llava", "pt2"), ("llava_next", "onnx"), ("qwen2_5_vl", "onnx")],
)
def test_a_padded_batch_is_answered_as_by_the_hooked_model(family, target, exported):
    if target == "openvino":
        pytest.importorskip("openvino")
    made = exported(family)
    batch = made.inputs()
    tokens, logits, kept = made.answer(batch)
    found = open_exported(made.folder(target)).generate_ids(batch, STEPS)
    assert np.array_equal(found.tokens, tokens)
    assert np.abs(found.logits - logits).max() < 1e-4
    for ours, theirs in zip(found.kept, kept, strict=True):
        assert len(ours) == len(theirs)
        assert all(np.array_equal(own, other) for own, other in zip(ours, theirs, strict=True))
    alone = single(batch, 1)
    whole = batch["attention_mask"].sum(1).tolist()
    assert found.prompt_tokens == [
        size - images * (made.plan.tokens_in - made.plan.kept) for size, images in zip(whole, batch.images, strict=True)
    ]
    again = open_exported(made.folder(target)).generate_ids(alone, STEPS)
    assert np.array_equal(again.tokens[0], tokens[1])


@pytest.mark.slow
def test_positions_that_are_closed_up(exported):
    made = exported("llava", positions="reindex")
    batch = made.inputs()
    tokens, logits, _ = made.answer(batch)
    found = OnnxVLM(made.folder("onnx"), threads=1).generate_ids(batch, STEPS)
    assert np.array_equal(found.tokens, tokens)
    assert np.abs(found.logits - logits).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("fp16", 0.02), ("int8", 0.3)])
def test_smaller_files_answer_nearly_alike(precision, limit, exported):
    made = exported("llava")
    batch = made.inputs()
    _, logits, kept = made.answer(batch)
    found = OnnxVLM(made.folder("onnx", precision)).generate_ids(batch, 1)
    assert np.abs(found.logits - logits).max() < limit * np.ptp(logits)
    assert np.array_equal(found.kept[0][0], kept[0][0])
    small, whole = ((made.folder("onnx", name) / "decoder.onnx").stat().st_size for name in (precision, "fp32"))
    assert small < whole


@pytest.mark.slow
def test_padding_on_the_right_and_no_mask(exported):
    made = exported("llava")
    model = OnnxVLM(made.folder("onnx"))
    batch = made.inputs()
    left, right = model.generate_ids(batch, STEPS), model.generate_ids(pad_right(batch), STEPS)
    assert np.array_equal(left.tokens, right.tokens)
    alone = {key: value for key, value in single(batch, 0).items() if key != "attention_mask"}
    assert np.array_equal(model.generate_ids(alone, STEPS).tokens[0], left.tokens[0])


@pytest.mark.slow
def test_an_answer_ends_at_its_end_token(exported):
    made = exported("llava")
    model = OnnxVLM(made.folder("onnx"))
    batch = made.inputs()
    free = model.generate_ids(batch, STEPS).tokens
    object.__setattr__(model.settings, "ends", frozenset([int(free[0, 1])]))
    found = model.generate_ids(batch, STEPS).tokens
    assert found[0].tolist() == [*free[0, :2].tolist(), *[model.settings.padding] * (found.shape[1] - 2)]


@pytest.mark.slow
def test_streams(exported):
    made = exported("llava")
    model = OnnxVLM(made.folder("onnx"), processor=Words())
    whole = model.generate(None, "11 12 13", STEPS)
    assert "".join(model.stream(None, "11 12 13", STEPS)).strip() == whole
    assert len(whole.split()) == STEPS
    heard = Streamer()
    model.generate(None, "11 12 13", STEPS, streamer=heard)
    assert " ".join(map(str, heard.tokens[3:])) == whole
    assert heard.ended
    with pytest.raises(VtokError, match="one prompt at a time"):
        model.generate_ids(made.inputs(), 1, streamer=heard)
    assert model.generate(None, ["11 12", "13"], 2, temperature=0.7, seed=1) == model.generate(
        None, ["11 12", "13"], 2, temperature=0.7, seed=1
    )


@pytest.mark.slow
def test_bad_input_to_a_folder(exported, tmp_path):
    made = exported("llava")
    folder = made.folder("onnx")
    model = OnnxVLM(folder)
    batch = dict(made.inputs([[3, "image", 4]]))
    with pytest.raises(VtokError, match="max_new_tokens=0"):
        model.generate_ids(batch, 0)
    with pytest.raises(VtokError, match="placeholders"):
        model.generate_ids({**batch, "input_ids": batch["input_ids"][:, 4:], "attention_mask": None}, 1)
    with pytest.raises(VtokError, match="takes pictures of shape"):
        model.generate_ids({**batch, "pixel_values": torch.zeros(1, 3, 20, 20)}, 1)
    with pytest.raises(VtokError, match="no videos"):
        model.generate_ids({**batch, "pixel_values_videos": torch.zeros(1)}, 1)
    with pytest.raises(VtokError, match="no processor"):
        model.generate(None, "words")
    with pytest.raises(VtokError, match=r"exported to onnx, not to pt2; open it with vtok\.OnnxVLM"):
        Settings.read(folder, "pt2")
    with pytest.raises(VtokError, match="holds no"):
        open_exported(tmp_path)


def test_positions_of_a_qwen_are_the_librarys(tiny):
    model = tiny("qwen2_5_vl")
    batch = inputs("qwen2_5_vl", model, PROMPTS)
    grid = tuple(batch["image_grid_thw"][0].tolist())
    tokens = grid[1] * grid[2] // 4
    settings = _settings("qwen2_5_vl", model, tokens, {"grid_thw": grid})
    every = np.tile(np.arange(tokens), (3, 1))
    found = build_prompt(settings, batch["input_ids"].numpy(), batch["attention_mask"].numpy(), every)
    expected, delta = model.model.get_rope_index(
        batch["input_ids"],
        batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    real = found.mask.astype(bool)
    assert np.array_equal(found.positions[:, real], expected.numpy()[:, real])
    assert np.array_equal(found.following, real.sum(1) + delta[:, 0].numpy())


def test_a_prompt_keeps_what_is_kept_in_its_place(tiny):
    model = tiny("llava")
    settings = _settings("llava", model, 4, {"image_size": (56, 56)})
    image = settings.image_token
    ids = np.array([[9, 8, image, image, image, image, 7], [0, 0, 0, 0, 0, 6, 5]])
    mask = np.array([[1] * 7, [0] * 5 + [1] * 2])
    found = build_prompt(settings, ids, mask, np.array([[0, 3]]))
    assert found.ids.tolist() == [[9, 8, image, image, 7], [0, 0, 0, 6, 5]]
    assert found.positions[0].tolist() == [0, 1, 2, 5, 6]
    assert found.visual.tolist() == [[False, False, True, True, False], [False] * 5]
    assert found.following.tolist() == [7, 2]
    with pytest.raises(VtokError, match=r"\[4, 0\] placeholders and 2 pictures"):
        build_prompt(settings, ids, mask, np.array([[0, 3], [1, 2]]))


def test_pictures_of_another_layout_are_refused_or_stretched(tiny):
    model = tiny("qwen2_5_vl")
    settings = _settings("qwen2_5_vl", model, 16, {"grid_thw": (1, 8, 8)}, (64, 294))
    given = {"pixel_values": torch.zeros(24, 294), "image_grid_thw": torch.tensor([[1, 6, 4]])}
    with pytest.raises(VtokError, match="resize=True"):
        pictures.batch(settings, given)
    assert pictures.resized(settings, Image.new("RGB", (30, 20))).size == (56, 56)
    settings = _settings("llava_next", tiny("llava_next"), 16, {"image_sizes": (84, 112)}, (5, 3, 56, 56))
    assert pictures.resized(settings, Image.new("RGB", (30, 20))).size == (112, 84)


def test_pictures_belong_to_prompts():
    picture = Image.new("RGB", (4, 4))
    assert pictures.by_prompt(None, 2) == [[], []]
    assert pictures.by_prompt(picture, 1) == [[picture]]
    assert pictures.by_prompt([picture, picture], 1) == [[picture, picture]]
    assert pictures.by_prompt([picture, [picture, picture], None], 3) == [[picture], [picture, picture], []]
    with pytest.raises(VtokError, match="2 pictures or lists of them for 3 prompts"):
        pictures.by_prompt([picture, picture], 3)
    with pytest.raises(VtokError, match="PIL pictures"):
        pictures.by_prompt("picture.png", 1)


def test_sampling_follows_the_distribution():
    logits = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    assert Sampler()(logits).tolist() == [0, 2]
    assert Sampler(temperature=1.0, top_k=1)(logits).tolist() == [0, 2]
    assert Sampler(temperature=1.0, top_p=0.4)(logits).tolist() == [0, 2]
    drawn = Sampler(temperature=1.0, seed=3)
    counts = np.bincount([drawn(logits)[0] for _ in range(2000)], minlength=3) / 2000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.05
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 0}):
        with pytest.raises(VtokError, match="temperature"):
            Sampler(**wrong)


@pytest.mark.parametrize(("writer", "precision"), [(onnx, "fp8"), (openvino, "int8"), (pt2, "fp16")])
def test_unknown_precisions_are_refused(writer, precision, tmp_path):
    with pytest.raises(VtokError, match=precision):
        writer.write([], tmp_path, precision)


def test_missing_packages_name_the_extra():
    with pytest.raises(VtokError, match=r"no_such_package is missing: pip install vtok\[export\]"):
        onnx.packages("no_such_package")


def _settings(
    family: str, model: Any, tokens: int, layout: dict[str, tuple[int, ...]], pixels: tuple[int, ...] = (3, 56, 56)
) -> Settings:
    from vtok.export.fixed import FixedPlan

    plan = FixedPlan(family, "divprune", 4, tokens, 2, 64, "keep", layout, pixels)
    return Settings.of(plan, model.config.to_dict(), model.generation_config.to_dict())


class Words:
    """A processor whose words are numbers."""

    image_token = "<image>"
    chat_template = "no template, but one"

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, turns: Any, add_generation_prompt: bool) -> str:
        return turns[0]["content"][-1]["text"]

    def __call__(self, images: Any, text: list[str], **options: Any) -> dict[str, torch.Tensor]:
        rows = [[int(word) for word in line.split()] for line in text]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
        return " ".join(str(int(token)) for token in tokens)

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]


class Streamer:
    """Hears tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, tokens: np.ndarray) -> None:
        self.tokens += tokens.reshape(-1).tolist()

    def end(self) -> None:
        self.ended = True
