"""``vtok eval``: load tasks and model, run, print a table."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.errors import VtokError


def command(
    model: Annotated[
        str, typer.Option(help="An embedded model (nano-llava), a folder, a geometry (random weights) or a hub id.")
    ] = "nano-llava",
    method: Annotated[
        str, typer.Option(help='Names with commas between; + composes: "fastv,divprune+random_deep"; or "all".')
    ] = "all",
    keep: Annotated[
        str, typer.Option(help="Budgets with commas between: visual tokens per image (64) or a share of them (0.25).")
    ] = "192,128,64,32",
    tasks: Annotated[str, typer.Option(help='Names with commas between, or "all".')] = "all",
    data: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything; a run that was stopped goes on there.")] = Path(
        "results"
    ),
    limit: Annotated[int | None, typer.Option(help="Only so many samples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time; changes no answer.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or cuda:1; the first GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of methods that draw.")] = 0,
    time_samples: Annotated[int, typer.Option(help="Samples that are timed; 0 times nothing.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed rounds over all entries with each of them.")] = 3,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time, for a machine that others use.")] = "wall",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 16,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="An option of a method, such as fastv.k=3; repeatable."),
    ] = None,
    instruction: Annotated[
        bool | None, typer.Option(help="Ask for a single word or phrase behind each question; not by default for nano.")
    ] = None,
    blank: Annotated[
        bool, typer.Option(help="Ask the plain model with grey pictures, too: what the questions give away.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Throw away what the folder holds of an earlier run.")] = False,
    share_features: Annotated[
        bool, typer.Option(help="Encode a picture once for all methods that leave the vision tower alone.")
    ] = True,
    report: Annotated[bool, typer.Option(help="Write report.html and plots.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")] = False,
) -> None:
    """Answer every question with every method at every budget: accuracy, tokens, time and memory, paired."""
    import torch
    import transformers

    from vtok_eval.harness import table
    from vtok_eval.harness.cells import resolved
    from vtok_eval.harness.loading import DTYPES, load, place
    from vtok_eval.harness.ranks import joined
    from vtok_eval.harness.run import evaluate

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise VtokError(f"dtype {dtype!r} is unknown; take {', '.join(DTYPES)}")
    keeps = [_budget(text) for text in _split(keep, "--keep")]
    options = _options(option or [])
    names = _split(method, "--method")
    if names != ["all"]:
        resolved(names, options)  # a wrong name need not wait for the weights
    asked = _tasks(tasks, data)
    ranks = joined(device)
    if threads is not None:
        torch.set_num_threads(threads)
    network, processor = load(model, DTYPES[dtype], place(device, ranks))
    if names == ["all"]:
        from vtok.api import adapter_of, methods

        names = methods(adapter_of(network).family)
    try:
        results = evaluate(
            network,
            processor,
            names,
            keeps,
            asked,
            out,
            name=Path(model).resolve().name if Path(model).is_dir() else model,
            options=options,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            instruction=instruction,
            seed=seed,
            blank=blank,
            time_samples=time_samples,
            repeats=repeats,
            clock=clock,
            share_features=share_features,
            overwrite=overwrite,
            report=report,
            command=" ".join(["vtok eval", *map(shlex.quote, _arguments())]),
            ranks=ranks,
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; what was answered is in {out}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    finally:
        ranks.close()
    if not ranks.first:
        return
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    table.show(results, out)


def _arguments() -> list[str]:
    """What stood behind ``vtok eval`` or ``python -m vtok_eval``."""
    given = sys.argv[1:]
    return given[1:] if given[:1] == ["eval"] else given


def _split(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise VtokError(f"{option} is empty; give at least one")
    return list(dict.fromkeys(parts))


def _tasks(text: str, data: Path | None) -> Any:
    from vtok_eval import tasks

    return tasks.load(_split(text, "--tasks"), data)


def _budget(text: str) -> int | float:
    from vtok.budget import check_keep

    try:
        keep = float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise VtokError(f"--keep {text} is no budget; give tokens (64) or a share of them (0.25)") from None
    return check_keep(keep)


def _options(given: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        path, sign, value = text.partition("=")
        method, dot, name = path.partition(".")
        if not (sign and dot and method and name):
            raise VtokError(f"--option {text} is not of the form method.name=value, such as fastv.k=3")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        found.setdefault(method, {})[name] = tuple(parsed) if isinstance(parsed, list) else parsed
    return found


__all__ = ["command"]
