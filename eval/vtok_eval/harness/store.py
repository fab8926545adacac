"""The files of a run: answers line by line, safe against a kill, guarded by a fingerprint of the settings."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vtok.errors import VtokError

SAMPLES, TIMING, SETTINGS, RESULTS = "samples.jsonl", "timing.jsonl", "settings.json", "results.json"
RANKS = "samples.rank*.jsonl"
LOCK = ".lock"
Key = tuple[str, str, str]
"""Entry, task, sample."""


def key_of(line: Mapping[str, Any]) -> Key:
    """What a line answers."""
    return line["entry"], line["task"], line["sample"]


def share(rank: int, world: int) -> str:
    """Name of the file that a process appends its answers to."""
    return SAMPLES if world == 1 else f"samples.rank{rank}.jsonl"


class Lines:
    """A JSONL file that only grows; what ``append`` has returned from is on the disk.

    Use as a context manager.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def __enter__(self) -> Lines:
        with _disk(self.path):
            self._file = open(self.path, "ab", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines and wait for the disk.

        Raises
        ------
        VtokError
            The disk is full or the file cannot be written.
        """
        rest = memoryview(b"".join(_encoded(line) for line in lines))
        with _disk(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a JSONL file; those that a kill tore are passed over."""
    return (line for line in _parsed(path) if line is not None)


def _parsed(path: Path) -> Iterator[dict[str, Any] | None]:
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            yield line if isinstance(line, dict) else None


def gather(folder: Path, retry: bool = False) -> None:
    """Make ``samples.jsonl`` whole: shares of ranks are taken in, torn lines and second answers are dropped.

    Parameters
    ----------
    folder : Path
        Of the run.
    retry : bool
        Drop errors, too, so that they are tried again.

    Raises
    ------
    VtokError
        The disk is full or a file cannot be written; nothing is lost.
    """
    main, shares = folder / SAMPLES, sorted(folder.glob(RANKS))
    partial = main.with_name(main.name + ".part")
    seen: set[Key] = set()
    dropped = 0
    with _disk(main):
        with open(partial, "wb") as file:
            for line in (line for path in (main, *shares) for line in _parsed(path)):
                if line is None or key_of(line) in seen or (retry and line.get("error")):
                    dropped += 1
                    continue
                seen.add(key_of(line))
                file.write(_encoded(line))
            file.flush()
            os.fsync(file.fileno())
        if dropped or shares:
            os.replace(partial, main)
        else:
            partial.unlink()
        for path in shares:
            path.unlink()


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def clear(folder: Path) -> None:
    """Remove what an earlier run left in a folder."""
    for path in (*(folder / name for name in (SAMPLES, TIMING, SETTINGS, RESULTS)), *folder.glob(RANKS)):
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make the folder of a run.

    Raises
    ------
    VtokError
        It cannot be made.
    """
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a file as a whole or not at all.

    Raises
    ------
    VtokError
        The disk is full or the file cannot be written.
    """
    partial = path.with_name(path.name + ".part")
    with _disk(path):
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def fingerprint(content: Any) -> str:
    """Hex digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a folder with those of this run added.

    Parameters
    ----------
    folder : Path
        Of the run.
    settings : mapping
        ``"common"``, and by name ``"tasks"`` and ``"entries"``.

    Raises
    ------
    VtokError
        Answers in the folder were made with other settings; says which.
    """
    path = folder / SETTINGS
    if not path.is_file():
        if any((folder / name).is_file() for name in (SAMPLES, RESULTS)) or any(folder.glob(RANKS)):
            raise VtokError(
                f"{folder} holds results without {SETTINGS}, so nobody can tell what they were made with; take another "
                "--out, or --overwrite them"
            )
        return json.loads(json.dumps(settings))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        old = {"common": before["common"], "tasks": before["tasks"], "entries": before["entries"]}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise VtokError(f"{path} cannot be read ({error}); take another --out, or --overwrite it") from error
    new = json.loads(json.dumps(settings))
    changed = list(_changes(old["common"], new["common"], ""))
    for kind, word in (("tasks", "task"), ("entries", "")):
        for name in set(old[kind]) & set(new[kind]):
            changed += _changes(old[kind][name], new[kind][name], f"{word} {name}: ".lstrip())
    if changed:
        raise VtokError(
            f"the answers in {folder} were made with other settings ({'; '.join(sorted(changed)[:4])}), and mixing "
            "them would compare what cannot be compared; take another --out, or --overwrite them"
        )
    return {
        "common": new["common"],
        "tasks": {**old["tasks"], **new["tasks"]},
        "entries": {**old["entries"], **new["entries"]},
    }


def _changes(old: Any, new: Any, where: str) -> Iterator[str]:
    for key in sorted(set(old) | set(new)):
        before, now = old.get(key), new.get(key)
        if before != now:
            yield f"{where}{key} {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class locked:
    """Keeps two runs out of one folder; a kill frees it.

    Parameters
    ----------
    folder : Path
        Of the run; made where it is missing.
    wanted : bool
        ``False`` does nothing: another process of the same run holds it.

    Raises
    ------
    VtokError
        Another run is at work there.
    """

    def __init__(self, folder: Path, wanted: bool = True) -> None:
        self.folder, self.wanted = folder, wanted
        self._file: Any = None

    def __enter__(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on this system
            return
        if not self.wanted:
            return
        make_folder(self.folder)
        with _disk(self.folder):
            self._file = open(self.folder / LOCK, "w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise VtokError(f"another run is writing to {self.folder}; wait for it, or take another --out") from None

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()
            (self.folder / LOCK).unlink(missing_ok=True)


class _disk:
    """Turns what the operating system says about a file into a sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise VtokError(
                f"cannot write {self.path}: {reason}; what is written so far is kept, and once that is mended the same "
                "command goes on from there"
            ) from error
