"""A folder is whole or not there: full disks, interrupts, kills; and the manifest that says what is in it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vtok.errors import VtokError
from vtok.export import manifest
from vtok.export.folder import written
from vtok.export.manifest import MANIFEST, Manifest, Parity

NOTE = Manifest("hf", "fp32", {"name": "m"}, {"methods": [], "keep": 8, "positions": "keep"})
PARITY = Parity(4, "given", 16, 4, 4, 1.0, 1e-6, 12.5, 0.5, 0.5, rule="all equal", passed=True)


def test_it_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with written(target) as beside:
        (beside / "file").write_text("x")
        assert not target.exists()
        assert beside.parent == target.parent
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class OtherError(Exception):
    """As safetensors has one of its own."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "is full, nothing was left"),
        (OtherError("I/O error: No space left on device (os error 28)"), "is full, nothing was left"),
        (OtherError("shapes differ"), "shapes differ"),
        (KeyboardInterrupt(), "^$"),
    ],
)
def test_nothing_is_left_of_a_failure(error: BaseException, message: str, tmp_path: Path) -> None:
    wanted = VtokError if "full" in message else type(error)

    def fail() -> None:
        with written(tmp_path / "out") as beside:
            (beside / "part").write_text("half")
            raise error

    with pytest.raises(wanted, match=message):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VtokError, match="is no folder"), written(tmp_path / "file"):
        pass
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(VtokError, match="holds other files"), written(foreign, overwrite=overwrite):
            pass
    with pytest.raises(VtokError, match="cannot write into"), written(tmp_path / "file" / "out"):
        pass
    (tmp_path / "empty").mkdir()
    with written(tmp_path / "empty") as beside:
        (beside / MANIFEST).write_text("1")
    with pytest.raises(VtokError, match=r"earlier export.*--overwrite"), written(tmp_path / "empty"):
        pass


def test_an_earlier_export_stays_until_the_new_one_is_there(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with written(tmp_path / "out", overwrite=True) as beside:
            (beside / MANIFEST).write_text(text)
            assert text == "old" or (tmp_path / "out" / MANIFEST).read_text() == "old"
    with pytest.raises(ZeroDivisionError), written(tmp_path / "out", overwrite=True):
        raise ZeroDivisionError
    assert (tmp_path / "out" / MANIFEST).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with written(tmp_path / "out") as beside:
        (beside / MANIFEST).write_text("old")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".partial-" in Path(source).name and Path(target).name == "out":
            raise OSError(errno.EACCES, "no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="no"), written(tmp_path / "out", overwrite=True):
        pass
    assert (tmp_path / "out" / MANIFEST).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WRITER = """
import signal, sys, time
from pathlib import Path
from vtok.export.folder import written
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
with written(sys.argv[1]) as beside:
    (beside / "part").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_leave_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        process.send_signal(number)
        assert process.wait(30) != 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_up(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        process.kill()
        process.wait(30)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    mine = tmp_path / f".out.partial-{os.getpid()}-abc"
    mine.mkdir()
    with written(tmp_path / "out"):
        time.sleep(0)
    assert {path.name for path in tmp_path.iterdir()} == {"out", mine.name}


# -- the manifest -------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights").write_bytes(b"abc")
    note = dataclasses.replace(NOTE, parity=PARITY, plan={"kept": 8}).write(tmp_path)
    again = manifest.verify(tmp_path)
    assert again == note
    assert again.files["sub/weights"].bytes == 3
    assert again.files["sub/weights"].sha256.startswith("ba7816bf")
    assert again.versions["torch"] and again.created and again.vtok


def test_changed_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    (tmp_path / "two").write_text("2")
    NOTE.write(tmp_path)
    (tmp_path / "one").write_text("!")
    with pytest.raises(VtokError, match=r"one in .* differ"):
        manifest.verify(tmp_path)
    (tmp_path / "two").unlink()
    with pytest.raises(VtokError, match="lacks two"):
        manifest.verify(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "was not written by vtok export"),
        ({"format": 99, "target": "hf", "vtok": "9.0"}, "written by vtok 9.0; upgrade"),
        ({"format": 1, "target": "hf", "colour": "red"}, "is damaged"),
        ({"format": 1, "target": "hf", "files": []}, "is damaged"),
    ],
)
def test_damaged_manifests(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(VtokError, match=r"holds no manifest\.json"):
        manifest.read(tmp_path)
    (tmp_path / MANIFEST).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(VtokError, match=message):
        manifest.read(tmp_path)
