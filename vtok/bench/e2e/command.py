"""``vtok bench e2e``: the large run, contest by contest; tables, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vtok.bench import options
from vtok.bench import verdicts as bars
from vtok.bench.contest import Row, Spread
from vtok.bench.e2e.bars import verdicts
from vtok.bench.e2e.plan import MODELS, cells
from vtok.bench.e2e.run import Outcome, run
from vtok.bench.kernels.device import setting_of, slug
from vtok.errors import VtokError
from vtok.progress import progress

WIDTH = 150
LEGEND = (
    "Milliseconds, medians. ttft: pixels to the first logits, of which encode (vision side) and select (what input and "
    "decoder sites take); prefill: ttft less encode; decode: a further token; graph: the same as a CUDA graph; MB: "
    "memory of the prefill on top of weights and inputs. select %: of the plain ttft; overhead %: what the method "
    "takes longer than random pruning with the same cuts, of the plain ttft; of ceiling: random's ttft over the "
    "method's."
)


def command(
    models: Annotated[str, typer.Option(help="Geometries or folders, with commas between.")] = ",".join(MODELS),
    methods: Annotated[str, typer.Option(help='"all", or names with commas between; + composes.')] = "all",
    batch: Annotated[str, typer.Option(help="Copies of the sample in a batch, with commas between.")] = "1,8",
    keep: Annotated[
        str | None, typer.Option(help="Budgets with commas between, instead of the published ones of each model.")
    ] = None,
    picture: Annotated[
        str | None, typer.Option(help="Sizes with commas between, such as 672x504, instead of those of each model.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="For everything; 0 for no limit.")] = 9.0,
    repeats: Annotated[int, typer.Option(help="Timed rounds of a contest, at most; at least three.")] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(help="Text tokens around the picture.")] = 64,
    graphs: Annotated[bool, typer.Option(help="On a GPU: decoding as a CUDA graph, too.")] = True,
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; bf16 on a GPU, else fp32.")] = None,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: processor time, for a machine that others use (with --threads 1).")
    ] = "wall",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV and JSON files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Time every method on the published geometries (random weights): first token, decoding, memory, ceilings."""
    place = torch.device(options.device_of(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if clock not in ("wall", "cpu") or (clock == "cpu" and place.type != "cpu"):
        raise VtokError(f'clock={clock!r} is no clock for {place}; take "wall", or "cpu" on a CPU')
    if repeats < 1 or new_tokens < 1:
        raise VtokError(f"--repeats {repeats} and --new-tokens {new_tokens} must be at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    kind = dtype or ("bf16" if place.type == "cuda" else "fp32")
    options.dtype_of(kind)
    plan = cells(
        _parts(models),
        [_whole(text) for text in _parts(batch)],
        None if keep is None else [options.budget_of(text) for text in _parts(keep)],
        None if picture is None else _parts(picture),
        graphs,
    )
    setting: dict[str, Any] = {**setting_of(place, clock), "kind": place.type, "dtype": kind, "new_tokens": new_tokens}
    setting |= {"prompt_tokens": prompt_tokens, "minutes": minutes, "load before": options.load()}
    console, outcomes = Console(), []
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    if not as_json:
        console.print("  ".join(f"{key}: {value}" for key, value in setting.items()), highlight=False)
    with progress("e2e", len(plan), not as_json) as advance:
        for outcome in run(
            plan, methods, device=str(place), dtype=kind, minutes=minutes or None, repeats=repeats,
            new_tokens=new_tokens, prompt_tokens=prompt_tokens, clock=clock,
        ):  # fmt: skip
            outcomes.append(outcome)
            advance(1)
            if out is not None:  # after every contest: what is measured outlives a run that is stopped
                write(out, setting, outcomes)
            if not as_json:
                show(outcome, console)
    if as_json:
        typer.echo(json.dumps(as_dict(setting, outcomes), indent=2))
        return
    console.print(LEGEND, highlight=False)
    bars.show(verdicts(outcomes, str(setting["kind"])), console)


def as_dict(setting: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything: raw times and bars."""
    found = [verdict.as_dict() for verdict in verdicts(outcomes, str(setting["kind"]))]
    return {"setting": dict(setting), "contests": [own.as_dict() for own in outcomes], "bars": found}


def write(folder: Path, setting: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """``e2e-<device>.csv`` and ``.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"e2e-{slug(str(setting['device']))}"
    (folder / f"{name}.json").write_text(json.dumps(as_dict(setting, outcomes), indent=1) + "\n")
    (folder / f"{name}.csv").write_text(table_of(outcomes, str(setting["device"])))


COLUMNS = (
    "average_tokens", "mac_ratio", "ttft_ms", "encode_ms", "select_ms", "prefill_ms", "decode_ms", "decode_graph_ms",
    "peak_mb", "speedup", "select_share", "overhead", "share_of_ceiling", "share_of_input_random",
)  # fmt: skip


def numbers(outcome: Outcome, row: Row) -> dict[str, float | None]:
    """What a table says of a contender, by ``COLUMNS``; ``prefill_ms`` is the language model's part of the ttft."""
    ttft, encode = row.times.get("prefill", []), row.times.get("encode", [])
    rest = [whole - part for whole, part in zip(ttft, encode, strict=True)]
    graph = outcome.graphs.get(row.name)
    return {
        "average_tokens": row.average_tokens,
        "mac_ratio": row.mac_ratio,
        "ttft_ms": _median(row.ms("prefill")),
        "encode_ms": _median(row.ms("encode")),
        "select_ms": _median(row.ms("select")),
        "prefill_ms": statistics.median(rest) if rest else None,
        "decode_ms": _median(row.ms("decode")),
        "decode_graph_ms": statistics.median(graph) if graph else None,
        "peak_mb": row.peak_mb,
        "speedup": _median(row.speedup),
        "select_share": _median(outcome.share_of_plain(row)),
        "overhead": _median(outcome.overhead(row)),
        "share_of_ceiling": _median(row.share),
        "share_of_input_random": _median(row.share_at_input),
    }


def table_of(outcomes: Sequence[Outcome], device: str) -> str:
    """A line for every contender of every contest, the device's name in each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("device", "model", "picture", "batch", "keep", "name", "role", "ran with", *COLUMNS, "note"))
    for outcome in outcomes:
        cell = outcome.cell
        head = (device, cell.model, cell.picture, cell.batch, f"{cell.keep:g}")
        if not outcome.rows:
            writer.writerow((*head, "", "", "", *[""] * len(COLUMNS), outcome.note))
        for row in outcome.rows:
            found = numbers(outcome, row) if row.role != "refused" else dict.fromkeys(COLUMNS)
            figures = ["" if found[name] is None else f"{found[name]:.5g}" for name in COLUMNS]
            ran = "" if row.keep is None else f"{row.keep:g}"
            writer.writerow((*head, row.name, row.role, ran, *figures, row.note))
    return text.getvalue()


def show(outcome: Outcome, console: Console) -> None:
    """One contest's table; ceilings are in the files."""
    console.print(f"{outcome.cell.title}  ({outcome.rounds} rounds)", style="bold", highlight=False)
    if outcome.note:
        console.print(outcome.note, highlight=False, markup=False)
    if not outcome.rows:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("", "average", "ttft", "encode", "select", "prefill", "decode", "graph", "MB", "speed-up", "select %")
    for place, column in enumerate((*columns, "overhead %", "of ceiling")):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in outcome.rows:
        if row.role not in ("plain", "method"):
            continue
        found = numbers(outcome, row)
        table.add_row(
            row.name, _text(found["average_tokens"]), *(_text(found[name]) for name in COLUMNS[2:8]),
            _text(found["peak_mb"], ".0f"), _text(found["speedup"], ".2f"), _text(found["select_share"], ".2%"),
            _text(found["overhead"], ".2%"), _text(found["share_of_ceiling"], ".3f"),
            style="bold" if row.role == "plain" else None,
        )  # fmt: skip
    console.print(table)
    for row in outcome.rows:
        if row.note:
            console.print(f"{'refused: ' if row.role == 'refused' else ''}{row.note}", highlight=False, markup=False)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise VtokError(f"--batch {text} is no number; give whole numbers, such as 1,8") from None


def _median(spread: Spread | None) -> float | None:
    return None if spread is None else spread.median


def _text(value: float | None, spec: str = ".1f") -> str:
    return "" if value is None else f"{value:{spec}}"
