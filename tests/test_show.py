"""Pictures of kept tokens: which cell belongs to which token, what is clear, grey or coloured."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import vtok
from vtok.errors import VtokError
from vtok.protocol import Part
from vtok.report import Report, StageReport
from vtok.show import sheet

from .models import FAMILIES, HAS_VIDEO, inputs


def photo(width: int = 448, height: int = 448, seed: int = 0) -> Image.Image:
    """Bright noise: a faded pixel is never equal to the picture's own."""
    pixels = np.random.default_rng(seed).integers(120, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def report(
    parts: Sequence[Part],
    kept: Sequence[int],
    groups: list[list[int]] | None = None,
    family: str = "qwen2_vl",
    stages: Sequence[tuple[str, int | None, Sequence[int]]] = (),
) -> Report:
    total = float(sum(part.length for part in parts))
    return Report(
        method="by hand",
        keep=1.0,
        family=family,
        kept=[[torch.tensor(kept, dtype=torch.long)]],
        groups=[[groups]],
        stages=[StageReport(site, layer, [[torch.tensor(tokens)]]) for site, layer, tokens in stages],
        parts=[[tuple(parts)]],
        tokens_in=total,
        tokens_kept=float(len(kept)),
        layer_tokens=[],
        average_tokens=total,
        mac_ratio=1.0,
        seconds={},
    )


def cell(picture: Image.Image, part: Part, row: int, column: int, left: int = 0, width: int = 0) -> np.ndarray:
    """The inside of a cell, without its border; of a panel that starts at ``left`` and is ``width`` wide."""
    across, down = (width or picture.width) // part.width, picture.height // part.height
    box = (left + column * across + 2, row * down + 2, left + (column + 1) * across - 2, (row + 1) * down - 2)
    return np.asarray(picture.crop(box)).astype(int)


def clear_cells(picture: Image.Image, original: Image.Image, part: Part) -> set[int]:
    """Numbers of the cells in raster order that show the picture unchanged."""
    return {
        row * part.width + column
        for row in range(part.height)
        for column in range(part.width)
        if np.array_equal(cell(picture, part, row, column), cell(original, part, row, column))
    }


def test_kept_cells_are_clear_and_dropped_ones_dark_and_grey() -> None:
    part, original = Part(8, 8), photo()
    kept = {0, 9, 27, 63}
    picture = vtok.show(original, report([part], sorted(kept)))
    assert picture.size == (448, 448)
    assert picture.mode == "RGB"
    assert clear_cells(picture, original, part) == kept
    dropped, was = cell(picture, part, 3, 0), cell(original, part, 3, 0)
    assert dropped.mean() < was.mean() / 2
    assert np.ptp(dropped, axis=-1).max() < 12 < np.ptp(was, axis=-1).max()


def test_kept_cells_have_a_thin_border() -> None:
    picture = vtok.show(Image.new("RGB", (448, 448), (40, 90, 40)), report([Part(4, 4)], [5]))
    edge, inside, outside = np.asarray(picture)[150, [112, 114, 110]]
    assert edge.min() > 150
    assert inside.tolist() == [40, 90, 40]
    assert outside.max() < 60


def test_nothing_kept_is_all_dark_and_everything_kept_all_clear() -> None:
    part, original = Part(4, 4), photo()
    assert clear_cells(vtok.show(original, report([part], [])), original, part) == set()
    assert clear_cells(vtok.show(original, report([part], range(16))), original, part) == set(range(16))


@pytest.mark.parametrize(
    ("family", "fit", "size"),
    [
        ("qwen2_vl", "auto", (600, 400)),  # resized whole: the picture keeps its shape, cells are not square
        ("llava", "auto", (448, 448)),  # centre crop
        ("llava", "stretch", (600, 400)),
        ("llava_onevision", "auto", (600, 600)),  # one of several images is padded
        ("qwen2_vl", "crop", (448, 448)),
    ],
)
def test_the_picture_is_drawn_as_the_model_saw_it(family: str, fit: str, size: tuple[int, int]) -> None:
    original = photo(600, 400)
    picture = vtok.show(original, report([Part(8, 8)], range(64), family=family), fit=fit)
    assert max(abs(a - b) for a, b in zip(picture.size, size, strict=True)) <= 4  # whole cells
    if family == "llava" and fit == "auto":
        crop = ImageOps.fit(original, picture.size, Image.Resampling.LANCZOS)
        assert clear_cells(picture, crop, Part(8, 8)) == set(range(64))


def test_small_and_large_pictures_come_at_a_sensible_size() -> None:
    assert vtok.show(photo(56, 56), report([Part(8, 8)], [0])).size == (448, 448)
    assert max(vtok.show(photo(3000, 2000), report([Part(20, 30)], [0])).size) <= 900
    wide = vtok.show(photo(64, 64), report([Part(200, 200)], [0]))
    assert wide.size == (1200, 1200)


def test_merged_groups_take_one_colour_each() -> None:
    part = Part(4, 4)
    original = photo()
    # 1, 2 and 7 pour into 2; 8 and 9 into 8; 12 stands for itself; the rest is dropped
    picture = vtok.show(original, report([part], [2, 8, 12], [[1, 2, 7], [8, 9], [12]]))
    assert clear_cells(picture, original, part) == {12}

    def hue(token: int) -> float:
        pixels = cell(picture, part, *divmod(token, 4))[:20]  # above the dot of the standing token
        return colorsys.rgb_to_hsv(*(pixels.reshape(-1, 3).mean(0) / 255))[0]

    assert hue(1) == pytest.approx(hue(2), abs=0.02)
    assert hue(7) == pytest.approx(hue(2), abs=0.02)
    assert hue(8) == pytest.approx(hue(9), abs=0.02)
    assert abs(hue(8) - hue(2)) > 0.1
    middle = picture.width // 8
    assert picture.getpixel((5 * middle, middle)) == (255, 255, 255)  # token 2 stands for its group
    assert picture.getpixel((3 * middle, middle)) != (255, 255, 255)
    assert cell(picture, part, 3, 3).mean() < 100


def test_any_resolution_shows_thumbnail_and_grid() -> None:
    base, grid = Part(4, 4), Part(4, 6, newlines=1, per_row=True)
    original = photo(600, 400)
    kept = [5, 16 + 0, 16 + 7 + 2, 16 + 6]  # thumbnail (1, 1); grid (0, 0) and (1, 2); the newline of row 0
    picture = vtok.show(original, report([base, grid], kept, family="llava_next"))
    plain = vtok.show(original, report([base, grid], range(16 + 28), family="llava_next"))
    panel = (picture.width - 12) // 2
    assert abs(panel - 600) < 6

    def clear(part: Part, row: int, column: int, left: int) -> bool:
        ours, theirs = (cell(p, part, row, column, left, panel) for p in (picture, plain))
        return np.array_equal(ours, theirs)

    assert [(r, c) for r in range(4) for c in range(4) if clear(base, r, c, 0)] == [(1, 1)]
    assert [(r, c) for r in range(4) for c in range(6) if clear(grid, r, c, panel + 12)] == [(0, 0), (1, 2)]


def test_a_prefix_token_has_no_place() -> None:
    part, original = Part(4, 4), photo()
    picture = vtok.show(original, report([Part(1, 1), part], [0, 1, 16], family="llava"))
    assert clear_cells(picture, original, part) == {0, 15}


def test_video_frames_stand_side_by_side() -> None:
    part = Part(2, 2)
    frames = [photo(seed=seed) for seed in range(6)]
    picture = vtok.show(frames, report([part] * 3, [0, 5, 10]))
    assert picture.size == (3 * 448 + 2 * 12, 448)
    for place, frame in enumerate((frames[0], frames[2], frames[4])):  # two frames make one temporal patch
        panel = picture.crop((place * 460, 0, place * 460 + 448, 448))
        assert clear_cells(panel, frame, part) == {(0, 1, 2)[place]}
    alone = vtok.show(frames[0], report([part] * 3, [0, 5, 10]))
    assert alone.size == picture.size
    long = vtok.show(frames[0], report([part] * 9, [0]))
    assert long.size == (4 * 460 - 12, 3 * 460 - 12)


def test_stages_stand_side_by_side_with_captions() -> None:
    part = Part(4, 4)
    stages: list[tuple[str, int | None, Sequence[int]]] = [
        ("encoder", 2, range(16)),
        ("input", None, [0, 5]),
        ("decoder", 3, [5]),
    ]
    three = vtok.show(photo(), report([part], [5], stages=stages), stages=True)
    one = vtok.show(photo(), report([part], [5], stages=stages[:1]), stages=True)
    none = vtok.show(photo(), report([part], [5]), stages=True)
    assert three.height == one.height
    assert three.width == 3 * 448 + 4 * 12
    assert one.size == none.size == (448 + 2 * 12, one.height)
    assert one.height > 448 + 12  # captions below
    panels = [three.crop((12 + i * 460, 12, 460 + i * 460, 460)) for i in range(3)]
    assert [clear_cells(panel, photo(), part) for panel in panels] == [set(range(16)), {0, 5}, {5}]


def test_sheet_wraps_and_checks() -> None:
    pictures = [photo(100, 50)] * 5
    page = sheet(pictures, list("abcde"), columns=2, width=100)
    assert page.width == 2 * 112 + 12
    assert page.height > 3 * 62
    assert sheet(pictures[:1], ["a very long caption " * 9]).width == 124
    with pytest.raises(VtokError, match="5 pictures and 1 captions"):
        sheet(pictures, ["a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample": 1}, "no sample 1: the report holds samples 0 to 0"),
        ({"sample": -1}, "no sample -1"),
        ({"image_index": 2}, "no image 2 in sample 0: it holds images 0 to 0"),
        ({"fit": "squeeze"}, "fit='squeeze' is unknown"),
        ({"image": np.zeros((4, 4, 3))}, "not ndarray"),
        ({"image": []}, "not list"),
        ({"image": [photo(), photo()]}, "2 pictures were given for one image"),
    ],
)
def test_bad_input_gets_a_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(VtokError, match=message):
        vtok.show(**{"image": photo(), "report": report([Part(2, 2)], [0]), **arguments})


def test_a_prompt_without_pictures_has_nothing_to_show() -> None:
    empty = report([Part(2, 2)], [0])
    empty.parts, empty.kept, empty.groups = [[]], [[]], [[]]
    with pytest.raises(VtokError, match="no image 0 in sample 0: it holds no image"):
        vtok.show(photo(), empty)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_of_every_family_can_be_drawn(family: str, tiny: Any) -> None:
    model = tiny(family)
    kinds = ["image", "video"] if family in HAS_VIDEO else ["image"]
    for kind in kinds:
        with vtok.compressed(model, "uniform", keep=0.5):
            model(**inputs(family, model, [[4, kind, 6]]))
            made = vtok.report(model)
        everything = vtok.show(photo(), report(made.parts[0][0], range(10_000), family=family))
        picture = vtok.show(photo(), made)
        assert picture.size == everything.size
        changed = np.any(np.asarray(picture) != np.asarray(everything), axis=-1).mean()
        assert 0.3 < changed < 0.8, (kind, changed)
        assert vtok.show(photo(), made, stages=True).height > picture.height or len(made.parts[0][0]) > 1


def test_merges_of_a_real_prefill_are_coloured(tiny: Any) -> None:
    model = tiny("llava")
    with vtok.compressed(model, "downsample", keep=16):
        model(**inputs("llava", model, [[4, "image", 6]]))
        picture = vtok.show(photo(), vtok.report(model))
    part = Part(8, 8)
    assert clear_cells(picture, photo(), part) == set()
    assert cell(picture, part, 0, 0).mean() > 80  # nothing is dropped
