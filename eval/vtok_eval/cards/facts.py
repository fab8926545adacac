"""What a card is made of, as it is committed beside it: ``card.json`` of the exports, ``results.json`` of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtok.errors import VtokError
from vtok.export.manifest import Manifest
from vtok_eval.render.results import Entry, Run

CARD, RESULTS, PICTURE, README = "card.json", "results.json", "kept.png", "README.md"


@dataclass(frozen=True)
class Facts:
    """Everything that a card says.

    Attributes
    ----------
    name : str
        Of the card.
    source : mapping
        The model that was compressed, as the manifests have it.
    exports : sequence of mapping
        One for each folder: ``folder``, ``megabytes``, and of its manifest all but the list of files.
    results : mapping or None
        ``results.json`` of ``vtok eval``, its entries cut down to the plain model and what was exported.
    licence : str
        Identifier for the front matter.
    licences, about : str
        Paragraphs.
    picture : str
        What the picture shows; empty without one.
    """

    name: str
    source: Mapping[str, Any]
    exports: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any] | None = None
    licence: str = "other"
    licences: str = ""
    about: str = ""
    picture: str = ""

    def write(self, folder: Path) -> None:
        """``card.json`` and ``results.json``."""
        record = asdict(self)
        results = record.pop("results")
        (folder / CARD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if results is not None:
            (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Facts:
    """What ``Facts.write`` wrote.

    Raises
    ------
    VtokError
        A file is missing or damaged.
    """
    try:
        record = json.loads((folder / CARD).read_text(encoding="utf-8"))
        results = folder / RESULTS
        found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
        return Facts(**record, results=found)
    except (OSError, ValueError, TypeError) as error:
        raise VtokError(f"{folder} holds no readable {CARD} ({error}); write the card again with vtok card") from error


def compressions(facts: Facts) -> list[dict[str, Any]]:
    """Distinct settings of the exports, in their order."""
    found: list[dict[str, Any]] = []
    for export in facts.exports:
        if export["compression"] not in found:
            found.append(dict(export["compression"]))
    return found


def label(compression: Mapping[str, Any]) -> str:
    """``"divprune+fastv"``."""
    return "+".join(method["name"] for method in compression["methods"])


def options(compression: Mapping[str, Any]) -> dict[str, Any]:
    """Options that differ from their defaults, named as in ``results.json``."""
    methods = compression["methods"]
    return {
        f"{method['name']}.{key}" if len(methods) > 1 else key: value
        for method in methods
        for key, value in method["options"].items()
    }


def entry_of(run: Run, compression: Mapping[str, Any]) -> Entry | None:
    """The entry of a run with a compression's method, options and budget."""
    for entry in run.compressed:
        same = json.dumps(entry.raw.get("options") or {}, sort_keys=True) == json.dumps(
            options(compression), sort_keys=True
        )
        if entry.method == label(compression) and entry.keep == compression["keep"] and same:
            return entry
    return None


def exported(folder: Path, note: Manifest) -> dict[str, Any]:
    """The record of one export."""
    record = note.as_dict()
    files = record.pop("files")
    megabytes = round(sum(file["bytes"] for file in files.values()) / 1e6, 1)
    return {"folder": folder.name, "megabytes": megabytes, **record}


def chosen(run: Run, wanted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``results.json`` with the entries of a card only.

    Raises
    ------
    VtokError
        A compression was not evaluated; names the command that does it.
    """
    found = [entry_of(run, compression) for compression in wanted]
    missing = [compression for compression, entry in zip(wanted, found, strict=True) if entry is None]
    if missing:
        one = missing[0]
        raise VtokError(
            f"the results have no {label(one)} at keep={one['keep']} with the options of the export; run vtok eval "
            f"--model {run.model.get('name')} --method {label(one)} --keep {one['keep']} into the same folder first"
        )
    ids = {entry.id for entry in (run.plain, run.blank, *found) if entry is not None}
    results = {key: value for key, value in run.results.items() if key != "problems"}
    return {**results, "entries": [raw for raw in run.results["entries"] if raw["id"] in ids]}
