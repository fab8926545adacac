"""Load test: a model as it is against the same model compressed, served side by side on loopback, asked in turns.

    python -m vtok.serving.vllm.load FOLDER --method divprune --keep 64

Each round asks both servers with the same requests at every concurrency, so whatever else the machine does falls on
both. The order of the two alternates.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from vtok.bench.measure import machine
from vtok.cli import Single
from vtok.errors import VtokError
from vtok.serving.vllm.server import Reply, chat, message, serve

#: columns that the table takes, also where the output is no terminal
WIDTH = 100
WORDS = ("what", "is", "in", "the", "picture", "how", "many", "red", "or", "blue", "things", "left", "of", "it")


Model = Annotated[Path, typer.Argument(help="Folder with a model and its processor.")]
MethodName = Annotated[str, typer.Option(help="What compresses it.")]
Keep = Annotated[str, typer.Option(help="Visual tokens per image, such as 64, or a share, such as 0.25.")]
Options = Annotated[str, typer.Option(help="The method's options as JSON, such as '{\"llm_layer\": null}'.")]
NewTokens = Annotated[int, typer.Option(help="Tokens of an answer.")]
TextShare = Annotated[float, typer.Option(help="Share of requests without a picture.")]
Size = Annotated[str, typer.Option(help="Width and height of the pictures in pixels.")]
ServeOptions = Annotated[str, typer.Option(help="Further arguments of vllm serve, with spaces between.")]
Out = Annotated[Path | None, typer.Option(help="Write everything as JSON.")]
SERVED = "--dtype float32 --enforce-eager --max-model-len 2048"


@dataclass(frozen=True)
class Row:
    """One server at one concurrency. Seconds; ``prompt_tokens`` is the mean of requests with a picture."""

    server: str
    concurrency: int
    requests: int
    failed: int
    requests_per_second: float
    first_median: float
    first_p90: float
    prompt_tokens: float


def requests(
    count: int, text_share: float, size: tuple[int, int], seed: int
) -> list[tuple[list[dict[str, Any]], bool]]:
    """Chats, and whether each has a picture. Every picture is another one, so that no cache answers for the tower."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(4, 12)))
        pictured = draw.random() >= text_share
        pixels = bytes(draw.getrandbits(8) for _ in range(12 * 9 * 3))
        image = Image.frombytes("RGB", (12, 9), pixels).resize(size, Image.Resampling.NEAREST)
        made.append((message(text, [image] if pictured else []), pictured))
    return made


def ask(
    port: int, chats: Sequence[list[dict[str, Any]]], concurrency: int, new_tokens: int
) -> tuple[float, list[Reply]]:
    """Wall seconds and replies of all chats, ``concurrency`` at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        replies = list(pool.map(lambda chat_: chat(port, chat_, new_tokens, ignore_eos=True), chats))
    return time.perf_counter() - start, replies


def row(server: str, concurrency: int, seconds: float, replies: Sequence[Reply], pictured: Sequence[bool]) -> Row:
    """The figures of one server's replies."""
    good = [reply for reply in replies if not reply.error]
    first = sorted(reply.first for reply in good) or [0.0]
    prompts = [r.prompt_tokens for r, picture in zip(replies, pictured, strict=True) if picture and not r.error]
    return Row(
        server,
        concurrency,
        len(replies),
        len(replies) - len(good),
        len(good) / seconds,
        statistics.median(first),
        first[min(len(first) - 1, int(0.9 * len(first)))],
        statistics.fmean(prompts) if prompts else 0.0,
    )


def settings_of(method: str, keep: str, options: str) -> dict[str, Any]:
    """What ``--hf-overrides`` takes, from the command line's words."""
    return {"method": method, "keep": float(keep) if "." in keep else int(keep), "options": json.loads(options)}


def command(
    model: Model,
    method: MethodName = "divprune",
    keep: Keep = "64",
    options: Options = "{}",
    concurrency: Annotated[str, typer.Option(help="Requests at a time, with commas between.")] = "1,8,16",
    count: Annotated[int, typer.Option("--requests", help="Requests of a round for each of them.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 1,
    new_tokens: NewTokens = 8,
    text_share: TextShare = 0.25,
    size: Size = "448x448",
    serve_options: ServeOptions = SERVED,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Requests per second and time to the first token, plain against compressed, in one run."""
    levels = [int(level) for level in concurrency.split(",")]
    settings = settings_of(method, keep, options)
    width, height = (int(side) for side in size.split("x"))
    servers = {"plain": False, "compressed": settings}
    found: dict[tuple[str, int], tuple[float, list[Reply], list[bool]]] = {}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = {}
        for name, value in servers.items():
            own = [*serve_options.split(), "--hf-overrides", json.dumps({"vtok": value})]
            ports[name] = stack.enter_context(serve(model, own, log=logs / f"{name}.log")).port
        for name, port in ports.items():
            (warm, _), *_ = requests(1, 0.0, (width, height), -1)
            reply = chat(port, warm, new_tokens)
            if reply.error:
                raise VtokError(f"the {name} server does not answer: {reply.error}")
        for turn in range(rounds):
            for level in levels:
                chats, pictured = zip(*requests(count, text_share, (width, height), turn * 1000 + level), strict=True)
                for name in list(ports)[:: 1 if (turn + level) % 2 else -1]:
                    seconds, replies = ask(ports[name], chats, level, new_tokens)
                    before = found.get((name, level), (0.0, [], []))
                    found[name, level] = (before[0] + seconds, before[1] + replies, before[2] + list(pictured))
    rows = [row(name, level, *found[name, level]) for level in levels for name in servers]
    errors = sorted({reply.error for _, replies, _ in found.values() for reply in replies if reply.error})
    result: dict[str, Any] = {
        "model": model.name,
        "settings": settings,
        "machine": machine(torch.device("cpu")),
        "rows": [asdict(r) for r in rows],
    }
    result |= {"new_tokens": new_tokens, "text_share": text_share, "picture": size, "rounds": rounds, "errors": errors}
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        show(rows)
    if errors:
        raise VtokError(f"{sum(r.failed for r in rows)} requests failed; the first reason: {errors[0][:300]}")


def show(rows: Sequence[Row]) -> None:
    """The table, with the ratio of the two servers at each concurrency."""
    table = Table("at a time", "server", "requests/s", "ratio", "first token, ms", "90 %", "prompt tokens", "failed")
    plain = {r.concurrency: r.requests_per_second for r in rows if r.server == "plain"}
    for r in rows:
        ratio = r.requests_per_second / plain[r.concurrency] if plain.get(r.concurrency) else 0.0
        table.add_row(
            str(r.concurrency),
            r.server,
            f"{r.requests_per_second:.2f}",
            f"{ratio:.2f}",
            f"{1000 * r.first_median:.0f}",
            f"{1000 * r.first_p90:.0f}",
            f"{r.prompt_tokens:.0f}",
            f"{r.failed}",
        )
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(cls=Single)(command)
    app()
