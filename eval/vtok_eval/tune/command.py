"""``vtok tune``: the configuration that meets a target, written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vtok.errors import VtokError
from vtok_eval.harness import options


def command(
    target: Annotated[
        str,
        typer.Option(
            help='"retention>=0.98", "speedup>=2", "accuracy>=0.8", "tokens<=64", "macs<=0.3", or several with "and".'
        ),
    ],
    model: options.Model = "nano-llava",
    method: options.Methods = "all",
    keep: Annotated[
        str | None, typer.Option(help="Search only these budgets, with commas between: tokens (64) or shares (0.25).")
    ] = None,
    variants: Annotated[
        bool, typer.Option(help="Search layers and published settings of the methods, too, not budgets alone.")
    ] = True,
    tasks: options.Tasks = "all",
    data: options.Data = None,
    calibration: Annotated[float, typer.Option(help="Share of the questions to search with; the rest checks.")] = 0.5,
    confidence: Annotated[
        float, typer.Option(help="Probability of the target, on the questions searched with, that the choice needs.")
    ] = 0.9,
    out: options.Out = Path("tuned"),
    limit: options.Limit = None,
    batch_size: options.BatchSize = 1,
    dtype: options.Dtype = "fp32",
    device: options.Device = None,
    seed: Annotated[int, typer.Option(help="Of the split, the bootstrap, and methods that draw.")] = 0,
    time_samples: Annotated[
        int, typer.Option(help="Questions that a configuration is timed on; 0: cost is the MAC ratio.")
    ] = 4,
    repeats: Annotated[int, typer.Option(help="Timed rounds with each of them.")] = 3,
    clock: options.Clock = "wall",
    threads: options.Threads = None,
    max_new_tokens: options.MaxNewTokens = 16,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="An option of a method that is not to be varied, such as fastv.k=3."),
    ] = None,
    instruction: options.Instruction = None,
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

    from vtok_eval.harness.loading import load, place
    from vtok_eval.harness.ranks import Ranks
    from vtok_eval.tune import candidates
    from vtok_eval.tune.run import tune
    from vtok_eval.tune.show import show
    from vtok_eval.tune.target import parse

    transformers.logging.set_verbosity_error()
    wanted = parse(target)  # what is wrong with the words need not wait for the weights
    precision = options.precision(dtype)
    if not 0 < calibration < 1:
        raise VtokError(f"--calibration {calibration:g} must be between 0 and 1: the rest checks what was found")
    keeps = [] if keep is None else options.budgets(keep)
    if len({type(budget) for budget in keeps}) > 1:
        raise VtokError(f"--keep {keep} mixes tokens and shares, which have no order; give one kind")
    own = options.method_options(option)
    names = options.names(method, "--method")
    if names != ["all"]:
        candidates.chains(names, own, seed)
    asked = options.named_tasks(tasks, data)
    if threads is not None:
        torch.set_num_threads(threads)
    network, processor = load(model, precision, place(device, Ranks()))
    with options.resumable(out):
        found = tune(
            network,
            processor,
            wanted,
            asked,
            out,
            methods=None if names == ["all"] else names,
            keeps=keeps,
            options=own,
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
            command=options.typed("tune"),
        )
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show(found, out)
    if not found["met"]:
        raise typer.Exit(1)


__all__ = ["command"]
