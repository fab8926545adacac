"""Pictures to train and to measure with: a folder's, or a source's that another package registers."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from vtok.errors import VtokError
from vtok.photo import opened

logger = logging.getLogger("vtok")

GROUP = "vtok.pictures"
PARTS = ("train", "held-out", "all")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
#: sides of a training view's square, in shares of the largest square of the picture
SHARES = (0.6, 1.0)


@dataclass(frozen=True)
class Pictures:
    """Pictures by number.

    What a function under the entry-point group ``vtok.pictures`` returns, given a part (one of ``PARTS``) and a seed.
    Data loaders send it to other processes: ``picture`` and ``label`` must be picklable.

    Attributes
    ----------
    name : str
        For tables.
    picture : callable
        number -> RGB picture, the same every time. Raises ``VtokError`` where it cannot be read.
    count : int or None
        How many there are; ``None``: drawn on demand, without an end.
    label : callable
        number -> what it is called: a file's path in its folder, for instance.
    """

    name: str
    picture: Callable[[int], Image.Image]
    count: int | None = None
    label: Callable[[int], str] = str

    def __len__(self) -> int:
        if self.count is None:
            raise VtokError(f"{self.name} has no end; say how many of its pictures to take (--limit)")
        return self.count

    def readable(self, limit: int | None = None) -> Iterator[tuple[str, Image.Image | str]]:
        """Label and picture, or the reason why there is none, in order.

        Parameters
        ----------
        limit : int, optional
            At most so many.
        """
        for number in range(len(self) if limit is None else min(limit, self.count or limit)):
            try:
                yield self.label(number), self.picture(number)
            except VtokError as error:
                yield self.label(number), str(error)


def sources() -> dict[str, EntryPoint]:
    """What is registered under ``vtok.pictures``, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def find(data: str | Path, part: str = "all", *, seed: int = 0, share: float = 0.05) -> Pictures:
    """A folder's pictures, a file, or those of a registered source.

    Parameters
    ----------
    data : str or Path
        A folder of PNG, JPEG or WebP files (searched with its sub-folders), one such file, or a registered name.
    part : str
        ``"train"``, ``"held-out"`` or ``"all"``. What a folder holds out depends on the files' names alone, so it is
        the same in every run.
    seed : int
        Of a source that draws.
    share : float
        Of a folder that is held out: one picture at least.

    Raises
    ------
    VtokError
        Neither a folder nor a source, or too few pictures in it.
    """
    if part not in PARTS:
        raise VtokError(f"there is no part {part!r} of a data set; take one of {', '.join(PARTS)}")
    path = Path(data)
    if path.is_file():
        return Pictures(path.name, partial(_opened, (path,)), 1, partial(_label, (path.name,)))
    if path.is_dir():
        return _folder(path, part, share)
    known = sources()
    if str(data) not in known:
        names = ", ".join(known) or "none (pip install vtok[eval] brings some)"
        raise VtokError(f"{data} is no folder of pictures; give one, or the name of a source: {names}")
    return known[str(data)].load()(part, seed)


def view(image: Image.Image, side: int, rng: random.Random | None = None, *, mirror: bool = False) -> Tensor:
    """A square of a picture as a tensor (3, side, side) in [0, 1].

    Parameters
    ----------
    image : PIL.Image
        Of any size.
    side : int
        Pixels.
    rng : random.Random, optional
        Draws where the square is and how large (``SHARES`` of the largest one); without it, it is the largest square in
        the middle.
    mirror : bool
        Every other view is mirrored.
    """
    image = image.convert("RGB")
    across = float(min(image.size))
    left, top = (image.width - across) / 2, (image.height - across) / 2
    if rng is not None:
        across *= rng.uniform(*SHARES)
        left, top = rng.uniform(0, image.width - across), rng.uniform(0, image.height - across)
    box = (left, top, left + across, top + across)
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    if mirror and rng is not None and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return pil_to_tensor(image).float() / 255


class Views(Dataset):
    """Batch number i of a seeded stream of views, (size, 3, side, side) in [0, 1].

    It depends on the seed and on i alone. A picture that cannot be read is named once and the next one takes its place.

    Parameters
    ----------
    pictures : Pictures
        Gone through in a new order each time where they have an end.
    side : int
        Pixels.
    size : int
        Views in a batch.
    steps : int
        Batches in the stream.
    seed : int
        Of orders and views.
    views : int
        Of each picture, in the same batch: less work where drawing a picture costs more than cutting it.
    """

    def __init__(self, pictures: Pictures, side: int, size: int, steps: int, seed: int = 0, views: int = 1) -> None:
        if size < 1 or views < 1 or size % views:
            raise VtokError(f"a batch of {size} cannot hold {views} views of each picture; give a multiple of {views}")
        self.pictures, self.side, self.size, self.steps = pictures, side, size, steps
        self.seed, self.views = seed, views
        self._named: set[int] = set()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        rng = random.Random(f"views/{self.seed}/{step}")
        each = self.size // self.views
        mirror = self.pictures.count is not None  # what is drawn without an end is varied enough, and has letters in it
        found = []
        for place in range(step * each, (step + 1) * each):
            image = self._picture(place)
            found += [view(image, self.side, rng, mirror=mirror) for _ in range(self.views)]
        return torch.stack(found)

    def _picture(self, place: int) -> Image.Image:
        count = self.pictures.count
        if count is None:
            return self.pictures.picture(place)
        for after in range(count):
            turn, position = divmod(place + after, count)
            number = _order(count, f"{self.seed}/{turn}")[position]
            try:
                return self.pictures.picture(number)
            except VtokError as error:
                if number not in self._named:
                    self._named.add(number)
                    logger.warning("vtok: %s is left out: %s", self.pictures.label(number), error)
        raise VtokError(f"none of the {count} pictures of {self.pictures.name} can be read; look at the files")


@lru_cache(maxsize=2)
def _order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(f"order/{seed}").shuffle(order)
    return order


def _folder(folder: Path, part: str, share: float) -> Pictures:
    if not 0 < share < 1:
        raise VtokError(f"a share of {share:g} cannot be held out; give one between 0 and 1, such as 0.05")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not names:
        raise VtokError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); give a folder that does")
    if part != "all":
        if len(names) < 2:
            raise VtokError(f"{folder} holds one picture, and one is held out to measure with; give a larger folder")
        by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        kept = set(by_hash[: max(1, round(share * len(names)))])
        names = [name for name in names if (name in kept) == (part == "held-out")]
    paths = tuple(folder / name for name in names)
    return Pictures(folder.name, partial(_opened, paths), len(names), partial(_label, tuple(names)))


def _opened(paths: tuple[Path, ...], number: int) -> Image.Image:
    return opened(paths[number])


def _label(names: tuple[str, ...], number: int) -> str:
    return names[number]
