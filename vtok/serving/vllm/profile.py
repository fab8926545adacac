"""Where the time of a server goes, plain and compressed: ``py-spy`` looks at its processes while they answer.

    python -m vtok.serving.vllm.profile FOLDER --method divprune --keep 64

Needs ``pip install py-spy`` and the right to look at other processes (root, or ptrace allowed).
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from vtok.bench.measure import machine
from vtok.cli import Single
from vtok.errors import VtokError
from vtok.serving.vllm.load import (
    SERVED,
    WIDTH,
    Keep,
    MethodName,
    Model,
    NewTokens,
    Options,
    Out,
    ServeOptions,
    Size,
    TextShare,
    ask,
    requests,
    settings_of,
)
from vtok.serving.vllm.server import serve

RATE = 25
"""Samples a second; at 50, py-spy fell seconds behind on two busy cores."""

#: part -> what a frame of it has in its name; the first part with such a frame anywhere in the stack has the sample
PARTS: dict[str, tuple[str, ...]] = {
    "selection": ("vtok/methods/", "vtok_kernels/", "vtok/engine/prefill.py"),
    "vision tower, projector": ("_process_image_input", "embed_multimodal", "models/clip.py", "models/siglip.py"),
    "language model": ("model_executor/models/", "model_executor/layers/"),
    "pictures": ("PIL/", "image_processing", "multimodal/", "renderers/", "torchvision/"),
    "scheduling, sampling": ("vllm/v1/", "vllm/sampling"),
    "HTTP, text": ("uvicorn/", "fastapi/", "starlette/", "asyncio/", "entrypoints/", "tokenizers/", "transformers/"),
}
REST = "other"
#: frames of threads that wait, some of them by spinning: no work, wherever they are
WAITING = (
    *("wait (threading.py", "_worker (concurrent/", "Connection._recv", "(selectors.py", "poll (zmq/", "SpinCondition"),
    *("monitor_engine_liveness", "garbage.py"),
)


@dataclass(frozen=True)
class Share:
    """One part of one server: its share of the working samples, and seconds of a request that this makes."""

    server: str
    part: str
    share: float
    seconds: float


def part_of(stack: str) -> str:
    """The part of ``PARTS`` that a stack (frames with semicolons between) belongs to."""
    return next((part for part, marks in PARTS.items() if any(mark in stack for mark in marks)), REST)


def counted(lines: Iterable[str]) -> Counter[str]:
    """Working samples of each part in py-spy's raw format: a stack, a space, a number."""
    found: Counter[str] = Counter()
    for line in lines:
        stack, _, number = line.strip().rpartition(" ")
        # the first frame of a process is its command line, which names folders and options
        frames = ";".join(frame for frame in stack.split(";") if not frame.startswith("process "))
        if frames and not any(mark in frames for mark in WAITING):
            found[part_of(frames)] += int(number)
    return found


def shares(server: str, samples: Mapping[str, int], seconds: float) -> list[Share]:
    """Shares of the parts, the largest first; ``seconds`` is what a request takes."""
    total = sum(samples.values())
    if not total:
        raise VtokError("py-spy saw nothing: does it have the right to look at other processes?")
    ordered = sorted(samples.items(), key=lambda item: -item[1])
    return [Share(server, part, number / total, seconds * number / total) for part, number in ordered]


def watched(
    process: int, port: int, chats: Sequence[Any], concurrency: int, new_tokens: int
) -> tuple[float, list[str]]:
    """Seconds that the chats took, and what py-spy saw of the server meanwhile."""
    spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if spy is None:
        raise VtokError("py-spy is missing: pip install py-spy")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "stacks"
        command = [spy, "record", "--pid", str(process), "--subprocesses", "--rate", str(RATE), "--format", "raw"]
        looking = subprocess.Popen([*command, "--output", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            time.sleep(2)  # it reads the symbols of each process first
            seconds, replies = ask(port, chats, concurrency, new_tokens)
        finally:
            looking.send_signal(signal.SIGINT)
            said = looking.communicate(timeout=60)[0].decode(errors="replace")
        failed = [reply.error for reply in replies if reply.error]
        if failed:
            raise VtokError(f"{len(failed)} requests failed; the first reason: {failed[0][:300]}")
        if not out.is_file():
            raise VtokError(f"py-spy gave nothing: {said.strip()[-300:]}")
        return seconds, out.read_text(errors="replace").splitlines()


def command(
    model: Model,
    method: MethodName = "divprune",
    keep: Keep = "64",
    options: Options = "{}",
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    count: Annotated[int, typer.Option("--requests", help="Requests to each server.")] = 96,
    new_tokens: NewTokens = 8,
    text_share: TextShare = 0.25,
    size: Size = "448x448",
    serve_options: ServeOptions = SERVED,
    out: Out = None,
) -> None:
    """Shares of the tower, selection, language model, pictures and the rest in the time of a request."""
    settings = settings_of(method, keep, options)
    width, height = (int(side) for side in size.split("x"))
    found: list[Share] = []
    rates: dict[str, float] = {}
    for name, value in {"plain": False, "compressed": settings}.items():
        own = [*serve_options.split(), "--hf-overrides", json.dumps({"vtok": value})]
        with tempfile.TemporaryDirectory() as logs, serve(model, own, log=Path(logs) / "server.log") as server:
            warm = [chat for chat, _ in requests(4, 0.0, (width, height), -1)]
            ask(server.port, warm, 4, new_tokens)
            chats = [chat for chat, _ in requests(count, text_share, (width, height), 0)]
            seconds, lines = watched(server.process, server.port, chats, concurrency, new_tokens)
        rates[name] = count / seconds
        found += shares(name, counted(lines), seconds / count)
    result: dict[str, Any] = {"model": model.name, "settings": settings, "machine": machine(torch.device("cpu"))}
    result |= {"concurrency": concurrency, "requests": count, "new_tokens": new_tokens, "text_share": text_share}
    result |= {"picture": size, "requests_per_second": rates, "shares": [asdict(share) for share in found]}
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(found, rates)


def show(found: Sequence[Share], rates: Mapping[str, float]) -> None:
    """The table: parts down, servers across."""
    table = Table("part", *(f"{name}, ms ({rate:.2f} requests/s)" for name, rate in rates.items()))
    cells = {(share.server, share.part): f"{1000 * share.seconds:.1f} ({share.share:.0%})" for share in found}
    for part in dict.fromkeys(share.part for share in found):
        table.add_row(part, *(cells.get((name, part), "") for name in rates))
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(cls=Single)(command)
    app()
