"""``vtok eval``: load tasks and model, run, print a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vtok_eval.harness import options


def command(
    model: options.Model = "nano-llava",
    method: options.Methods = "all",
    keep: Annotated[
        str, typer.Option(help="Budgets with commas between: visual tokens per image (64) or a share of them (0.25).")
    ] = "192,128,64,32",
    tasks: options.Tasks = "all",
    data: options.Data = None,
    out: options.Out = Path("results"),
    limit: options.Limit = None,
    batch_size: options.BatchSize = 1,
    dtype: options.Dtype = "fp32",
    device: options.Device = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of methods that draw.")] = 0,
    time_samples: Annotated[int, typer.Option(help="Samples that are timed; 0 times nothing.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed rounds over all entries with each of them.")] = 3,
    clock: options.Clock = "wall",
    threads: options.Threads = None,
    max_new_tokens: options.MaxNewTokens = 16,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="An option of a method, such as fastv.k=3; repeatable."),
    ] = None,
    instruction: options.Instruction = None,
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

    from vtok.io import is_folder
    from vtok_eval import models
    from vtok_eval.harness import table
    from vtok_eval.harness.cells import resolved
    from vtok_eval.harness.loading import load, place
    from vtok_eval.harness.ranks import joined
    from vtok_eval.harness.run import evaluate

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    precision = options.precision(dtype)
    keeps = options.budgets(keep)
    own = options.method_options(option)
    names = options.names(method, "--method")
    if names != ["all"]:
        resolved(names, own)  # a wrong name need not wait for the weights
    asked = options.named_tasks(tasks, data)
    ranks = joined(device)
    if threads is not None:
        torch.set_num_threads(threads)
    network, processor = load(model, precision, place(device, ranks))
    if names == ["all"]:
        from vtok.api import adapter_of, methods

        names = methods(adapter_of(network).family)
    try:
        with options.resumable(out):
            results = evaluate(
                network,
                processor,
                names,
                keeps,
                asked,
                out,
                name=Path(model).resolve().name if is_folder(model, models.MODELS) else model,
                options=own,
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
                command=options.typed("eval"),
                ranks=ranks,
            )
    finally:
        ranks.close()
    if not ranks.first:
        return
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    table.show(results, out)


__all__ = ["command"]
