"""Do the methods reach what they have to on whole models?"""

from __future__ import annotations

from collections.abc import Sequence

from vtok.bench.contest import Row
from vtok.bench.e2e.run import Outcome
from vtok.bench.verdicts import Verdict

SEVENS = ("llava-1.5-7b", "llava-next-7b", "qwen2_5_vl-7b")


def verdicts(outcomes: Sequence[Outcome], kind: str) -> list[Verdict]:
    """One verdict a contest and bar, for the method that is worst at it: of the 7B geometries on a GPU, of the half
    billion at 64 tokens on a CPU."""
    found: list[Verdict] = []
    for outcome in outcomes:
        rows = [row for row in outcome.rows if row.role == "method" and row.times]
        small = kind == "cpu" and outcome.cell.model == "llava-0.5b" and outcome.cell.keep == 64
        if not rows or not (small or (kind == "cuda" and outcome.cell.model in SEVENS)):
            continue
        part, shares = (0.03, (0.95, 0.95)) if small else (0.01, (0.98, 0.95))
        found += _worst(outcome, [(row, selection(outcome, row)) for row in rows], part, "of the plain prefill", True)
        for early, share in zip((True, False), shares, strict=True):
            same = [(row, row.share.median if row.share else None) for row in rows if _at_input(row) == early]
            sites = "at the input" if early else "in the tower or decoder"
            found += _worst(outcome, same, share, f"of random pruning's speed, {sites}", False)
        plain = outcome.plain
        if plain is not None and plain.peak_mb and not small:
            peaks = [(row, row.peak_mb / plain.peak_mb) for row in rows]
            found += _worst(outcome, peaks, 1.0, "of plain's peak", True)
    return found


def selection(outcome: Outcome, row: Row) -> float | None:
    """A method's choosing over the plain prefill: timed where it stands apart; inside a tower, what the method takes
    longer than random pruning there."""
    inside = any(site == "encoder" for site, _, _ in row.stage_tokens)
    spread = outcome.overhead(row) if inside else outcome.share_of_plain(row)
    return None if spread is None else max(0.0, spread.median)


def _worst(
    outcome: Outcome, figures: Sequence[tuple[Row, float | None]], limit: float, measure: str, at_most: bool
) -> list[Verdict]:
    known = [(figure, row.name) for row, figure in figures if figure is not None]
    if not known:
        return []
    figure, name = (max if at_most else min)(known, key=lambda own: own[0])
    return [Verdict(f"{outcome.cell.title}: {name}", measure, figure, limit, at_most)]


def _at_input(row: Row) -> bool:
    return all(site == "input" for site, _, _ in row.stage_tokens)
