"""The table of pairs in docs/export.md: what becomes a graph, what does not and why.

``python -m tests.vtok.export.test_pairs`` prints it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vtok
from vtok.errors import VtokError
from vtok.export.vision import FAMILIES, vision_graph

from ...conftest import METHODS, SHARED, settings
from ...models import inputs

PAGE = Path(__file__).parents[3] / "docs" / "export.md"


@torch.no_grad()
def pair(method: str, family: str) -> str:
    """``"✓"``, ``"`--fixed`"``, the reason of a refusal, or ``"-"`` where vtok refuses the pair anywhere."""
    if method not in vtok.methods(family):
        return "-"
    model: Any = SHARED(family)
    batch = inputs(family, model, [[5, "image", 4]])
    reasons = []
    for fixed in (False, True):
        try:
            with vtok.compressed(model, method, **settings(method, family)):
                graph = vision_graph(model, batch, fixed=fixed)
                graph(batch["pixel_values"].reshape(1, *graph.plan.pixel_shape))
        except VtokError as error:
            reasons.append(re.sub(rf"^{method}\b", "the method", str(error)))
            continue
        return "`--fixed`" if fixed else "✓"
    return reasons[-1]


def table() -> str:
    reasons: list[str] = []
    lines = [f"| | hf | {' | '.join(f'`{family}`' for family in FAMILIES)} |", "|---" * (len(FAMILIES) + 2) + "|"]
    for method in sorted(METHODS):
        cells = []
        for family in FAMILIES:
            cell = pair(method, family)
            if len(cell) > 10:
                if cell not in reasons:
                    reasons.append(cell)
                cell = f"- ({reasons.index(cell) + 1})"
            cells.append(cell)
        lines.append(f"| `{method}` | ✓ | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def test_the_table_of_pairs_is_right(tiny: Any) -> None:
    if not PAGE.is_file():
        pytest.fail("docs/export.md is missing")
    made = table()
    assert made in PAGE.read_text(encoding="utf-8"), f"paste this into docs/export.md:\n\n{made}"


if __name__ == "__main__":
    print(table())  # noqa: T201
