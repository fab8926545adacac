"""Tasks from a folder: JSON Lines beside ``images/`` or ``images.zip``.

A line is ``{"image": "cat.png", "question": "what is it?", "answer": "cat"}``; ``"images": [...]`` stands for several
pictures, and ``"id"``, ``"accepted"`` (a list), ``"group"``, ``"meta"`` and ``"task"`` (by default the file's name) may
be added. The bundled tasks are such a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtok.errors import VtokError
from vtok_eval.samples import Sample, Task
from vtok_eval.tasks.pictures import FolderPictures, ZipPictures

FIELDS = ("id", "image", "images", "question", "answer", "accepted", "group", "task", "meta")


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise VtokError(f'{where}: "{field}" must be a text or a number, not {json.dumps(value)}')
    return str(value)


def _list(record: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = record.get(field, [])
    if not isinstance(value, list) or not all(isinstance(item, str | int | float) for item in value):
        raise VtokError(f'{where}: "{field}" must be a list of texts, not {json.dumps(value)}')
    return tuple(map(str, value))


def sample(record: Any, task: str, number: int, where: str) -> Sample:
    """One line as a sample. ``where`` (file and line) begins the message of a VtokError."""
    if not isinstance(record, dict):
        raise VtokError(f"{where}: a line must be a JSON object with image, question and answer")
    if unknown := sorted(set(record) - set(FIELDS)):
        raise VtokError(f"{where}: unknown field {unknown[0]!r}; there are {', '.join(FIELDS)}")
    images = (_text(record, "image", where),) if "image" in record else _list(record, "images", where)
    if not images:
        raise VtokError(f'{where}: no picture; give "image" or "images"')
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise VtokError(f'{where}: "meta" must be an object, not {json.dumps(meta)}')
    return Sample(
        id=_text(record, "id", where) if "id" in record else f"{task}-{number:05d}",
        task=_text(record, "task", where) if "task" in record else task,
        images=images,
        question=_text(record, "question", where),
        answer=_text(record, "answer", where),
        accepted=_list(record, "accepted", where),
        group=_text(record, "group", where) if "group" in record else "seen",
        meta=meta,
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, text
    except UnicodeDecodeError:
        raise VtokError(f"{path}, line {number}: not UTF-8") from None
    except OSError as error:
        raise VtokError(f"{path} cannot be read: {error.strerror}") from None


def read(path: Path) -> list[Sample]:
    """The samples of a JSON Lines file. Raises VtokError naming file and line."""
    samples: list[Sample] = []
    lines: dict[str, int] = {}
    for number, text in _lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise VtokError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        found = sample(record, path.stem, number, where)
        if found.id in lines:
            raise VtokError(f"{where}: the id {found.id!r} is taken by line {lines[found.id]}")
        lines[found.id] = number
        samples.append(found)
    if not samples:
        raise VtokError(f"{path} has no samples: write a JSON object a line, with image, question and answer")
    return samples


def files(folder: Path) -> list[Path]:
    """The folder's JSON Lines files, by name."""
    if not folder.is_dir():
        raise VtokError(f"{folder} is not a folder: it should hold JSON Lines files and images/ or images.zip")
    # scenes.jsonl says what is where in generated pictures; it asks nothing
    found = sorted(path for path in folder.glob("*.jsonl") if path.name != "scenes.jsonl")
    if not found:
        raise VtokError(f"{folder} has no .jsonl file: write a JSON object a line, with image, question and answer")
    return found


def make_tasks(samples: list[Sample], pictures: FolderPictures | ZipPictures, source: str) -> list[Task]:
    """Samples as tasks by their names, in order of appearance; yes/no tasks are those with no other answers."""
    tasks: dict[str, list[Sample]] = {}
    for one in samples:
        tasks.setdefault(one.task, []).append(one)
    made = []
    for name, own in tasks.items():
        ids = Counter(one.id for one in own)
        if len(ids) < len(own):
            raise VtokError(f"the id {ids.most_common(1)[0][0]!r} of the task {name!r} stands in two files of {source}")
        images = list(dict.fromkeys(image for one in own for image in one.images))
        if len(pictures.missing(images)) == len(images):
            raise VtokError(
                f"none of the {len(images)} pictures of {name!r} is there, such as {images[0]!r} of {source}"
            )
        text = repr([(s.id, s.images, s.question, s.answer, s.accepted, s.group) for s in own])
        metric = "yes/no" if {one.answer.strip().lower() for one in own} <= {"yes", "no"} else "accuracy"
        digest = hashlib.sha256((text + pictures.digest(images)).encode()).hexdigest()
        made.append(Task(name, tuple(own), pictures, metric, source=source, fingerprint=digest))
    return made


def load_folder(folder: Path, only: str | None = None, source: str | None = None) -> list[Task]:
    """All tasks of a folder, or those of the file ``only`` (without its ending)."""
    paths = [path for path in files(folder) if only in (None, path.stem)]
    archive = folder / "images.zip"
    pictures = ZipPictures(archive) if archive.is_file() else FolderPictures(folder)
    return make_tasks([one for path in paths for one in read(path)], pictures, source or str(folder))
