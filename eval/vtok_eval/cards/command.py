"""``vtok card``: a model card from exported folders and the results of ``vtok eval``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.errors import VtokError
from vtok.export import manifest
from vtok.export.manifest import Manifest
from vtok_eval.cards.facts import PICTURE, README, Facts, chosen, compressions, exported, read
from vtok_eval.cards.proof import unproven
from vtok_eval.cards.text import render
from vtok_eval.render.results import Run
from vtok_eval.render.results import read as read_results


def command(
    out: Annotated[list[Path], typer.Argument(help="Folders that vtok export wrote, all of one model.")],
    results: Annotated[
        Path | None, typer.Option(help="Folder that vtok eval wrote about this model, with the same methods and keeps.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the card; the first folder's by default.")] = None,
    cards: Annotated[Path, typer.Option(help="Where cards are; this one gets a folder there.")] = Path("model_cards"),
    about: Annotated[Path | None, typer.Option(help="A file with a paragraph on the model.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the weights, as the hub names it.")] = None,
    picture: Annotated[bool, typer.Option(help="Draw what is kept of a picture.")] = True,
    update: Annotated[
        bool, typer.Option("--update", help="Exports in the card that is there stay, save those given now.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Write a model card: what was done, accuracy, speed, parity, limits, licences, all from files beside it."""
    from vtok.cli import _print_json, _quiet

    _quiet()
    options: dict[str, Any] = {"about": about, "licence": licence, "picture": picture, "update": update}
    folder = write(out, cards, results=results, name=name, **options)
    if as_json:
        _print_json({"card": str(folder / README), "files": sorted(path.name for path in folder.iterdir())})
    else:
        typer.echo(f"wrote {folder / README}")


def write(
    exports: list[Path],
    cards: Path = Path("model_cards"),
    *,
    results: Path | None = None,
    name: str | None = None,
    about: Path | None = None,
    licence: str | None = None,
    picture: bool = True,
    update: bool = False,
) -> Path:
    """The folder of a card, written.

    Parameters
    ----------
    exports : list of Path
        Folders of ``vtok export``, all of one model, with their parity checks.
    cards : Path
        Gets a folder of the card's name.
    results : Path, optional
        Folder of ``vtok eval``.
    name, about, licence, picture, update
        As in the command's help.

    Returns
    -------
    Path
        With ``README.md``, ``card.json``, ``results.json`` and ``kept.png``.

    Raises
    ------
    VtokError
        Folders of different models or without a parity check; results of another model or without these settings;
        no card to update.
    """
    notes = [(path, manifest.verify(path)) for path in exports]
    source = _one_model(notes)
    title = name or exports[0].absolute().name
    records: Sequence[Mapping[str, Any]] = [exported(path.absolute(), note) for path, note in notes]
    before = read(cards / title) if update else None
    if before is not None:
        records = _updated(before, source, records)
        licence = licence or before.licence
    facts = Facts(
        title,
        source,
        records,
        **_licence(str(source["name"]), licence),
        about=(before.about if before else "") if about is None else about.read_text(encoding="utf-8").strip(),
    )
    settings = compressions(facts)
    if results is not None:
        run = _measured(read_results(results), str(source["name"]))
        facts = dataclasses.replace(facts, results=chosen(run, settings))
    folder = cards / facts.name
    folder.mkdir(parents=True, exist_ok=True)
    if picture:
        from vtok_eval.cards.picture import kept

        drawn, said = kept(str(source["name"]), settings)
        drawn.save(folder / PICTURE)
        facts = dataclasses.replace(facts, picture=said)
    facts.write(folder)
    (folder / README).write_text(render(facts), encoding="utf-8")
    wrong = unproven(folder)
    if wrong:
        raise VtokError(f"{folder / README} says {', '.join(wrong)}, which is in none of the files beside it")
    return folder


def _updated(
    card: Facts, source: Mapping[str, object], records: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """A card's records with those of the same folders replaced, and new ones behind them."""
    if card.source != source:
        raise VtokError(f"the card {card.name} is about another model than these folders; give another --name")
    new = {str(record["folder"]): record for record in records}
    kept = [new.pop(str(record["folder"]), record) for record in card.exports]
    return [*kept, *new.values()]


def _one_model(notes: list[tuple[Path, Manifest]]) -> dict[str, object]:
    sources = [dict(note.source) for _, note in notes]
    other = next((path for (path, _), own in zip(notes, sources, strict=True) if own != sources[0]), None)
    if other is not None:
        raise VtokError(f"{other} was made of another model than {notes[0][0]}; a card is about one model")
    unchecked = next((path for path, note in notes if note.parity is None), None)
    if unchecked is not None:
        raise VtokError(f"{unchecked} has no parity check in its manifest; export it again")
    return sources[0]


def _measured(run: Run, name: str) -> Run:
    found = str(run.model.get("name"))
    if Path(found).name != Path(name).name or run.plain is None:
        raise VtokError(
            f"these results are of {found}{'' if run.plain else ' without the plain model'}; a card of {name} needs "
            f"those of vtok eval --model {name}"
        )
    return run


def _licence(name: str, licence: str | None) -> dict[str, Any]:
    from vtok_eval.models.about import ABOUT

    if Path(name).name in ABOUT:
        return {"licence": licence or "apache-2.0", "licences": ABOUT[Path(name).name].licences}
    return {"licence": licence or "other"}
