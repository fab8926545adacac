"""Kept tokens as hex: one bit a token, so that a line of ``samples.jsonl`` stays short."""

from __future__ import annotations

from collections.abc import Iterable

from vtok.errors import VtokError


def pack(indices: Iterable[int], n: int) -> str:
    """Indices of kept tokens as a hex string.

    Parameters
    ----------
    indices : iterable of int
        Within ``[0, n)``.
    n : int
        Tokens of the image.

    Returns
    -------
    str
        ``ceil(n / 8)`` bytes; token ``i`` is bit ``i % 8`` of byte ``i // 8``.
    """
    mask = bytearray(-(-n // 8))
    for index in indices:
        if not 0 <= index < n:
            raise VtokError(f"token {index} lies outside of an image of {n} tokens")
        mask[index >> 3] |= 1 << (index & 7)
    return mask.hex()


def unpack(mask: str, n: int) -> list[int]:
    """Indices that ``pack`` wrote, ascending.

    Raises
    ------
    VtokError
        The string is no such mask of ``n`` tokens.
    """
    try:
        raw = bytes.fromhex(mask)
    except ValueError:
        raise VtokError(f"{mask[:20]!r} is no hex mask of kept tokens") from None
    if len(raw) != -(-n // 8):
        raise VtokError(f"a mask of {len(raw)} bytes does not fit an image of {n} tokens")
    return [i for i in range(n) if raw[i >> 3] >> (i & 7) & 1]


def count(mask: str) -> int:
    """How many tokens a mask keeps."""
    return int(mask or "0", 16).bit_count()
