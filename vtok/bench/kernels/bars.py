"""Do the operators reach what they have to?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtok.bench.kernels.case import Bar
from vtok.bench.kernels.run import Outcome, Row
from vtok.bench.verdicts import Verdict

WORDS = {
    "ms": "milliseconds",
    "share": "share of the device's limit",
    "speedup": "times faster than the textbook",
    "yardstick": "times as long as the {}",
    "memory": "times the memory at twice the tokens",
}


def verdicts(outcomes: Sequence[Outcome], setting: dict[str, Any]) -> list[Verdict]:
    """Every bar that counts on this device, for the backend that serves there."""
    name = f"{setting['device']} {setting['kind']}".lower()
    found = []
    for outcome in outcomes:
        rows = outcome.rows
        row = next((row for row in rows if row.chosen and row.times), None)
        if row is None:
            continue
        yardstick = next((other.note for other in rows if other.backend == "yardstick"), "")
        for bar in outcome.bars:
            value = _value(row, bar)
            if bar.device.lower() in name and value is not None:
                what = f"{row.operator} {row.size} {row.dtype} ({row.backend})"
                measure = WORDS[bar.measure].format(yardstick)
                found.append(Verdict(what, measure, value, bar.limit, bar.at_most))
    return found + _memory([row for outcome in outcomes for row in outcome.rows])


def _value(row: Row, bar: Bar) -> float | None:
    if bar.measure == "ms":
        return row.ms.median if row.ms else None
    if bar.measure == "share":
        return row.share
    ratio = row.speedup.get("textbook" if bar.measure == "speedup" else "yardstick")
    if ratio is None:
        return None
    return ratio.median if bar.measure == "speedup" else 1 / ratio.median


def _memory(rows: Sequence[Row]) -> list[Verdict]:
    """Matching takes memory that grows with the tokens, not with their square."""
    peaks = {
        (row.size.split()[1], row.dtype): row
        for row in rows
        if row.operator == "match_tokens" and row.chosen and row.peak_mb
    }
    found = []
    for (n, dtype), row in peaks.items():
        twice = peaks.get(("N5760", dtype))
        if n == "N2880" and twice is not None:
            ratio = (twice.peak_mb or 0.0) / (row.peak_mb or 1.0)
            what = f"match_tokens {n} to N5760 {dtype} ({row.backend})"
            found.append(Verdict(what, WORDS["memory"], ratio, 2.5, at_most=True))
    return found
