"""Image features that questions and entries share: a picture goes through each tower once.

Methods that neither act in the vision tower nor read anything there see the plain model's features: one copy serves
them all, from under vtok's own wrapper of ``get_image_features``, so vtok notices nothing. The others have a copy of
their own, above that wrapper, with what vtok noted about the picture. Every picture is encoded alone, so what is
remembered depends on the picture only, never on its batch or on what ran before.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vtok.api import SESSION
from vtok.engine.language import STATE
from vtok.engine.spans import Encoding
from vtok.engine.towers import Wrapped
from vtok.protocol import Adapter
from vtok_eval.harness.cells import Entry

ALONE = ("llava", "qwen2_vl", "qwen2_5_vl")
"""Families whose pixels can be taken apart picture by picture; the others encode every batch."""
CAPACITY = 2**29
"""Bytes of features to remember: some 1400 copies of a picture of nano-llava, 100 of LLaVA-1.5-7B in half precision."""


@dataclass(frozen=True)
class _Kept:
    kind: type
    features: tuple[Tensor, ...]
    media: tuple[Any, ...]
    size: int


class Features:
    """What is remembered of pictures.

    Parameters
    ----------
    model : nn.Module
        Not compressed.
    adapter : Adapter
        Of the model.
    capacity : int
        Bytes; 0 turns it off.

    Attributes
    ----------
    hits, misses : int
        Pictures that were remembered, and that were encoded.
    """

    def __init__(self, model: Any, adapter: Adapter, capacity: int = CAPACITY) -> None:
        self.model, self.adapter = model, adapter
        self.capacity = capacity if adapter.family in ALONE else 0
        self.hits = self.misses = self.size = 0
        self._known: OrderedDict[Hashable, _Kept] = OrderedDict()

    @contextmanager
    def on(self, entry: Entry, pictures: Sequence[bytes]) -> Iterator[None]:
        """The model compressed as ``entry`` says, for calls with these pictures (identities, in order)."""
        if not self.capacity or not pictures:
            with entry.on(self.model):
                yield
        elif entry.shares_features:
            with self._wrapped(None, pictures), entry.on(self.model):
                yield
        else:
            with entry.on(self.model), self._wrapped(entry.id, pictures):
                yield

    @contextmanager
    def _wrapped(self, owner: str | None, pictures: Sequence[bytes]) -> Iterator[None]:
        wrapped = Wrapped(self.adapter.base, "get_image_features", partial(self._around, owner, pictures))
        try:
            yield
        finally:
            wrapped.remove()

    def _around(self, owner: str | None, pictures: Sequence[bytes], original: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        call = {**{key: value for key, value in bound.items() if key != "kwargs"}, **bound.get("kwargs", {})}
        parts = _apart(call, len(pictures))
        if parts is None:
            return original(*args, **kwargs)
        found = [self._recalled((owner, own), original, part) for own, part in zip(pictures, parts, strict=True)]
        output = found[0].kind(pooler_output=[tensor for own in found for tensor in own.features])
        if owner is not None:
            encoding = Encoding("image", [medium for own in found for medium in own.media])
            setattr(output, STATE, encoding)
            session = self.model.__dict__[SESSION]
            if session.language.call is not None:  # not from generate, which hands the output on
                session.language.call.encodings["image"] = encoding
        return output

    def _recalled(self, key: Hashable, original: Any, part: Mapping[str, Any]) -> _Kept:
        if key in self._known:
            self.hits += 1
            self._known.move_to_end(key)
            return self._known[key]
        self.misses += 1
        output = original(**part)
        features, encoding = tuple(output.pooler_output), getattr(output, STATE, None)
        media = () if encoding is None else tuple(encoding.media)
        tensors = tree_leaves([features, *(list(vars(medium).values()) for medium in media)])
        size = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
        kept = self._known[key] = _Kept(type(output), features, media, size)
        self.size += size
        while self.size > self.capacity and len(self._known) > 1:
            self.size -= self._known.popitem(last=False)[1].size
        return kept


def _apart(call: Mapping[str, Any], count: int) -> list[dict[str, Any]] | None:
    """The call of every picture alone; ``None`` where pictures and pixels do not line up."""
    pixels, grids = call["pixel_values"], call.get("image_grid_thw")
    if call.get("image_sizes") is not None or len(pixels if grids is None else grids) != count:
        return None
    if grids is None:
        return [{**call, "pixel_values": pixels[i : i + 1]} for i in range(count)]
    rows = torch.split(pixels, grids.prod(-1).tolist())
    return [{**call, "pixel_values": own, "image_grid_thw": grids[i : i + 1]} for i, own in enumerate(rows)]
