"""``vtok export``: a compressed model as a folder for somewhere else."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vtok.errors import VtokError


def command(
    model: Annotated[
        str, typer.Argument(help="A folder, an embedded model, a hub id, or a geometry with random weights.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not be there yet.")],
    to: Annotated[str, typer.Option(help="hf, onnx, openvino or pt2.")] = "hf",
    method: Annotated[
        str | None,
        typer.Option(
            help='A method, or several to compose: "divprune+random_deep"; the folder\'s own settings without it.'
        ),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Visual tokens per image, such as 64, or a share of them, such as 0.25.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An option of the method, such as k=3; repeatable.")
    ] = None,
    positions: Annotated[str, typer.Option(help="auto, keep or reindex.")] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(help="Of the weights: fp32, fp16, bf16 (hf), int8 (graphs). hf keeps the file's own by default."),
    ] = None,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Leave out what acts inside the decoder, which graphs cannot hold.")
    ] = False,
    size: Annotated[
        str | None, typer.Option(help="Pictures that graphs of LLaVA-NeXT and Qwen are made for, such as 448x336.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Questions of the parity check.", min=1)] = 100,
    new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest instead of a summary.")] = False,
) -> None:
    """Write a compressed model for transformers, ONNX Runtime, OpenVINO or torch.export, if it answers alike there."""
    import vtok
    from vtok.cli import _budget, _option, _print_json, _quiet
    from vtok.export import TARGETS, export, source
    from vtok.export.folder import ready
    from vtok.io import CONFIG, load
    from vtok.method import resolve

    if to not in TARGETS:
        raise VtokError(f"--to {to} is unknown; take {', '.join(TARGETS)}")
    ready(out, overwrite)
    _quiet()
    pixels = None if size is None else _size(size)
    options: dict[str, Any] = dict(_option(text) for text in option or ())
    budget = None if keep is None else _budget(keep)
    chain = None
    if method is not None:  # a wrong name need not wait for the weights
        names = method.replace(",", "+").split("+")
        chain = resolve(names[0] if len(names) == 1 else names, options)
    elif not (Path(model) / CONFIG).is_file():
        raise VtokError(f"{model} does not say how to compress it; name a method, such as --method divprune --keep 64")
    elif options or keep is not None:
        raise VtokError("--keep and --option need a method; name it with --method, or leave them out")
    network, processor = source.load(model)
    if chain is None:
        load(model, model=network)
    else:
        vtok.compress(network, chain, keep=budget, positions=positions)
    if precision is None and to == "hf":
        precision = source.file_dtype(model)
    made = export(
        network,
        out,
        to,
        processor=processor,
        precision=precision,
        fixed=fixed,
        size=pixels,
        samples=samples,
        new_tokens=new_tokens,
        name=model,
        command=shlex.join(["vtok", *sys.argv[1:]]),
        overwrite=overwrite,
    )
    if as_json:
        _print_json(made.as_dict())
        return
    found = made.parity
    assert found is not None
    console = Console(highlight=False)
    size_mb = sum(file.bytes for file in made.files.values()) / 1e6
    console.print(f"wrote {out}: {to}, {made.precision}, {len(made.files)} files, {size_mb:.1f} MB")
    console.print(
        f"parity in a fresh process: {found.answers_equal} of {found.samples} answers equal ({found.source}), "
        f"{found.kept_shared:.2%} of kept tokens shared, logits within {found.max_logit_difference:.2g} "
        f"(range {found.logit_range:.3g})"
    )
    if found.accuracy is not None and found.reference_accuracy is not None:
        console.print(f"right: {found.accuracy:.1%}, the model itself {found.reference_accuracy:.1%}")
    for sentence in (made.plan or {}).get("left_out", ()):
        console.print(f"left out: {sentence}")
    console.print(f"load it: {LOADING[to].format(folder=out)}")


#: target -> the line that loads it
LOADING = {
    "hf": 'vtok.load("{folder}")',
    "onnx": 'vtok.OnnxVLM("{folder}")',
    "openvino": 'vtok.OpenVinoVLM("{folder}")',
    "pt2": 'vtok.Pt2VLM("{folder}")',
}


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None or not (int(found[1]) and int(found[2])):
        raise VtokError(f"--size {text} is not of the form widthxheight in pixels, such as 448x336")
    return int(found[1]), int(found[2])
