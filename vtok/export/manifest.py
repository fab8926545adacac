"""``manifest.json``: what an exported folder holds, what it was made of, and what its parity check found."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtok.errors import VtokError

MANIFEST = "manifest.json"
FORMAT = 1
TARGETS = ("hf", "onnx", "openvino", "pt2")
#: whose versions decide what a graph looks like
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Parity:
    """How the exported folder, loaded again, answered beside the model that it was made of.

    Attributes
    ----------
    samples : int
        Questions asked of both.
    source : str
        Where they are from.
    new_tokens : int
        Most tokens of an answer.
    answers_equal : int
        Greedy answers that are the same, token by token.
    kept_equal : int
        Samples of which the same visual tokens were kept.
    kept_shared : float
        Share of kept tokens, over all samples, that both kept.
    shared_with_itself : float or None
        The same share of the model and the model with pixels that differ in their last bit: where choices hang on
        that, no other runtime can make the same ones. Measured only where fewer were shared than is asked for.
    answers_equal_to_itself : int or None
        Greedy answers that are then the same.
    max_logit_difference : float
        Largest absolute difference of the logits of the first new token, over samples with the same tokens kept.
    logit_range : float
        Largest logit minus smallest, averaged over the samples: what the difference is to be compared with.
    accuracy, reference_accuracy : float or None
        Share of right answers of the export and of the model, where the samples have truths.
    fresh_process : bool
        Whether the folder was loaded by a process of its own.
    rule : str
        What had to hold.
    passed : bool
        Whether it did. Only ``True`` is ever found in a folder.
    """

    samples: int
    source: str
    new_tokens: int
    answers_equal: int
    kept_equal: int
    kept_shared: float
    max_logit_difference: float
    logit_range: float
    accuracy: float | None = None
    reference_accuracy: float | None = None
    fresh_process: bool = True
    rule: str = ""
    passed: bool = False
    shared_with_itself: float | None = None
    answers_equal_to_itself: int | None = None


@dataclass(frozen=True)
class File:
    """A file of the folder: its size in bytes and the hexadecimal sha256 of what is in it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All of ``manifest.json``.

    Attributes
    ----------
    target, precision : str
        What was written: one of ``TARGETS``, and the precision of its weights.
    source : mapping
        The model: ``name``, ``family``, ``class``, ``parameters``.
    compression : mapping
        ``methods``, ``keep`` and ``positions``, as they were asked for.
    plan : mapping or None
        What is fixed in the graphs (layout, tokens in, tokens kept, what was left out ...); ``None`` for ``hf``, where
        nothing is.
    files : mapping of str to File
        By path inside the folder, ``manifest.json`` left out.
    parity : Parity or None
        ``None`` only while the folder is being made.
    command : str
        That made it.
    versions : mapping of str to str
        Of the packages that took part.
    """

    target: str
    precision: str
    source: Mapping[str, Any]
    compression: Mapping[str, Any]
    plan: Mapping[str, Any] | None = None
    files: Mapping[str, File] = field(default_factory=dict)
    parity: Parity | None = None
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    vtok: str = ""
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def write(self, folder: Path) -> Manifest:
        """Write it into a folder, with the files that are there, versions and time filled in.

        Returns
        -------
        Manifest
            As written.
        """
        import vtok

        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        whole = dataclasses.replace(
            self,
            files=files_of(folder),
            versions=self.versions or versions(),
            created=self.created or now,
            vtok=self.vtok or vtok.__version__,
        )
        (folder / MANIFEST).write_text(json.dumps(whole.as_dict(), indent=2) + "\n", encoding="utf-8")
        return whole


def read(folder: str | Path) -> Manifest:
    """The manifest of an exported folder.

    Raises
    ------
    VtokError
        Missing, damaged, or of a later format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise VtokError(f"{folder} holds no {MANIFEST}; give a folder that vtok export wrote")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise VtokError(f"{path} cannot be read as JSON ({error}); export the model again") from error
    if not isinstance(found, dict) or not isinstance(found.get("format"), int) or "target" not in found:
        raise VtokError(f"{path} was not written by vtok export; export the model again")
    if found["format"] > FORMAT:
        raise VtokError(
            f"{path} has format {found['format']}, written by vtok {found.get('vtok', 'of a later version')}; upgrade "
            "vtok to read it"
        )
    try:
        found["files"] = {name: File(**entry) for name, entry in found.get("files", {}).items()}
        found["parity"] = Parity(**found["parity"]) if found.get("parity") else None
        return Manifest(**found)
    except (TypeError, AttributeError) as error:
        raise VtokError(f"{path} is damaged ({error}); export the model again") from error


def verify(folder: str | Path) -> Manifest:
    """The manifest of a folder whose files are all there and unchanged.

    Raises
    ------
    VtokError
        As ``read``; a file is missing or differs from what was written.
    """
    folder, found = Path(folder), read(folder)
    missing = [name for name in found.files if not (folder / name).is_file()]
    if missing:
        raise VtokError(f"{folder} lacks {', '.join(missing)}; copy or export it again")
    changed = [name for name, entry in found.files.items() if digest(folder / name) != entry.sha256]
    if changed:
        raise VtokError(f"{', '.join(changed)} in {folder} differ from what was exported; copy or export it again")
    return found


def files_of(folder: Path) -> dict[str, File]:
    """Every file below a folder by its path there, the manifest left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): File(path.stat().st_size, digest(path)) for path in paths}


def digest(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of those of ``PACKAGES`` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
