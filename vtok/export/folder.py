"""A folder is there whole or not at all: written beside its place, renamed when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vtok.errors import VtokError
from vtok.export.manifest import MANIFEST

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: safetensors, protobuf and torch have errors of their own, with the system's words in them
WORDS = tuple(os.strerror(number) for number in FULL)


@contextmanager
def written(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into, which becomes ``folder`` when the block ends well, and nothing when it does not.

    It lies beside ``folder``, on the same disk, so that one rename is all that is left to do. An exception, Ctrl-C and
    SIGTERM delete it; what a killed process left is deleted by the next one that writes the same folder.

    Parameters
    ----------
    folder : str or Path
        Must not be there, or be empty.
    overwrite : bool
        Replace an earlier export (a folder with a manifest), once the new one is complete.

    Raises
    ------
    VtokError
        ``folder`` is in the way, its parent cannot be written to, or the disk is full.
    """
    folder = Path(folder).absolute()
    ready(folder, overwrite)
    prefix = f".{folder.name}.partial-"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent, prefix)
        beside = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=folder.parent))
    except OSError as error:
        raise VtokError(f"cannot write into {folder.parent}: {error.strerror}; name another folder") from error
    try:
        with _terminable():
            yield beside
            _finish(beside, folder)
    except BaseException as error:
        if _full(error):
            raise VtokError(
                f"the disk of {folder.parent} is full, nothing was left there; make room or name a folder elsewhere"
            ) from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in FULL or any(words in str(error) for words in WORDS)


def ready(folder: str | Path, overwrite: bool = False) -> None:
    """Check that a folder may be written, before anything that takes long.

    Raises
    ------
    VtokError
        Something else is there.
    """
    folder = Path(folder)
    if folder.is_file() or folder.is_symlink():
        raise VtokError(f"{folder} is no folder; name one that is not there yet")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise VtokError(f"{folder} holds other files and no {MANIFEST}; name a folder that is not there yet")
    if not overwrite:
        raise VtokError(f"{folder} holds an earlier export; name another folder, or replace it with --overwrite")


def _finish(beside: Path, folder: Path) -> None:
    """Swap ``beside`` in; a folder that was there comes back should that fail."""
    # mkdtemp's folders are the owner's alone; an exported one is like any other
    mask = os.umask(0)
    os.umask(mask)
    beside.chmod(0o777 & ~mask)
    if not folder.exists():
        os.rename(beside, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=beside.name + "-old-", dir=folder.parent))
    os.rename(folder, old / "was")
    try:
        os.rename(beside, folder)
    except BaseException:
        os.rename(old / "was", folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sweep(parent: Path, prefix: str) -> None:
    """Delete what processes that are gone have left."""
    for left in parent.glob(f"{prefix}*"):
        owner = left.name.removeprefix(prefix).partition("-")[0]
        if not (owner.isdecimal() and _running(int(owner))):
            shutil.rmtree(left, ignore_errors=True)


def _running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block by an exception, so that ``finally`` runs; only a main thread can arrange that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
