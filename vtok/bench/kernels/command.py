"""``vtok bench kernels``: time the operators, print a table, write CSV, JSON and a roofline picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
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
from vtok.bench.contest import Spread
from vtok.bench.kernels.bars import verdicts
from vtok.bench.kernels.cases import SIZES, requests
from vtok.bench.kernels.device import CallClock, Ceilings, ceilings, setting_of, slug
from vtok.bench.kernels.roofline import picture
from vtok.bench.kernels.run import RATIOS, Outcome, Row, operators_of, run
from vtok.errors import VtokError
from vtok.progress import progress

WIDTH = 200
LEGEND = (
    "ms: median (smallest, largest). limit: what the bytes and operations that nobody can do without take at the "
    "measured ceilings; share: limit over ms. Speed-ups are over plain torch (the reference), torch.compile of it and "
    "the textbook loop, within a round; of yardstick: time over that of the Gram product or of the layer's attention. "
    "agrees: share of indices that are the reference's, or 1 less the relative error. * serves when nobody asks."
)


def command(
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:1.")] = "cpu",
    sizes: Annotated[
        str | None, typer.Option(help='Width of the model: "7b" (the default on a GPU), "0.5b" (elsewhere) or "tiny".')
    ] = None,
    operators: Annotated[str, typer.Option(help='"all", or names with commas between.')] = "all",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, or several with commas between; bf16 on a GPU, else fp32.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of a case; five of them run in any case.")] = 1.0,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so long: first compile no more, then leave out what remains.")
    ] = None,
    compile: Annotated[bool, typer.Option(help="Time torch.compile of plain torch, too.")] = True,
    baselines: Annotated[bool, typer.Option(help="Time the textbook and the yardsticks, too.")] = True,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: processor time, for a machine that others use (with --threads 1).")
    ] = "wall",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV, JSON and SVG files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time the operators of vtok_kernels against plain torch, compiled torch, the textbook and the device's limits."""
    place = torch.device(options.device_of(device))
    if clock not in ("wall", "cpu") or (clock == "cpu" and place.type != "cpu"):
        raise VtokError(f'clock={clock!r} is no clock for {device}; take "wall", or "cpu" on a CPU')
    scale = sizes or ("7b" if place.type == "cuda" else "0.5b")
    if scale not in SIZES:
        raise VtokError(f"sizes {scale!r} are unknown; take {', '.join(SIZES)}")
    dtypes = tuple((dtype or ("bf16" if place.type == "cuda" else "fp32")).split(","))
    for name in dtypes:
        options.dtype_of(name)
    if threads is not None:
        torch.set_num_threads(threads)
    chosen, without = operators_of(operators, place)
    watch = CallClock(place, clock)
    setting = {**setting_of(place, clock), "kind": place.type, "sizes": scale, "load before": options.load()}
    top = ceilings(watch, dtypes, quick=scale == "tiny")
    wanted, outcomes = list(requests(scale, chosen)), []
    with progress("kernels", len(wanted) * len(dtypes), not as_json) as advance:
        measured = run(
            wanted, dtypes, watch, top, seconds=seconds, minutes=minutes, compile=compile, baselines=baselines
        )
        for outcome in measured:
            outcomes.append(outcome)
            advance(1)
            if out is not None:  # after every case: what is measured outlives a run that is stopped
                write(out, setting, top, outcomes, without)
    if as_json:
        typer.echo(json.dumps(as_dict(setting, top, outcomes, without), indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    show(setting, top, outcomes, without, console)


def as_dict(
    setting: Mapping[str, Any], top: Ceilings, outcomes: Sequence[Outcome], without: Sequence[str]
) -> dict[str, Any]:
    """Everything: raw times, ceilings, bars."""
    rows = [row for outcome in outcomes for row in outcome.rows]
    return {
        "setting": dict(setting),
        "ceilings": dataclasses.asdict(top),
        "rows": [{**dataclasses.asdict(row), "ms": row.ms and row.ms.median, "share": row.share} for row in rows],
        "bars": [verdict.as_dict() for verdict in verdicts(outcomes, dict(setting))],
        "no case": list(without),
    }


def write(
    folder: Path, setting: Mapping[str, Any], top: Ceilings, outcomes: Sequence[Outcome], without: Sequence[str]
) -> None:
    """``kernels-<device>.csv``, ``.json`` and ``.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"kernels-{slug(str(setting['device']))}"
    rows = [row for outcome in outcomes for row in outcome.rows]
    (folder / f"{name}.json").write_text(json.dumps(as_dict(setting, top, outcomes, without), indent=1) + "\n")
    (folder / f"{name}.csv").write_text(table_of(rows, str(setting["device"])))
    (folder / f"{name}.svg").write_text(picture(rows, top, f"vtok_kernels on {setting['device']}"))


def table_of(rows: Sequence[Row], device: str) -> str:
    """Rows as CSV, a line each, the device's name in every one."""
    text = io.StringIO()
    columns = (
        "device", "operator", "size", "dtype", "backend", "serves", "ms", "ms_low", "ms_high", "rounds", "bytes",
        "operations", "bound", "limit_ms", "share_of_limit", "gb_per_s", "gop_per_s", "peak_mb", "agreement",
        *(f"over_{name}" for name in RATIOS), "note",
    )  # fmt: skip
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        ms = row.ms
        times = ["", "", ""] if ms is None else [f"{x:.5g}" for x in (ms.median, ms.low, ms.high)]
        rates = ["", ""] if ms is None else [f"{x / ms.median / 1e6:.5g}" for x in (row.moved, row.operations)]
        ratios = [f"{row.speedup[name].median:.4g}" if name in row.speedup else "" for name in RATIOS]
        writer.writerow(
            [
                device, row.operator, row.size, row.dtype, row.backend, int(row.chosen), *times, len(row.times),
                f"{row.moved:.0f}", f"{row.operations:.0f}", row.bound, f"{row.limit_ms:.5g}", _number(row.share),
                *rates, _number(row.peak_mb), _number(row.agreement, ".6f"), *ratios, row.note,
            ]
        )  # fmt: skip
    return text.getvalue()


def show(
    setting: Mapping[str, Any], top: Ceilings, outcomes: Sequence[Outcome], without: Sequence[str], console: Console
) -> None:
    """Print it all."""
    rates = ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in top.rate.items())
    console.print("  ".join(f"{key}: {value}" for key, value in setting.items()), highlight=False)
    console.print(
        f"ceilings: copy {top.bandwidth / 1e9:.4g} GB/s, matmul {rates}, smallest call {1000 * top.launch_ms:.3g} us",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("operator", "size", "dtype", "backend", "ms", "limit", "share", "bound by", "over plain", "compiled")
    for column in (*columns, "textbook", "of yardstick", "MB", "agrees"):
        table.add_column(column, justify="left" if column in columns[:4] else "right", no_wrap=True)
    for outcome in outcomes:
        for row in outcome.rows:
            if row.times:
                _add(table, row)
        table.add_section()
    console.print(table)
    console.print(LEGEND, highlight=False)
    for row in (row for outcome in outcomes for row in outcome.rows):
        if row.note and row.backend != "yardstick":
            console.print(f"{row.operator} {row.size} {row.backend}: {row.note}", highlight=False, markup=False)
    if without:
        console.print(f"no case for: {', '.join(without)}", highlight=False)
    bars.show(verdicts(outcomes, dict(setting)), console)


def _add(table: Table, row: Row) -> None:
    of_yardstick = row.speedup.get("yardstick")
    table.add_row(
        row.operator, row.size, row.dtype, row.backend + ("*" if row.chosen else ""), _times(row.ms),
        f"{row.limit_ms:.3g}", _number(row.share, ".1%"), row.bound,
        *(_number(row.speedup[name].median, ".2f") if name in row.speedup else "" for name in RATIOS[:3]),
        "" if of_yardstick is None else f"{1 / of_yardstick.median:.3g}", _number(row.peak_mb, ".1f"),
        _number(row.agreement, ".4f"), style="dim" if row.backend in ("textbook", "yardstick", "compiled") else None,
    )  # fmt: skip


def _times(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3g} ({spread.low:.3g} {spread.high:.3g})"


def _number(value: float | None, spec: str = ".4g") -> str:
    return "" if value is None else f"{value:{spec}}"
