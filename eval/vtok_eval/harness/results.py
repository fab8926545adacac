"""Blocks of ``results.json``."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from typing import Any

import vtok
from vtok.bench.measure import machine
from vtok.protocol import Adapter
from vtok_eval.harness.cells import Entry
from vtok_eval.harness.score import Table
from vtok_eval.harness.timing import Times
from vtok_eval.samples import Task


def heading(schema: int, command: str, model: Any, adapter: Adapter, name: str) -> dict[str, Any]:
    """What every file of results begins with."""
    return {
        "schema": schema,
        "vtok": vtok.__version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "model": described_model(model, adapter, name),
        "machine": machine(model.device),
    }


def described_model(model: Any, adapter: Adapter, name: str) -> dict[str, Any]:
    """What was evaluated."""
    return {
        "name": name or str(getattr(model.config, "_name_or_path", "")) or type(model).__name__,
        "family": adapter.family,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": len(adapter.text.layers),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def described_task(task: Task) -> dict[str, Any]:
    """What was asked."""
    return {
        "name": task.name,
        "metric": task.metric,
        "samples": len(task.samples),
        "groups": dict(Counter(sample.group for sample in task.samples)),
        "source": task.source,
    }


def row(table: Table, entry: Entry, times: Times) -> dict[str, Any]:
    """An entry with all its numbers; one that was refused has none."""
    ran = entry.status != "refused"
    overall, tasks = table.scores(entry) if ran else (None, {})
    return {
        "id": entry.id,
        "method": entry.method,
        "options": entry.options,
        "keep": entry.keep,
        "budget": entry.budget,
        "status": entry.status,
        "note": table.note(entry),
        "stands_in_for": entry.stands_in_for,
        "counts": table.counts(entry) if ran else None,
        "timing": times.rows.get(entry.id),
        "peak_mb": times.peak.get(entry.id),
        "overall": overall,
        "tasks": tasks,
    }


def finite(value: Any) -> Any:
    """The same without NaN, which JSON does not know: ``None`` where there was nothing to measure."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
