"""What ``vtok tune`` found, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 120
LISTED = 12


def show(found: Mapping[str, Any], out: Path, console: Console | None = None) -> None:
    """The choice, how sure it is, what else was tried, and how to apply it."""
    console = console or Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    best, held, searched = found["best"], found["held_out"], found["searched"]
    if searched["trials"]:
        console.print(_tried(found))
    verdict = "met" if found["met"] else "not met"
    console.print(f"target {found['target']}: {verdict}", style="bold" if found["met"] else "bold red", highlight=False)
    console.print(f"{'choice' if found['met'] else 'best found'}: {best['id']}", highlight=False)
    for line in _sure(found):
        console.print(f"  {line}", highlight=False)
    for line in filter(None, (best["why"], found["needed"])):
        console.print(f"  {line}", highlight=False)
    console.print(
        f"searched {searched['variants']} variants with {searched['answers']} answers "
        f"({searched['answers_now']} of them now; the full grid has {searched['full_grid']})",
        highlight=False,
    )
    if held["note"]:
        console.print(held["note"], highlight=False)
    if found["problems"]:
        console.print(f"{len(found['problems'])} answers failed; they are listed in {out / 'tune.json'}")
    console.print(f"wrote {', '.join(filter(None, (found['config'], str(out / 'tune.json'))))}", highlight=False)
    if found["config"]:
        console.print("apply it to the plain model:\n", highlight=False)
        for line in found["python"]:
            console.print(f"    {line}", highlight=False)
    elif not found["met"]:
        console.print("no vtok_config.json was written; --best-effort writes the best found", highlight=False)


def _sure(found: Mapping[str, Any]) -> list[str]:
    held, cost = found["held_out"], found["held_out"]["cost"]
    accuracy, retention = held["accuracy"], held["retention"]
    faster = ""
    if cost["speedup"] is not None:
        faster = f", prefill {cost['speedup']:.2f}x as fast {_span(cost['speedup_ci'], 1)}"
    lines = [
        f"accuracy {_percent(accuracy['value'])} {_span(accuracy['ci'])} against {_percent(held['plain_accuracy'])} "
        f"of the plain model: {_percent(retention['value'])} retained {_span(retention['ci'])}",
        f"{cost['tokens']:.1f} tokens a picture, MAC ratio {cost['macs']:.3f}{faster}",
        f"the target holds with probability {held['probability']:.2f}, by {held['questions']} held-out questions; "
        "they had no part in the choice, so these numbers are not flattered by it; intervals: 95%, paired bootstrap",
    ]
    if found["met"] and not found["sure"]:
        wanted = found["calibration"]["confidence"]
        lines.append(f"that is less sure than {wanted:g}: more questions or a higher --confidence make it surer")
    return lines


def _tried(found: Mapping[str, Any]) -> Table:
    """The trials that got furthest, on calibration questions."""
    lines = found["searched"]["trials"]
    latest = {line["id"]: line for line in lines}  # the last of each has the most questions
    order = sorted(
        latest.values(), key=lambda line: (-line["questions"], -(line["probability"] or 0), -line["accuracy"])
    )
    title = f"{found['model']['name']}: the {min(LISTED, len(order))} of {len(order)} configurations asked the most"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("questions", "accuracy", "retained", "P(target)", "tokens", "MACs", "speed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in order[:LISTED]:
        cost = line["cost"] or {}
        table.add_row(
            line["id"],
            str(line["questions"]),
            _percent(line["accuracy"]),
            _percent(line["retention"]),
            _number(line["probability"], ".2f"),
            _number(cost.get("tokens"), ".1f"),
            _number(cost.get("macs"), ".3f"),
            _number(cost.get("speedup"), ".2f"),
            style="bold" if line["id"] == found["best"]["id"] else None,
        )
    return table


def _rank(line: Mapping[str, Any]) -> tuple[float, ...]:
    return (-line["questions"], -(line["probability"] or 0), -line["accuracy"])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"


def _span(ends: Any, scale: int = 100) -> str:
    if not ends or None in ends:
        return ""
    digits = 1 if scale == 100 else 2
    return f"({scale * ends[0]:.{digits}f} to {scale * ends[1]:.{digits}f})"
