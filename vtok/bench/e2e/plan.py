"""Which models, pictures, batches and budgets, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtok.errors import VtokError

PICTURES = {"llava-next-7b": ("672x672",), "qwen2_5_vl-7b": ("1008x1008", "2016x2016")}
"""Four tiles and the whole: 2928 tokens with newlines; 1 and 4 megapixels: 1296 and 5184 tokens. Else one tile."""
KEEPS: dict[str, tuple[int | float, ...]] = {"llava-next-7b": (160, 320, 640), "qwen2_5_vl-7b": (0.11, 0.22)}
"""The field's budgets, smallest first, as shares where the picture's size is free."""
MODELS = ("llava-1.5-7b", "llava-next-7b", "qwen2_5_vl-7b")


@dataclass(frozen=True)
class Cell:
    """One contest.

    Attributes
    ----------
    model : str
        A geometry, or a folder with a model.
    picture : str
        Width and height in pixels.
    batch : int
        Copies of the sample.
    keep : int or float
        The budget.
    graphs : bool
        Decoding is timed as a CUDA graph, too: once for a model, picture and batch, at its smallest budget.
    """

    model: str
    picture: str
    batch: int
    keep: int | float
    graphs: bool = False

    @property
    def title(self) -> str:
        """The cell in a line."""
        return f"{self.model}  {self.picture}  batch {self.batch}  keep {self.keep:g}"


def cells(
    models: Sequence[str] = MODELS,
    batches: Sequence[int] = (1, 8),
    keeps: Sequence[int | float] | None = None,
    pictures: Sequence[str] | None = None,
    graphs: bool = True,
) -> list[Cell]:
    """All contests, a model after the other; of each the small pictures first, then the small budgets and batches.

    What is dear and last is what a time limit leaves out.
    """
    if not models or not batches or min(batches) < 1:
        raise VtokError("there must be a model, and batches of at least 1")
    found = []
    for model in models:
        for picture in pictures or PICTURES.get(model, ("672x504",)):
            budgets = tuple(keeps or KEEPS.get(model, (64, 128, 192)))
            for turn, keep in enumerate(budgets):
                found += [Cell(model, picture, batch, keep, graphs and turn == 0) for batch in batches]
    return found
