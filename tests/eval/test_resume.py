"""Runs that are stopped: killed, torn, out of disk, or asked to go on under other settings."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from vtok.errors import VtokError
from vtok_eval.harness import again, store
from vtok_eval.harness.asking import Asking

from . import tiny

BUILT = tiny.build("llava")
alone_app = typer.Typer()
alone_app.command()(again.command)
SMALL: dict[str, Any] = {
    "built": BUILT,
    "methods": ["random", "divprune"],
    "keeps": [16],
    "tasks": [tiny.task(count=4)],
}


def lines(out: Path) -> dict[store.Key, dict[str, Any]]:
    found = list(store.read(out / store.SAMPLES))
    by_key = {store.key_of(line): line for line in found}
    assert len(by_key) == len(found), "a sample was answered twice"
    return by_key


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("entries", "tasks", "problems", "fingerprint"))


def test_kill_in_the_middle(tmp_path: Path) -> None:
    whole = tiny.run("llava", tmp_path / "whole", built=BUILT, batch_size=2)
    stopped = tmp_path / "stopped"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.eval.tiny", "llava", str(stopped)]
    process = subprocess.Popen(command, cwd=root, env=environment)
    try:
        deadline = time.monotonic() + 300
        while not (stopped / store.SAMPLES).is_file() or len((stopped / store.SAMPLES).read_bytes()) < 6000:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = lines(stopped)
    assert 0 < len(before) < len(lines(tmp_path / "whole"))
    assert not (stopped / store.RESULTS).exists()
    resumed = tiny.run("llava", stopped, built=BUILT, batch_size=2)
    assert lines(stopped) == lines(tmp_path / "whole")
    assert list(lines(stopped))[: len(before)] == list(before)  # nothing was answered anew
    assert same(resumed, whole)


def test_torn_lines_are_answered_again(tmp_path: Path) -> None:
    whole = tiny.run("llava", tmp_path, **SMALL)
    file, expected = tmp_path / store.SAMPLES, lines(tmp_path)
    raw = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*raw[:2], raw[3][:40] + b"\n", raw[2], raw[2], *raw[5:-1], raw[-1][:-30]]))
    again = tiny.run("llava", tmp_path, **SMALL)
    assert lines(tmp_path) == expected
    assert same(again, whole)
    size = file.stat().st_size
    tiny.run("llava", tmp_path, **SMALL)
    assert file.stat().st_size == size


def test_nothing_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.run("llava", tmp_path, **SMALL, limit=2)
    asked: list[tuple[str, int]] = []
    original = Asking._lines

    def counted(self: Any, entry: Any, batch: Any) -> Any:
        asked.append((entry.id, len(batch.samples)))
        return original(self, entry, batch)

    monkeypatch.setattr(Asking, "_lines", counted)
    more = tiny.run("llava", tmp_path, **SMALL)
    assert sorted(asked) == sorted(2 * [(name, 1) for name in ("plain", "random@16", "divprune@16")])
    assert more["tasks"][0]["samples"] == 4
    asked.clear()
    tiny.run("llava", tmp_path, **{**SMALL, "methods": ["random", "uniform"], "keeps": [16, 8]})
    assert {name for name, _ in asked} == {"random@8", "uniform@16", "uniform@8"}
    asked.clear()
    fewer = tiny.run("llava", tmp_path, **SMALL, limit=2)
    assert asked == []
    assert [entry["id"] for entry in fewer["entries"]] == ["plain", "random@16", "divprune@16"]
    assert fewer["tasks"][0]["samples"] == 2


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 3}, "generation"),
    ({"instruction": False}, "instruction true, now false"),
    ({"options": {"random": {"seed": 1}}}, r"random@16: options \{\}, now .*seed"),
    ({"seed": 1}, "random@16: options"),
    (
        {"tasks": [tiny.Task("colour", tiny.task(count=4).samples, tiny.picture, fingerprint="other")]},
        "task colour: data",
    ),
]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    tiny.run("llava", tmp_path, **SMALL)
    before = (tmp_path / store.SAMPLES).read_bytes()
    for change, message in CHANGES:
        with pytest.raises(VtokError, match=f"(?s)made with other settings.*{message}.*take another --out"):
            tiny.run("llava", tmp_path, **{**SMALL, **change})
    model, processor = tiny.build("llava")
    model.model.language_model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(VtokError, match="weights"):
        tiny.run("llava", tmp_path, **{**SMALL, "built": (model, processor)})
    with pytest.raises(VtokError, match="dtype float32, now float64"):
        tiny.run("llava", tmp_path, **{**SMALL, "built": (model.double(), processor)})
    assert (tmp_path / store.SAMPLES).read_bytes() == before
    tiny.run("llava", tmp_path, **SMALL, batch_size=3, limit=3)  # these change no answer
    fresh = tiny.run("llava", tmp_path, **SMALL, seed=1, overwrite=True)
    assert fresh["entries"][1]["options"] == {"seed": 1}
    assert len(lines(tmp_path)) == 12


def test_answers_without_settings_are_refused(tmp_path: Path) -> None:
    tiny.run("llava", tmp_path, **SMALL)
    (tmp_path / store.SETTINGS).write_text("{")
    with pytest.raises(VtokError, match="cannot be read"):
        tiny.run("llava", tmp_path, **SMALL)
    (tmp_path / store.SETTINGS).unlink()
    with pytest.raises(VtokError, match="nobody can tell"):
        tiny.run("llava", tmp_path, **SMALL)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.run("llava", tmp_path / "whole", **SMALL)
    out, sync, calls = tmp_path / "full", os.fsync, []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VtokError, match=r"the disk is full; what is written so far is kept.*the same command goes on"):
        tiny.run("llava", out, **SMALL)
    monkeypatch.setattr(os, "fsync", sync)
    assert 0 < len(lines(out)) < 12
    assert same(tiny.run("llava", out, **SMALL), whole)
    assert lines(out) == lines(tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_that_is_really_full(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to("/dev/full")
    with store.Lines(tmp_path / "x.jsonl") as file, pytest.raises(VtokError, match="the disk is full"):
        file.append([{"entry": "plain"}])


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VtokError, match="cannot write"):
        tiny.run("llava", tmp_path / "file", **SMALL)


def test_interrupt_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.run("llava", tmp_path / "whole", **SMALL)
    asked: list[int] = []

    def stop(answer: str, sample: Any) -> bool:
        asked.append(1)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return tiny.judge(answer, sample)

    with pytest.raises(KeyboardInterrupt):
        tiny.run("llava", tmp_path / "out", **SMALL, judge=stop)
    assert len(lines(tmp_path / "out")) == 5
    assert same(tiny.run("llava", tmp_path / "out", **SMALL), whole)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with store.locked(tmp_path), pytest.raises(VtokError, match="another run is writing"):
        tiny.run("llava", tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_shares_of_ranks_are_taken_in(tmp_path: Path) -> None:
    from vtok_eval.harness.ranks import Ranks

    whole = tiny.run("llava", tmp_path / "whole", **SMALL)
    out = tmp_path / "out"
    tiny.run("llava", out, **SMALL, limit=1)
    assert tiny.run("llava", out, **SMALL, ranks=Ranks(1, 2)) == {}
    (share,) = out.glob(store.RANKS)
    torn = share.read_bytes()[:-9]
    share.write_bytes(torn)
    results = tiny.run("llava", out, **SMALL)
    assert not list(out.glob(store.RANKS))
    assert lines(out) == lines(tmp_path / "whole")
    assert same(results, whole)


def test_results_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        store.write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


# -- made again


def test_a_run_made_again_says_the_same(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    results = tiny.run("llava", first, **SMALL)
    tiny.run("llava", second, **SMALL)
    found = {one.entry: one for one in again.compare(first, second)}
    assert list(found) == [entry["id"] for entry in results["entries"] if entry["status"] != "refused"]
    assert all((one.asked, one.answers, one.kept, one.apart) == (4, 0, 0, None) for one in found.values())
    assert CliRunner().invoke(alone_app, [str(first), str(second)]).exit_code == 0
    # another answer, other tokens, and a share that is off
    rows = [json.loads(line) for line in (second / store.SAMPLES).read_text().splitlines()]
    changed = [row for row in rows if row["entry"] == "divprune@16"][:2]
    changed[0]["answer"] += "!"
    changed[1]["kept"] = ["0f"]
    (second / store.SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder, share in ((first, 0.93), (second, 0.97)):
        timed = json.loads((folder / store.RESULTS).read_text())
        next(e for e in timed["entries"] if e["id"] == "random@16")["timing"] = {"share": {"median": share}}
        (folder / store.RESULTS).write_text(json.dumps(timed))
    found = {one.entry: one for one in again.compare(first, second)}
    assert (found["divprune@16"].answers, found["divprune@16"].kept) == (1, 1)
    assert found["random@16"].apart == pytest.approx(4)
    said = CliRunner().invoke(alone_app, [str(first), str(second)])
    assert said.exit_code == 1
    assert "1 with other answers or tokens; 1 over 3 points off" in said.output


def test_runs_without_a_question_in_common_are_not_compared(tmp_path: Path) -> None:
    tiny.run("llava", tmp_path / "first", **SMALL)
    with pytest.raises(VtokError, match="holds no results of vtok eval"):
        again.compare(tmp_path / "first", tmp_path)
    tiny.run("llava", tmp_path / "second", **SMALL | {"tasks": [tiny.task("other", count=4)]})
    with pytest.raises(VtokError, match="no question in common"):
        again.compare(tmp_path / "first", tmp_path / "second")
