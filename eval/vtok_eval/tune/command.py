"""``vtok tune``: the configuration that meets a target, written down."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from vtok.errors import VtokError


def command(
    target: Annotated[
        str,
        typer.Option(
            help='"retention>=0.98", "speedup>=2", "accuracy>=0.8", "tokens<=64", "macs<=0.3", or several with "and".'
        ),
    ],
    model: Annotated[
        str, typer.Option(help="An embedded model (nano-llava), a folder, a geometry (random weights) or a hub id.")
    ] = "nano-llava",
    method: Annotated[
        str, typer.Option(help='Names with commas between; + composes: "fastv,divprune+random_deep"; or "all".')
    ] = "all",
    keep: Annotated[
        str | None, typer.Option(help="Search only these budgets, with commas between: tokens (64) or shares (0.25).")
    ] = None,
    variants: Annotated[
        bool, typer.Option(help="Search layers and published settings of the methods, too, not budgets alone.")
    ] = True,
    tasks: Annotated[str, typer.Option(help='Names with commas between, or "all".')] = "all",
    data: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    calibration: Annotated[float, typer.Option(help="Share of the questions to search with; the rest checks.")] = 0.5,
    confidence: Annotated[
        float, typer.Option(help="Probability of the target, on the questions searched with, that the choice needs.")
    ] = 0.9,
    out: Annotated[Path, typer.Option(help="Folder for everything; a run that was stopped goes on there.")] = Path(
        "tuned"
    ),
    limit: Annotated[int | None, typer.Option(help="Only so many samples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time; changes no answer.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or cuda:1; the first GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the bootstrap, and methods that draw.")] = 0,
    time_samples: Annotated[
        int, typer.Option(help="Questions that a configuration is timed on; 0: cost is the MAC ratio.")
    ] = 4,
    repeats: Annotated[int, typer.Option(help="Timed rounds with each of them.")] = 3,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time, for a machine that others use.")] = "wall",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 16,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="An option of a method that is not to be varied, such as fastv.k=3."),
    ] = None,
    instruction: Annotated[
        bool | None, typer.Option(help="Ask for a single word or phrase behind each question; not by default for nano.")
    ] = None,
    best_effort: Annotated[
        bool, typer.Option("--best-effort", help="Write the best configuration also where it misses the target.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away what the folder holds of an earlier run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print tune.json instead of a table.")] = False,
) -> None:
    """Find the method, layer and budget that meet a target on your questions; exit code 1 where none does."""
    import torch
    import transformers

    from vtok_eval.harness.command import _budget, _options, _split, _tasks
    from vtok_eval.harness.loading import DTYPES, load, place
    from vtok_eval.harness.ranks import Ranks
    from vtok_eval.tune import candidates
    from vtok_eval.tune.run import tune
    from vtok_eval.tune.show import show
    from vtok_eval.tune.target import parse

    transformers.logging.set_verbosity_error()
    wanted = parse(target)  # what is wrong with the words need not wait for the weights
    if dtype not in DTYPES:
        raise VtokError(f"dtype {dtype!r} is unknown; take {', '.join(DTYPES)}")
    if not 0 < calibration < 1:
        raise VtokError(f"--calibration {calibration:g} must be between 0 and 1: the rest checks what was found")
    keeps = [] if keep is None else [_budget(text) for text in _split(keep, "--keep")]
    if len({type(own) for own in keeps}) > 1:
        raise VtokError(f"--keep {keep} mixes tokens and shares, which have no order; give one kind")
    options = _options(option or [])
    names = _split(method, "--method")
    if names != ["all"]:
        candidates.chains(names, options, seed)
    asked = _tasks(tasks, data)
    if threads is not None:
        torch.set_num_threads(threads)
    network, processor = load(model, DTYPES[dtype], place(device, Ranks()))
    try:
        found = tune(
            network,
            processor,
            wanted,
            asked,
            out,
            methods=None if names == ["all"] else names,
            keeps=keeps,
            options=options,
            vary=variants,
            name=model,
            calibration=calibration,
            confidence=confidence,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            instruction=instruction,
            seed=seed,
            time_samples=time_samples,
            repeats=repeats,
            clock=clock,
            best_effort=best_effort,
            overwrite=overwrite,
            command=" ".join(["vtok", *map(shlex.quote, sys.argv[1:])]),
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; what was answered is in {out}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show(found, out)
    if not found["met"]:
        raise typer.Exit(1)


__all__ = ["command"]
