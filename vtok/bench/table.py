"""``vtok bench``: build a model, run the contest, print a table or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from vtok.bench import options
from vtok.bench.contest import Row, Spread, run
from vtok.bench.measure import machine
from vtok.errors import VtokError

WIDTH = 176
"""Columns that the whole table takes, also where the output is no terminal."""
NOISY = 1.25
LEGEND = (
    "Milliseconds, medians (smallest, largest). encode, select: parts of the prefill; decode: a further token; MB: "
    "memory of the prefill on top of weights and inputs. Ratios are of prefills within a repetition. of ceiling: "
    "against random pruning with the same cuts (sites, layers, counts); of input random: against random pruning in "
    "front of the decoder with the same average. 1 is as fast as random; the row random shows the noise."
)


def command(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option(help="Name of a geometry (random weights), or a folder with a model.")
    ] = "llava-0.5b",
    methods: Annotated[
        str, typer.Option(help='"all", or names with commas between; + composes: "fastv,divprune+random_deep".')
    ] = "all",
    keep: Annotated[str, typer.Option(help="Visual tokens per image, such as 64, or a share, such as 0.25.")] = "64",
    repeats: Annotated[int, typer.Option(help="Timed rounds over all contenders.")] = 5,
    warmup: Annotated[int, typer.Option(help="Untimed rounds before them.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 8,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:1.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Copies of the sample in a batch.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Text tokens around the picture.")] = 64,
    picture: Annotated[str, typer.Option(help="Width and height of the picture in pixels.")] = "672x504",
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: processor time, for a machine that others use (with --threads 1).")
    ] = "wall",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write everything, raw times included, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time methods against the plain model and against random pruning at the same budget."""
    if ctx.invoked_subcommand is not None:
        sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if given:
            raise VtokError(f"--{given[0].replace('_', '-')} belongs behind `{ctx.invoked_subcommand}`")
        return
    place = options.device_of(device)
    if threads is not None:
        torch.set_num_threads(threads)
    from vtok.geometry import inputs_of

    loaded = options.model_of(model, options.dtype_of(dtype), place)
    inputs = inputs_of(loaded, options.noise(picture), prompt_tokens, batch=batch)
    names = options.names_of(methods, loaded)
    load = options.load()
    rows = run(
        loaded,
        inputs,
        names,
        options.budget_of(keep),
        repeats=repeats,
        warmup=warmup,
        new_tokens=new_tokens,
        clock=clock,
    )
    setting = {
        "model": model,
        **machine(loaded.device),
        "dtype": dtype,
        "batch": batch,
        "keep": keep,
        "prompt": inputs["input_ids"].shape[1],
        "picture": picture,
        "repeats": repeats,
        "new_tokens": new_tokens,
        "clock": clock,
        "load before": load,
    }
    found = {"setting": setting, "rows": [row.as_dict() for row in rows]}
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    show(rows, setting, console)


def show(rows: Sequence[Row], setting: Mapping[str, Any], console: Console) -> None:
    """Print the rows as a table, and what there is to say about them below. Narrow terminals get medians only."""
    ranges = console.width >= WIDTH
    table = Table(title="  ".join(f"{key}: {value}" for key, value in setting.items()), title_justify="left")
    columns = ("", "keep", "average", "MACs", "encode", "select", "prefill", "decode", "MB", "speed-up", "of ceiling")
    for number, column in enumerate((*columns, "of input random")):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number > 0)
    for row in rows:
        if row.role == "refused":
            continue
        table.add_row(
            row.name,
            "" if row.keep is None else f"{row.keep:g}",
            f"{row.average_tokens:.1f}",
            f"{row.mac_ratio:.3f}",
            _range(row.ms("encode"), ".1f"),
            _range(row.ms("select"), ".1f"),
            _range(row.ms("prefill"), ".0f", ranges),
            _range(row.ms("decode"), ".1f"),
            f"{row.peak_mb:.0f}",
            _range(row.speedup, ".2f", ranges),
            _range(row.share, ".2f", ranges),
            _range(row.share_at_input, ".2f", ranges),
            style={"ceiling": "dim", "plain": "bold"}.get(row.role),
        )
    console.print(table)
    console.print(LEGEND, highlight=False)
    first = rows[0].ms("prefill")
    if first is not None and first.high > NOISY * first.low:
        factor = f"{first.high / first.low:.1f}"
        console.print(f"The plain model's own times differ by a factor of {factor}: other work runs on this machine.")
    for row in rows:
        if row.note:
            console.print(f"{'refused: ' if row.role == 'refused' else ''}{row.note}", highlight=False)


def _range(spread: Spread | None, spec: str, whole: bool = False) -> str:
    if spread is None:
        return ""
    return f"{spread.median:{spec}}" + (f" ({spread.low:{spec}} {spread.high:{spec}})" if whole else "")
