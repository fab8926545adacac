"""``quality.png``: what a tokenizer's prefixes are worth, and what each of its positions says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtok_eval.render.figures import INK, RC, SOFT, axes_of, pyplot_of, save

#: one colour a set of pictures
COLOURS = ("#2f6fde", "#d9822b", "#3c9d6c", "#a04fc4")


def draw(report: Mapping[str, Any], path: Path) -> Path:
    """PSNR over the number of tokens, and each position's entropy, a line a set of pictures.

    Parameters
    ----------
    report : mapping
        As ``vtok.tokenizers.train.assess`` writes it.
    path : Path
        Of the PNG.

    Raises
    ------
    VtokError
        matplotlib is missing.
    """
    pyplot = pyplot_of()
    with pyplot.rc_context(RC):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.8, 3.6))
        for (name, found), colour in zip(report.items(), COLOURS, strict=False):
            rows = found["curve"]["rows"]
            left.plot([r["k"] for r in rows], [r["psnr"] for r in rows], color=colour, marker="o", ms=4, label=name)
            if (stats := found.get("statistics")) is not None:
                places = stats["positions"]
                at = [own["position"] + 1 for own in places]
                said = [own["entropy"] if own["channels"] is None else own["channels"] for own in places]
                right.plot(at, said, color=colour, marker="o", ms=2.5, lw=1.2, label=name)
        left.set_xscale("log", base=2)
        ticks = sorted({row["k"] for found in report.values() for row in found["curve"]["rows"]})
        left.set_xticks(ticks, [f"{k}" for k in ticks])
        left.minorticks_off()
        right.set_ylim(bottom=0)
        for axes, title, along in ((left, "PSNR, dB", "tokens"), (right, "entropy of the digits, bits", "position")):
            axes_of(axes)
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
            axes.set_xlabel(along, color=SOFT)
        left.legend(frameon=False, fontsize=8.5)
        figure.tight_layout()
        return save(pyplot, figure, path)
