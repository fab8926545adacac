"""``vllm serve`` on loopback for tests and the load test, and one streamed chat request to it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vtok.errors import VtokError

HOST = "127.0.0.1"
NAME = "model"
#: settings for machines without accelerators; what is set already stays
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Reply:
    """What came of one request: ``first`` and ``total`` seconds to the first and last token, ``error`` or empty;
    ``tokens`` where ``return_token_ids=True`` asked for them."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
    first: float = 0.0
    total: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Server:
    """A running server: its port on 127.0.0.1 and the id of its first process."""

    port: int
    process: int


@contextmanager
def serve(
    model: str | Path, arguments: Sequence[str] = (), *, log: str | Path, patience: float = 600.0
) -> Iterator[Server]:
    """Run ``vllm serve`` while the block runs.

    Args:
        model: local folder.
        arguments: further arguments.
        log: file for what the server prints.
        patience: seconds that it may take to start.

    Yields:
        Where it is.

    Raises:
        VtokError: it ended or did not answer in time; names the log.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--host", HOST]
    command += ["--port", str(port), "--served-model-name", NAME, *arguments]
    with Path(log).open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**ENVIRONMENT, **os.environ}, start_new_session=True
        )
        try:
            _wait(process, port, patience, log)
            yield Server(port, process.pid)
        finally:
            _end(process)


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def _wait(process: subprocess.Popen, port: int, patience: float, log: str | Path) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise VtokError(f"vllm serve ended with status {process.returncode}; see {log}")
        try:
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(1)
    raise VtokError(f"vllm serve did not answer within {patience:.0f} seconds; see {log}")


def _end(process: subprocess.Popen) -> None:
    """The server and the engine processes that it started, and nothing else: they are a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=20)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def message(text: str, images: Sequence[Image.Image] = ()) -> list[dict[str, Any]]:
    """An OpenAI-style chat of one turn; pictures travel as PNG data addresses."""
    parts: list[dict[str, Any]] = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": address}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def chat(
    port: int, messages: Sequence[Mapping[str, Any]], new_tokens: int = 16, timeout: float = 300.0, **more: Any
) -> Reply:
    """One greedy streamed request. A failure is an ``error`` of the reply, not an exception."""
    body = {"model": NAME, "messages": list(messages), "max_tokens": new_tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, **more}
    start = time.perf_counter()
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    text, first = "", 0.0
    tokens: list[int] = []
    usage: dict[str, int] = {}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return Reply(error=f"{response.status}: {response.read(2000).decode(errors='replace')}")
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return Reply(error=str(event["error"]))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                first = first or time.perf_counter() - start
                text += choice["delta"].get("content") or ""
                tokens += choice.get("token_ids") or []
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Reply(error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()
    if not usage:
        return Reply(error="the stream ended without a usage record")
    total = time.perf_counter() - start
    return Reply(text, tuple(tokens), usage["prompt_tokens"], usage["completion_tokens"], first or total, total)
