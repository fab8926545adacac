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

#: plots of a run, and what they show
PICTURES = {
    "curves.png": "Accuracy against visual tokens, task by task",
    "pareto.png": "Accuracy against the speed-up of the prefill",
}


def card(
    name: str,
    results: Mapping[str, Any] | None,
    log: Sequence[Mapping[str, Any]],
    command: str,
    notes: str = "",
    pictures: Sequence[str] = (),
    photographs: str = "",
) -> str:
    """The text of a model card.

    Parameters
    ----------
    name : str
        A key of ``ABOUT``.
    results : mapping, optional
        ``results.json`` of ``vtok eval`` on this model, with its blank-image control; without one the card is of a
        model in training.
    log : sequence of mapping
        Lines of the training log.
    command : str
        That trained it.
    notes : str
        How the shipped weights' training differed from what the command does, if it did.
    pictures : sequence of str
        Which of ``PICTURES`` lie beside the card.
    photographs : str
        What ``vtok_eval.models.photographs`` wrote.

    Raises
    ------
    VtokError
        Results of another model, or without plain model and control.
    """
    parts = [f"# {name}", ABOUT[name].layout]
    if results is not None:
        parts += _measured(name, results, pictures)
    if photographs:
        says = "None of these was in any training, and no answer was left out."
        parts += ["## Photographs", f"{says} `python -m vtok_eval.models.photographs {name}`", photographs.strip()]
    parts += [
        "## Training",
        f"`{command}`; the log is beside this card. Scenes are drawn on the fly: no picture comes twice.",
        *([notes.strip()] if notes.strip() else []),
        "\n".join(table(["stage", "batches", "last loss", "right at the end, %"], _stages(log))),
        "## Licences",
        ABOUT[name].licences,
    ]
    return "\n\n".join(parts) + "\n"


def _measured(name: str, results: Mapping[str, Any], pictures: Sequence[str]) -> list[str]:
    """Use, accuracy and compression: the parts of a model that is ready."""
    from vtok_eval import scenes

    entries = {entry["id"]: entry for entry in results["entries"]}
    measured = results["model"]["name"]
    if measured != name or "plain" not in entries or "blank" not in entries:
        raise VtokError(
            f"a card of {name} needs results of vtok eval --model {name} with its control, not of {measured}"
        )
    plain, blank = entries["plain"], entries["blank"]
    rows = [_row(task["name"], plain["tasks"], blank["tasks"]) for task in results["tasks"]]
    rows.append(_row("all", {"all": plain["overall"]}, {"all": blank["overall"]}))
    return [
        f"{results['model']['parameters']:,} parameters. The scenes that it was trained on are in no task.",
        "## Use",
        ABOUT[name].use.format(name=name, words=len(scenes.words()), concepts=len(scenes.CONCEPTS)),
        "## Accuracy",
        "Of the plain model, in percent. *unseen*: a picture style, and for text a font, that it was never trained on. "
        "*blank*: the same questions about a grey picture (seen style).",
        "\n".join(table(["task", "samples", "seen", "unseen", "blank", "above blank"], rows)),
        "## Compressed",
        f"`{results['command']}` on {results['machine']['device']}, torch {results['machine']['torch']}, "
        f"transformers {results['machine']['transformers']}.",
        *(f"![{says}]({file})" for file, says in PICTURES.items() if file in pictures),
        summary_markdown(results).rstrip(),
        "Every task at every budget: [tables.md](tables.md).",
    ]


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
    skip = {"stage", "step", "seconds", "loss", "distance", "present", "word", "loud"}
    rows = []
    for stage, line in last.items():
        right = ", ".join(f"{key} {100 * value:.0f}" for key, value in line.items() if key not in skip)
        rows.append([stage, str(line["step"]), f"{line['loss']:.3f}", right])
    return rows


def command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(ABOUT)}.")],
    results: Annotated[
        Path | None, typer.Option(help="Folder that vtok eval wrote; without one the model is in training.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of cards.")] = Path("model_cards"),
) -> None:
    """Write README.md, and of a run tables.md and results.json, in out/NAME: from the run's results, and the
    training.jsonl, training.md and photographs.md that lie there."""
    if name not in ABOUT:
        raise VtokError(f"there is no card for {name!r}; known are {', '.join(ABOUT)}")
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    found, pictures = None, []
    if results is not None:
        measured = (results / RESULTS).read_text(encoding="utf-8")
        found = json.loads(measured)
        pictures = [file for file in PICTURES if (results / file).is_file()]
    log = [json.loads(line) for line in _text(folder / "training.jsonl").splitlines()]
    notes, photographs = _text(folder / "training.md"), _text(folder / FILE)
    text = card(name, found, log, f"python -m vtok_eval.train {name}", notes, pictures, photographs)
    (folder / "README.md").write_text(text, encoding="utf-8")
    if results is not None and found is not None:
        for file in pictures:
            (folder / file).write_bytes((results / file).read_bytes())
        (folder / "tables.md").write_text(page_markdown(Run(found)), encoding="utf-8")
        (folder / RESULTS).write_text(measured, encoding="utf-8")
    typer.echo(f"wrote {folder / 'README.md'}")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    alone(command)
