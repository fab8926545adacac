"""The results of a run as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 150
COUNTS = ("keep", "average", "MACs", "accuracy", "retained", "hard", "p plain", "p random")
TIMES = ("prefill ms", "speed-up", "of ceiling", "MB")

MADE = ("results.json", "samples.jsonl", "report.html", "results.md", "pareto.png")


def show(results: Mapping[str, Any], out: Path, console: Console | None = None) -> None:
    """Print one row per entry and what there is to say about them."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    model, tasks = results["model"], results["tasks"]
    asked = sum(task["samples"] for task in tasks)
    title = (
        f"{model['name']}: {asked} questions of {len(tasks)} tasks, {model['tokens_per_image']:.0f} tokens a picture"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in (*COUNTS, *TIMES):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in results["entries"]:
        if entry["status"] != "refused":
            table.add_row(*_row(entry), style="bold" if entry["method"] is None else None)
    console.print(table)
    for note, ids in _notes(results).items():
        console.print(f"{', '.join(ids)}: {note}", highlight=False)
    if results["problems"]:
        console.print(f"{len(results['problems'])} problems, listed in {out / 'results.json'}", highlight=False)
    made = [name for name in MADE if (out / name).is_file()]
    console.print(f"wrote {', '.join(str(out / name) for name in made)}", highlight=False)


def _notes(results: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in results["entries"]:
        if entry["note"]:
            note = f"refused, {entry['note']}" if entry["status"] == "refused" else entry["note"]
            found.setdefault(note, []).append(entry["id"])
    return found


def _row(entry: Mapping[str, Any]) -> list[str]:
    counts, score, timing = entry["counts"], entry["overall"], entry["timing"] or {}
    interval = f"{_percent(score['accuracy'])} ({_percent(score['ci'][0])} {_percent(score['ci'][1])})"
    return [
        entry["method"] or entry["id"],
        "" if entry["keep"] is None else f"{entry['keep']:g}" + ("*" if entry["status"] == "raised" else ""),
        f"{counts['average_tokens']:.1f}",
        f"{counts['mac_ratio']:.3f}",
        interval,
        _percent(score["retention"]),
        _percent((score["hard"] or {}).get("accuracy")),
        _probability(score["p_plain"]),
        _probability(score["p_random"]),
        _number((timing.get("prefill") or {}).get("median"), ".0f"),
        _number((timing.get("speedup") or {}).get("median"), ".2f"),
        _number((timing.get("share") or {}).get("median"), ".2f"),
        _number(entry["peak_mb"], ".0f"),
    ]


def _percent(value: float | None) -> str:
    return "" if value is None or value != value else f"{100 * value:.1f}"


def _probability(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else _number(value, ".3f")


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"
