"""Masks of kept tokens."""

from __future__ import annotations

import random

import pytest

from vtok.errors import VtokError
from vtok_eval.harness import bits


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 576, 577])
def test_pack_and_unpack(n: int) -> None:
    kept = sorted(random.Random(n).sample(range(n), n // 3))
    mask = bits.pack(kept, n)
    assert len(mask) == 2 * -(-n // 8)
    assert bits.unpack(mask, n) == kept
    assert bits.count(mask) == len(kept)


def test_bit_order() -> None:
    assert bits.pack([0, 9], 16) == "0102"


def test_wrong_masks() -> None:
    with pytest.raises(VtokError, match="outside of an image of 4 tokens"):
        bits.pack([4], 4)
    with pytest.raises(VtokError, match="does not fit an image of 20 tokens"):
        bits.unpack("ffff", 20)
    with pytest.raises(VtokError, match="no hex mask"):
        bits.unpack("xyz", 20)
