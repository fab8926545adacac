"""Time to first token on ONNX Runtime and in transformers, plain and compressed, in one run: ``vtok bench export``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vtok.api import adapter_of, compressed, restore
from vtok.bench import options, verdicts
from vtok.bench.contest import Spread
from vtok.bench.measure import machine, timed_generate
from vtok.bench.verdicts import Verdict
from vtok.errors import VtokError
from vtok.export import onnx
from vtok.export.manifest import Manifest
from vtok.export.runtime import OnnxVLM
from vtok.export.trace import trace_all, trace_vision
from vtok.export.vision import vision_graph
from vtok.progress import progress

CONTENDERS = ("transformers plain", "transformers", "onnx plain", "onnx")
BAR = 0.9
"""Of what the transformers path gains, what ONNX Runtime has to gain."""


@dataclass
class Gains:
    """Milliseconds from pixels to the first logits, round by round.

    Attributes
    ----------
    times : dict of str to list of float
        Of each of ``CONTENDERS``, one a round.
    tokens_in, kept : int
        Visual tokens of the picture, before and after.
    difference : float
        Largest absolute difference between the compressed model's first logits in transformers and ONNX Runtime.
    """

    tokens_in: int
    kept: int
    times: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CONTENDERS})
    difference: float = 0.0

    def gain(self, path: str) -> Spread:
        """How much sooner the first token comes, as ratios within a round; ``path``: ``transformers`` or ``onnx``."""
        return Spread.of([a / b for a, b in zip(self.times[f"{path} plain"], self.times[path], strict=True)])

    @property
    def share(self) -> Spread:
        """ONNX Runtime's gain over that of transformers, within a round."""
        times = zip(*(self.times[name] for name in CONTENDERS), strict=True)
        return Spread.of([(plain / small) / (slow / fast) for slow, fast, plain, small in times])

    def as_dict(self) -> dict[str, Any]:
        """Everything, raw times included."""
        return {
            "tokens_in": self.tokens_in,
            "kept": self.kept,
            "milliseconds": self.times,
            "gain transformers": self.gain("transformers").median,
            "gain onnx": self.gain("onnx").median,
            "share": self.share.median,
            "max_logit_difference": self.difference,
        }


def run(
    model: Any,
    inputs: Mapping[str, Any],
    method: Any = "divprune",
    keep: int | float = 64,
    *,
    repeats: int = 7,
    threads: int | None = 2,
    precision: str = "fp32",
    clock: str = "wall",
    bar: bool = False,
) -> Gains:
    """Time the four contenders in turn, each round in another order.

    Parameters
    ----------
    model : PreTrainedModel
        Plain, in fp32 on the CPU.
    inputs : mapping
        One prompt with one picture, as ``vtok.geometry.inputs_of`` gives it.
    method, keep
        As for ``vtok.compress``.
    repeats : int
        Timed rounds, behind an untimed one.
    threads : int, optional
        Of torch and of ONNX Runtime.
    precision : str
        Of the ONNX files.
    clock : {"wall", "cpu"}
        As for ``vtok.bench.run``; ONNX Runtime is always timed by the wall's.
    bar : bool
        Show a progress bar.

    Raises
    ------
    VtokError
        The pair cannot be exported, or a package is missing.
    """
    if repeats < 1:
        raise VtokError(f"repeats={repeats}: give at least 1")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="vtok-bench-") as scratch,
            progress("export", repeats + 2, bar) as advance,
        ):
            small, plain = _folders(model, inputs, method, keep, Path(scratch), precision)
            exported = {"onnx": OnnxVLM(small, threads=threads), "onnx plain": OnnxVLM(plain, threads=threads)}
            advance(1)
            plan = exported["onnx"].settings.plan
            found = Gains(plan.tokens_in, plan.kept)
            found.difference = _difference(model, inputs, method, keep, exported["onnx"])
            _round(model, inputs, method, keep, exported, clock, 0)
            advance(1)
            for turn in range(repeats):
                for name, seconds in _round(model, inputs, method, keep, exported, clock, turn).items():
                    found.times[name].append(1000 * seconds)
                advance(1)
    finally:
        torch.set_num_threads(before)
    return found


def _round(
    model: Any,
    inputs: Mapping[str, Any],
    method: Any,
    keep: Any,
    exported: Mapping[str, OnnxVLM],
    clock: str,
    turn: int,
) -> dict[str, float]:
    adapter, times = adapter_of(model), {}
    start = turn % len(CONTENDERS)
    for name in CONTENDERS[start:] + CONTENDERS[:start]:
        if name in exported:
            times[name] = exported[name].generate_ids(inputs, 1).seconds["first"]
        elif name == "transformers":
            with compressed(model, method, keep=keep):
                times[name] = timed_generate(model, adapter, inputs, 1, clock)["prefill"] / 1000
        else:
            times[name] = timed_generate(model, adapter, inputs, 1, clock)["prefill"] / 1000
    return times


@torch.no_grad()
def _difference(model: Any, inputs: Mapping[str, Any], method: Any, keep: Any, exported: OnnxVLM) -> float:
    with compressed(model, method, keep=keep):
        ours = model(**inputs, logits_to_keep=1).logits[:, -1].numpy()
    return float(np.abs(ours - exported.generate_ids(inputs, 1).logits).max())


def _folders(
    model: Any, inputs: Mapping[str, Any], method: Any, keep: Any, root: Path, precision: str
) -> tuple[Path, Path]:
    """The compressed export, and one of the same decoder whose vision side keeps everything."""
    small, plain = root / "compressed", root / "plain"
    restore(model)
    with compressed(model, method, keep=keep):
        graph = vision_graph(model, inputs, fixed=True)
        _write(model, graph, trace_all(model, graph), small, precision)
    with compressed(model, "uniform", keep=1.0):
        graph = vision_graph(model, inputs)
        _write(model, graph, [trace_vision(graph)], plain, precision)
    for path in small.iterdir():
        if not (plain / path.name).exists():
            _link(path, plain / path.name)
    return small, plain


def _write(model: Any, graph: Any, programs: Any, folder: Path, precision: str) -> None:
    folder.mkdir()
    onnx.write(programs, folder, precision)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    Manifest(target="onnx", precision=precision, source={}, compression={}, plan=graph.plan.to_json()).write(folder)


def _link(path: Path, other: Path) -> None:
    """The decoder of a large model is gigabytes: linked where the file system can, else copied."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copy(path, other)


def command(
    model: Annotated[
        str, typer.Option(help="Name of a geometry (random weights), or a folder with a model.")
    ] = "tiny-llava",
    method: Annotated[str, typer.Option(help="A method that acts before the decoder.")] = "divprune",
    keep: Annotated[str, typer.Option(help="Visual tokens per image, such as 64, or a share, such as 0.25.")] = "64",
    repeats: Annotated[int, typer.Option(help="Timed rounds over the four contenders.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads, of torch and of ONNX Runtime.")] = 2,
    precision: Annotated[str, typer.Option(help="Of the ONNX files: fp32, fp16 or int8.")] = "fp32",
    prompt_tokens: Annotated[int, typer.Option(help="Text tokens around the picture.")] = 64,
    picture: Annotated[str, typer.Option(help="Width and height of the picture in pixels.")] = "336x336",
    out: Annotated[Path | None, typer.Option(help="Write everything, raw times included, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time to first token of an ONNX export and of the model in transformers, plain and compressed."""
    from vtok.geometry import inputs_of

    loaded = options.model_of(model, torch.float32, "cpu")
    inputs = inputs_of(loaded, options.noise(picture), prompt_tokens)
    load = options.load()
    found = run(
        loaded,
        inputs,
        method,
        options.budget_of(keep),
        repeats=repeats,
        threads=threads,
        precision=precision,
        bar=not as_json,
    )
    setting = {
        "model": model,
        **machine(loaded.device),
        "threads": threads,
        "method": method,
        "keep": keep,
        "precision": precision,
        "load before": load,
    }
    verdict = Verdict("onnx", "ONNX Runtime's gain / that of transformers", found.share.median, BAR, False)
    record = {"setting": setting, **found.as_dict(), "verdicts": [verdict.as_dict()]}
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    console = Console()
    _show(found, setting, console)
    verdicts.show([verdict], console)


def _show(found: Gains, setting: Mapping[str, Any], console: Console) -> None:
    title = "  ".join(f"{key}: {value}" for key, value in setting.items())
    table = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in (f"{found.tokens_in} tokens (ms)", f"{found.kept} tokens (ms)", "gain"):
        table.add_column(name, justify="right")
    for path in ("transformers", "onnx"):
        plain, small = (Spread.of(found.times[name]) for name in (f"{path} plain", path))
        table.add_row(path, f"{plain.median:.1f}", f"{small.median:.1f}", f"{found.gain(path).median:.2f}")
    console.print(table)
