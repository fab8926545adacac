"""The next token of each sample from its logits."""

from __future__ import annotations

import numpy as np

from vtok.errors import VtokError


class Sampler:
    """Greedy, or drawn at a temperature from the likeliest tokens.

    Parameters
    ----------
    temperature : float
        0: greedy, the first of equal logits.
    top_k : int, optional
        Draw from so many tokens.
    top_p : float
        Draw from the smallest set of tokens whose probabilities reach this sum (arXiv 1904.09751).
    seed : int
        Of the draws. Sample i of a batch draws as it would alone with ``seed + i``.

    Raises
    ------
    VtokError
        Values out of range.
    """

    def __init__(self, temperature: float = 0.0, top_k: int | None = None, top_p: float = 1.0, seed: int = 0) -> None:
        if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
            raise VtokError(
                f"temperature={temperature}, top_k={top_k}, top_p={top_p}: a temperature is 0 or more, top_k at least "
                "1, top_p in (0, 1]"
            )
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self._draws: list[np.random.Generator] = []

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """(B, V) logits to (B,) int64 tokens."""
        if self.temperature == 0:
            return logits.argmax(-1).astype(np.int64)
        while len(self._draws) < len(logits):
            self._draws.append(np.random.default_rng(self.seed + len(self._draws)))
        return np.array([self._draw(row, place) for place, row in enumerate(logits)], np.int64)

    def _draw(self, row: np.ndarray, place: int) -> int:
        scaled = row.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")[: self.top_k]
        chances = np.exp(scaled[order] - scaled[order[0]])
        chances /= chances.sum()
        # the token that crosses the sum is still in
        last = int(np.searchsorted(chances.cumsum(), self.top_p)) + 1
        chances = chances[:last] / chances[:last].sum()
        return int(order[self._draws[place].choice(len(chances), p=chances)])
