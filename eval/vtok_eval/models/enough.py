"""What ``keep="auto"`` gives: how many tokens pictures get at each quality, and how often the answer stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtok.errors import VtokError
from vtok_eval.harness import store
from vtok_eval.harness.bits import count
from vtok_eval.render.markdown import table
from vtok_eval.render.results import read
from vtok_eval.render.words import percent, tokens


def measured(folder: Path) -> list[dict[str, Any]]:
    """Of a run on rows with ``auto``, the lowest quality first.

    Returns
    -------
    list of dict
        ``quality``; ``tokens``, ``least`` and ``most`` of a picture; ``accuracy``; ``same``, the share of answers that
        are the plain model's; ``by_task``, a task's mean tokens.

    Raises
    ------
    VtokError
        No row of the run has ``auto``.
    """
    run = read(folder)
    rows = {entry.id: entry for entry in run.compressed if (entry.raw.get("options") or {}).get("auto") is not None}
    if not rows:
        raise VtokError(f"{folder} has no row with auto; run vtok eval with -o NAME.auto=0.8")
    lines = [line for line in store.read(folder / store.SAMPLES) if not line.get("error")]
    plain = {(line["task"], line["sample"]): line["answer"] for line in lines if line["entry"] == "plain"}
    found = []
    for name, entry in rows.items():
        own = [line for line in lines if line["entry"] == name]
        kept = [(line["task"], count(mask)) for line in own for mask in line["kept"]]
        sizes = [size for _, size in kept]
        tasks = {task: [size for name, size in kept if name == task] for task in run.task_names}
        same = [line["answer"] == plain[line["task"], line["sample"]] for line in own]
        found.append(
            {
                "quality": entry.raw["options"]["auto"],
                "tokens": sum(sizes) / len(sizes),
                "least": min(sizes),
                "most": max(sizes),
                "accuracy": entry.accuracy(),
                "same": sum(same) / len(same),
                "by_task": {task: sum(x) / len(x) for task, x in tasks.items() if x},
            }
        )
    return sorted(found, key=lambda row: row["quality"])


def section(rows: Sequence[Mapping[str, Any]], command: str) -> list[str]:
    """Paragraphs of a card."""
    heads = ["quality", "tokens of a picture", "from", "to", "answers as without compression, %", "accuracy, %"]
    cells = [
        [f"{row['quality']:g}", tokens(row["tokens"]), f"{row['least']}", f"{row['most']}", percent(row["same"]),
         percent(row["accuracy"])]
        for row in rows
    ]  # fmt: skip
    extremes = []
    for row in rows[-2:-1] or rows:
        own = sorted(row["by_task"].items(), key=lambda item: item[1])
        extremes.append(
            f"At {row['quality']:g} pictures of {own[0][0]} get the fewest, {tokens(own[0][1])} on average, those of "
            f"{own[-1][0]} the most, {tokens(own[-1][1])}."
        )
    return [
        "## As many as it takes",
        f'`keep="auto"`, and `auto` for another quality than 0.8. `{command}`.',
        "\n".join(table(heads, cells)),
        " ".join(extremes),
    ]
