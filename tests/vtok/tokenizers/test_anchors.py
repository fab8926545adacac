"""Anchors: nested boxes in a dyadic order, exact pooling, and places that a longer sequence leaves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok.errors import VtokError
from vtok.tokenizers import anchors

SCHEMES = st.sampled_from(anchors.SCHEMES)
SIDES = st.integers(1, 30)


@given(SCHEMES, st.integers(1, 300), st.integers(1, 300))
@settings(deadline=None, max_examples=40)
def test_a_prefix_does_not_depend_on_the_length(scheme: str, k: int, more: int) -> None:
    few, many = anchors.boxes(k, scheme), anchors.boxes(k + more, scheme)
    assert torch.equal(few, many[:k])
    assert torch.equal(anchors.levels(k, scheme), anchors.levels(k + more, scheme)[:k])
    assert len({tuple(box) for box in many.tolist()}) == k + more


@pytest.mark.parametrize(
    ("scheme", "counts"), [("quadtree", [1, 5, 21, 85, 341]), ("haar", [1, 4, 16, 64, 256])], ids=anchors.SCHEMES
)
def test_whole_levels(scheme: str, counts: list[int]) -> None:
    assert anchors.closed(counts[-1], scheme) == counts
    assert anchors.closed(100, scheme) == [*counts[:4], 100]
    level = anchors.levels(counts[-1], scheme)
    assert [int((level <= i).sum()) for i in range(5)] == counts
    box = anchors.boxes(counts[-1], scheme)
    area = (box[:, 2:] - box[:, :2]).prod(1)
    for i in range(5):
        own = area[level == i]
        assert torch.equal(own, torch.full_like(own, 4.0**-i))
        # three quarters of the picture where the fourth child is left out
        assert own.sum() == (0.75 if scheme == "haar" and i else 1.0)


def test_what_haar_leaves_out_is_four_parents_less_three_children() -> None:
    x = torch.randn(1, 24 * 24, 3)
    haar = anchors.pooling(anchors.boxes(4, "haar"), 24, 24) @ x
    full = anchors.pooling(anchors.boxes(5, "quadtree"), 24, 24) @ x
    torch.testing.assert_close(4 * haar[:, 0] - haar[:, 1:].sum(1), full[:, 4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheme", anchors.SCHEMES)
def test_any_part_of_a_level_is_spread(scheme: str) -> None:
    """The first k boxes of level 3 lie in as many quarters, and sixteenths, as k boxes can."""
    level = anchors.levels(341, scheme)
    middle = anchors.centres(anchors.boxes(341, scheme)[level == 3])
    for side in (2, 4):
        cells = (middle * side).long()
        seen = (cells[:, 0] * side + cells[:, 1])[: side * side]
        assert len(set(seen.tolist())) == side * side


@given(SCHEMES, st.integers(1, 120), SIDES, SIDES)
@settings(deadline=None, max_examples=60)
def test_pooling_is_the_shared_area(scheme: str, count: int, height: int, width: int) -> None:
    box = anchors.boxes(count, scheme)
    weights = anchors.pooling(box, height, width)
    assert weights.shape == (count, height * width)
    torch.testing.assert_close(weights.sum(1), torch.ones(count), atol=1e-6, rtol=0)
    # by hand, for the last box
    y0, x0, y1, x1 = box[-1].tolist()
    for cell in {0, height * width // 2, height * width - 1}:
        row, column = divmod(cell, width)
        down = max(0.0, min(y1 * height, row + 1) - max(y0 * height, row))
        right = max(0.0, min(x1 * width, column + 1) - max(x0 * width, column))
        shared = down * right / ((y1 - y0) * height * (x1 - x0) * width)
        assert weights[-1, cell].item() == pytest.approx(shared, abs=1e-6)


def test_pooling_leaves_masked_cells_out() -> None:
    mask = torch.ones(2, 6, 8, dtype=torch.bool)
    mask[1, :, 4:] = False
    weights = anchors.pooling(anchors.boxes(5), 6, 8, mask.flatten(1))
    assert weights.shape == (2, 5, 48)
    assert torch.equal(weights[0], anchors.pooling(anchors.boxes(5), 6, 8))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5), atol=1e-6, rtol=0)
    assert not weights[1][:, ~mask[1].flatten()].any()
    # a box without a real cell averages all of them
    torch.testing.assert_close(weights[1, 2], weights[1, 0])


@given(SCHEMES, SIDES, SIDES, st.data())
@settings(deadline=None, max_examples=40)
def test_places_are_distinct_and_stay(scheme: str, height: int, width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(200, height * width)))
    places = anchors.places(count, height, width, scheme)
    assert len(set(places.tolist())) == count
    assert int(places.min()) >= 0 and int(places.max()) < height * width
    fewer = data.draw(st.integers(1, count))
    assert torch.equal(anchors.places(fewer, height, width, scheme), places[:fewer])


def test_places_lie_in_their_boxes() -> None:
    places = anchors.places(64, 24, 24, "haar")
    box = anchors.boxes(64, "haar") * 24
    row, column = (places // 24).float() + 0.5, (places % 24).float() + 0.5
    inside = (row >= box[:, 0]) & (row <= box[:, 2]) & (column >= box[:, 1]) & (column <= box[:, 3])
    assert inside.all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: anchors.boxes(0), "0 tokens cannot be anchored; ask for a whole number from 1 on"),
        (lambda: anchors.boxes(4, "octree"), "no scheme 'octree'.*quadtree, haar"),
        (lambda: anchors.pooling(anchors.boxes(1), 0, 3), "0 x 3 cells holds nothing"),
        (lambda: anchors.pooling(anchors.boxes(1), 2, 2, torch.ones(3).bool()), "3 cells does not fit"),
        (lambda: anchors.pooling(anchors.boxes(1), 2, 2, torch.zeros(4).bool()), "every cell.*masked out"),
        (lambda: anchors.places(10, 3, 3), "10 tokens do not fit a grid of 3 x 3"),
    ],
)
def test_errors_say_what_to_do(call, match: str) -> None:
    with pytest.raises(VtokError, match=match):
        call()
