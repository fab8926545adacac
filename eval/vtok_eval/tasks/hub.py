"""Tasks from data sets of the Hugging Face hub, where ``datasets`` is installed and the hub can be reached."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from vtok.errors import VtokError
from vtok_eval.samples import Sample, Task
from vtok_eval.tasks.pictures import decoded, rgb

PREFIX = "hf:"
FORM = f"{PREFIX}owner/name?split=test&question=question&answer=answer&image=image"
DEFAULTS = {"split": "test", "config": "", "question": "question", "answer": "answer", "image": "image", "accepted": ""}


def _parsed(spec: str) -> tuple[str, dict[str, str]]:
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query.replace("+", "%2B")))
    if unknown := sorted(set(options) - set(DEFAULTS)):
        raise VtokError(f"{spec}: unknown option {unknown[0]!r}; there are {', '.join(DEFAULTS)}")
    if not name:
        raise VtokError(f"{spec}: no data set is named; write {FORM}")
    return name, DEFAULTS | options


class HubPictures:
    """Pictures of a data set, named ``row/column`` or ``row/column/place``."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __call__(self, name: str) -> Image.Image:
        row, column, *place = name.split("/")
        try:
            value = self.rows[int(row)][column]
            value = value[int(place[0])] if place else value
        # datasets decodes pictures as rows are read, and fails in as many ways as there are formats
        except Exception as error:
            raise VtokError(f"picture {name!r} cannot be read: {error}") from None
        if isinstance(value, Image.Image):
            return rgb(value)
        if isinstance(value, Mapping) and value.get("bytes"):
            return decoded(value["bytes"], name)
        if isinstance(value, Mapping) and value.get("path"):
            return decoded(Path(value["path"]).read_bytes(), name)
        if isinstance(value, bytes):
            return decoded(value, name)
        raise VtokError(f"picture {name!r} is a {type(value).__name__}, not a picture: name another image column")


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _images(row: int, record: Mapping[str, Any], columns: list[str]) -> list[str]:
    names: list[str] = []
    for column in columns:
        value = record[column]
        if isinstance(value, list | tuple):
            names += [f"{row}/{column}/{place}" for place in range(len(value))]
        elif value is not None:
            names.append(f"{row}/{column}")
    return names


def load_hub(spec: str) -> Task:
    """A task from ``"hf:owner/name?split=test&question=question&answer=answer&image=image"``.

    ``image`` may name several columns with ``+``; a list of answers is one truth and further right answers;
    ``accepted`` names a column of further right answers, ``config`` the data set's configuration. Rows without a
    picture or an answer are left out.

    Raises
    ------
    VtokError
        ``datasets`` is not installed, the hub is out of reach, or a column is missing.
    """
    name, options = _parsed(spec)
    if find_spec("datasets") is None:
        raise VtokError(f"{spec} needs the package datasets: pip install datasets, or give a local folder as data")
    import datasets

    try:
        rows = datasets.load_dataset(name, options["config"] or None, split=options["split"])
    # no network, no such set, no such split, gated: datasets raises many types, and says which it is
    except Exception as error:
        raise VtokError(f"{spec} cannot be loaded: {error}") from None
    columns = options["image"].split("+")
    needed = [*columns, options["question"], options["answer"], *filter(None, [options["accepted"]])]
    if absent := [column for column in needed if column not in rows.column_names]:
        raise VtokError(f"{spec}: no column {absent[0]!r}; there are {', '.join(rows.column_names)}")
    samples = []
    for row, record in enumerate(_undecoded(rows, columns)):
        answers = _texts(record[options["answer"]]) if record[options["answer"]] is not None else []
        images = _images(row, record, columns)
        if not answers or not images:
            continue
        accepted = [*answers[1:], *(_texts(record[options["accepted"]] or []) if options["accepted"] else [])]
        question = str(record[options["question"]])
        samples.append(
            Sample(f"{name}-{row:06d}", spec, tuple(images), question, answers[0], tuple(dict.fromkeys(accepted)))
        )
    if not samples:
        raise VtokError(f"{spec} has no row with a picture and an answer")
    metric = "yes/no" if {sample.answer.strip().lower() for sample in samples} <= {"yes", "no"} else "accuracy"
    digest = hashlib.sha256(repr((getattr(rows, "_fingerprint", ""), samples)).encode()).hexdigest()
    return Task(name, tuple(samples), HubPictures(rows), metric, source=spec, fingerprint=digest)


def _undecoded(rows: Any, columns: list[str]) -> Any:
    """The rows with pictures as they are stored: questions are read without decoding a single one."""
    import datasets

    for column in columns:
        if isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows
