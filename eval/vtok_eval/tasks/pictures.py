"""Pictures of a task: by name, from a folder or a zip file, as RGB."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from vtok.errors import VtokError

# of a picture in a folder so many bytes at either end go into the fingerprint: reading all of them would take minutes
ENDS = 65536


def rgb(image: Image.Image) -> Image.Image:
    """The picture upright and in RGB; what is transparent becomes white."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def decoded(data: bytes, name: str) -> Image.Image:
    """The picture in a file's bytes. Raises VtokError where they are none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VtokError(
            f"picture {name!r} cannot be read ({error}): mend the file or take it out of the task"
        ) from None


class FolderPictures:
    """Pictures below ``folder/images``, or below ``folder`` itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, name: str) -> Path | None:
        if PurePosixPath(name).is_absolute() or ".." in Path(name).parts:
            raise VtokError(f"picture {name!r} points out of {self.folder}: give names relative to it")
        paths = (self.folder / "images" / name, self.folder / name)
        return next((path for path in paths if path.is_file()), None)

    def __call__(self, name: str) -> Image.Image:
        path = self._path(name)
        if path is None:
            raise VtokError(f"picture {name!r} is neither in {self.folder / 'images'} nor in {self.folder}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise VtokError(f"picture {path} cannot be read: {error.strerror}") from None
        return decoded(data, name)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names that have no file."""
        return [name for name in names if self._path(name) is None]

    def digest(self, names: Iterable[str]) -> str:
        """Changes with the pictures, as far as their sizes, beginnings and ends tell."""
        found = hashlib.sha256()
        for name in names:
            path = self._path(name)
            found.update(f"{name}\0".encode())
            if path is not None:
                size = path.stat().st_size
                found.update(f"{size}\0".encode())
                with path.open("rb") as file:
                    found.update(file.read(ENDS))
                    file.seek(max(0, size - ENDS))
                    found.update(file.read(ENDS))
        return found.hexdigest()


class ZipPictures:
    """Pictures in a zip file; may be sent to other processes, each of which opens the file for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None

    def _archive(self) -> zipfile.ZipFile:
        if self._open is None or self._open[0] != os.getpid():
            try:
                self._open = os.getpid(), zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                raise VtokError(f"{self.path} cannot be opened: {error}") from None
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_open": None}

    def __call__(self, name: str) -> Image.Image:
        try:
            data = self._archive().read(name)
        except KeyError:
            raise VtokError(f"picture {name!r} is not in {self.path}") from None
        except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise VtokError(f"picture {name!r} in {self.path} cannot be read: {error}") from None
        return decoded(data, name)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are not in the file."""
        there = set(self._archive().namelist())
        return [name for name in names if name not in there]

    def digest(self, names: Iterable[str]) -> str:
        """Changes with the pictures, by the checksums that the file keeps."""
        checksums = {info.filename: info.CRC for info in self._archive().infolist()}
        return hashlib.sha256(repr([(name, checksums.get(name)) for name in names]).encode()).hexdigest()
