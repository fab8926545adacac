"""Numbers that others have printed, with where they stand: to lay beside our own, never to mix with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

RETENTION = "average retention"
"""The benchmark of rows that give a mean over benchmarks, in per cent of the plain model."""


@dataclass(frozen=True)
class Row:
    """One printed number.

    Attributes
    ----------
    method : str
        As vtok names it where vtok has it; ``+`` composes.
    model, benchmark : str
        As their page names them.
    keep : float
        Visual tokens, or a share below 1; whether that counts tokens at the decoder's input or over its layers differs
        from page to page.
    value : float
        In the benchmark's own unit.
    plain : float or None
        The uncompressed model's on the same page.
    source : str
        Short title; ``where`` says more.
    where, note : str
        Page and table; what to know about this row.
    """

    method: str
    model: str
    benchmark: str
    keep: float
    value: float
    plain: float | None
    source: str
    where: str
    note: str


def rows(
    model: str | None = None,
    method: str | None = None,
    benchmark: str | None = None,
    source: str | None = None,
) -> list[Row]:
    """Printed numbers, in the order of the data file; arguments left out match everything."""
    wanted = {"model": model, "method": method, "benchmark": benchmark, "source": source}
    return [row for row in _rows() if all(value in (None, getattr(row, key)) for key, value in wanted.items())]


def counterpart(family: str, tokens: float | None) -> str | None:
    """The published model whose geometry a model has: its family and, where that is fixed, its tokens per image."""
    for name, shape in _data()["models"].items():
        if shape["family"] == family and shape["tokens"] is not None and tokens == shape["tokens"]:
            return str(name)
    return None


@cache
def _data() -> Mapping[str, Any]:
    text = files("vtok_eval").joinpath("data", "published.json").read_text(encoding="utf-8")
    return json.loads(text)


@cache
def _rows() -> tuple[Row, ...]:
    sources = _data()["sources"]
    return tuple(
        Row(**{**row, "source": sources[row["source"]]["title"], "where": sources[row["source"]]["where"]})
        for row in _data()["rows"]
    )
