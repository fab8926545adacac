"""``python -m vtok_eval.models.card NAME --results FOLDER``: a model card from what was measured, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.cli import alone
from vtok.errors import VtokError
from vtok_eval.harness.store import RESULTS
from vtok_eval.models.about import ABOUT
from vtok_eval.models.photographs import FILE
from vtok_eval.render.markdown import page_markdown, summary_markdown, table
from vtok_eval.render.results import Run

#: beside a card: results of its second run
BUDGETS = "budgets.json"

#: plots of a run, and what they show
PICTURES = {
    "curves.png": "Accuracy against visual tokens, task by task",
    "pareto.png": "Accuracy against the speed-up of the prefill",
}


def card(
    name: str,
    results: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    command: str,
    notes: str = "",
    pictures: Sequence[str] = (),
    budgets: Mapping[str, Any] | None = None,
    photographs: str = "",
) -> str:
    """The text of a model card.

    Parameters
    ----------
    name : str
        A key of ``ABOUT``.
    results : mapping
        ``results.json`` of ``vtok eval`` on this model, with its blank-image control.
    log : sequence of mapping
        Lines of the training log.
    command : str
        That trained it.
    notes : str
        How the shipped weights' training differed from what the command does, if it did.
    pictures : sequence of str
        Which of ``PICTURES`` lie beside the card.
    budgets : mapping, optional
        Results with more methods and budgets on fewer questions: what is told of compression is theirs.
    photographs : str
        What ``vtok_eval.models.photographs`` wrote.

    Raises
    ------
    VtokError
        Results of another model, or without plain model and control.
    """
    from vtok_eval import scenes

    entries = {entry["id"]: entry for entry in results["entries"]}
    measured = results["model"]["name"]
    if measured != name or "plain" not in entries or "blank" not in entries:
        raise VtokError(
            f"a card of {name} needs results of vtok eval --model {name} with its control, not of {measured}"
        )
    if budgets and budgets["model"]["name"] != name:
        raise VtokError(f"a card of {name} needs results of {name}, not of {budgets['model']['name']}")
    compressed = budgets or results
    plain, blank = entries["plain"], entries["blank"]
    rows = [_row(task["name"], plain["tasks"], blank["tasks"]) for task in results["tasks"]]
    rows.append(_row("all", {"all": plain["overall"]}, {"all": blank["overall"]}))
    stages = _stages(log)
    parts = [
        f"# {name}",
        ABOUT[name].layout,
        f"{results['model']['parameters']:,} parameters. The scenes that it was trained on are in no task.",
        "## Use",
        ABOUT[name].use.format(name=name, words=len(scenes.words()), concepts=len(scenes.CONCEPTS)),
        "## Accuracy",
        "Of the plain model, in percent. *unseen*: a picture style, and for text a font, that it was never trained on. "
        "*blank*: the same questions about a grey picture (seen style).",
        *([_made(results)] if budgets else []),
        "\n".join(table(["task", "samples", "seen", "unseen", "blank", "above blank"], rows)),
        "## Compressed",
        _made(compressed),
        *(f"![{says}]({file})" for file, says in PICTURES.items() if file in pictures),
        summary_markdown(compressed).rstrip(),
        "Every task at every budget: [tables.md](tables.md).",
        *(_photographs(name, photographs) if photographs else []),
        "## Training",
        f"`{command}`; the log is beside this card. Scenes are drawn on the fly: no picture comes twice.",
        *([notes.strip()] if notes.strip() else []),
        "\n".join(table(["stage", "batches", "last loss", "right at the end, %"], stages)),
        "## Licences",
        ABOUT[name].licences,
    ]
    return "\n\n".join(parts) + "\n"


def _photographs(name: str, answers: str) -> list[str]:
    says = "None of these was in any training; questions and answers, all of them: no choice was made."
    return ["## Photographs", f"{says} `python -m vtok_eval.models.photographs {name}`", answers.strip()]


def _made(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return (
        f"`{results['command']}` on {machine['device']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}."
    )


def _row(name: str, plain: Mapping[str, Any], blank: Mapping[str, Any]) -> list[str]:
    own, control = plain[name], blank[name]
    groups = own.get("groups") or {}
    unseen = groups.get("unseen", {}).get("accuracy")
    percent = lambda value: "" if value is None else f"{100 * value:.1f}"  # noqa: E731
    accuracy = groups.get("seen", {}).get("accuracy", own["accuracy"])
    grey = (control.get("groups") or {}).get("seen", {}).get("accuracy", control["accuracy"])
    return [name, str(own["n"]), percent(accuracy), percent(unseen), percent(grey), percent(accuracy - grey)]


def _stages(log: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    last: dict[str, Mapping[str, Any]] = {}
    for line in log:
        if "step" in line:
            last[line["stage"]] = line
    skip = {"stage", "step", "seconds", "loss", "distance", "present"}
    rows = []
    for stage, line in last.items():
        right = ", ".join(f"{key} {100 * value:.0f}" for key, value in line.items() if key not in skip)
        rows.append([stage, str(line["step"]), f"{line['loss']:.3f}", right])
    return rows


def command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(ABOUT)}.")],
    results: Annotated[Path, typer.Option(help="Folder that vtok eval wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of cards.")] = Path("model_cards"),
    budgets: Annotated[
        Path | None, typer.Option(help="Folder of a second run, with more methods and budgets on fewer questions.")
    ] = None,
) -> None:
    """Write README.md, tables.md and results.json (and budgets.json) in out/NAME: from a run's results, and the
    training.jsonl and training.md that lie there."""
    if name not in ABOUT:
        raise VtokError(f"there is no card for {name!r}; known are {', '.join(ABOUT)}")
    folder = out / name
    measured = (results / RESULTS).read_text(encoding="utf-8")
    found = json.loads(measured)
    source = (budgets or results) / (BUDGETS if budgets and (budgets / BUDGETS).is_file() else RESULTS)
    compressed = source.read_text(encoding="utf-8")
    log = folder / "training.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    notes, photographs = folder / "training.md", folder / FILE
    pictures = [file for file in PICTURES if (source.parent / file).is_file()]
    for file in pictures:
        (folder / file).write_bytes((source.parent / file).read_bytes())
    text = card(
        name,
        found,
        lines,
        f"python -m vtok_eval.train {name}",
        notes.read_text(encoding="utf-8") if notes.is_file() else "",
        pictures,
        json.loads(compressed) if budgets else None,
        photographs.read_text(encoding="utf-8") if photographs.is_file() else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "tables.md").write_text(page_markdown(Run(json.loads(compressed))), encoding="utf-8")
    (folder / RESULTS).write_text(measured, encoding="utf-8")
    if budgets:
        (folder / BUDGETS).write_text(compressed, encoding="utf-8")
    typer.echo(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    alone(command)
