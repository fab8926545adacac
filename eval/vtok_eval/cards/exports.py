"""``python -m vtok_eval.cards.exports``: models exported with methods to every target, and a table of the outcome."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.cli import alone
from vtok.errors import VtokError
from vtok.progress import progress
from vtok_eval.render.markdown import table

LINES, TABLE = "exports.jsonl", "exports.md"
METHODS = "flowcut,todre,divprune,visionzip,tome,flextok"
#: what graphs cannot hold is left out where a refusal offers that
OFFER = "export it with fixed"


def pairs(models: Iterable[str], methods: Iterable[str], targets: Iterable[str]) -> list[tuple[str, str, str]]:
    """(model, method, target) in the order of the table; a target is one of ``vtok export``, or ``"onnx:int8"``."""
    return [(model, method, target) for model in models for method in methods for target in targets]


def attempt(
    pair: tuple[str, str, str], keep: str, samples: int, folder: Path, options: Sequence[str] = ()
) -> dict[str, Any]:
    """One export in a process of its own.

    Parameters
    ----------
    pair : tuple of str
        Model, method and target.
    keep : str
        Visual tokens per image.
    samples : int
        Questions of the parity check.
    folder : Path
        Where to.
    options : sequence of str
        ``"flextok.weights={model}"``: options of methods, of which this one's are taken.

    Returns
    -------
    dict
        The pair, ``seconds``, and ``parity`` of the manifest with ``bytes`` and ``fixed``, or ``refused``: the reason.
    """
    model, method, target = pair
    to, _, precision = target.partition(":")
    call = [sys.executable, "-m", "vtok.cli", "export", model, str(folder), "--method", method, "--keep", keep]
    call += ["--to", to, "--samples", str(samples), "--overwrite", "--json"]
    call += ["--precision", precision] if precision else []
    for name, _, option in (text.partition(".") for text in options):
        call += ["--option", option.format(model=model)] if name == method else []
    started = time.monotonic()
    for more in ([], ["--fixed"]):
        ran = subprocess.run([*call, *more], capture_output=True, text=True)
        if ran.returncode == 0 or OFFER not in " ".join(ran.stderr.split()):
            break
    found: dict[str, Any] = {"model": model, "method": method, "target": target, "keep": keep}
    found["seconds"] = round(time.monotonic() - started, 1)
    if ran.returncode:
        said = " ".join(ran.stderr.split())
        return found | {"refused": said.rpartition("Error: ")[2] or f"it ended with {ran.returncode}"}
    manifest = json.loads(ran.stdout)
    size = sum(file["bytes"] for file in manifest["files"].values())
    return found | {"parity": manifest["parity"], "bytes": size, "fixed": bool(more), "versions": manifest["versions"]}


def tables(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table a model, methods down, targets across; reasons of refusals below."""
    reasons: list[str] = []
    blocks = []
    models, targets = (list(dict.fromkeys(line[key] for line in found)) for key in ("model", "target"))
    for model in models:
        own = {(line["method"], line["target"]): line for line in found if line["model"] == model}
        rows = [
            [f"`{method}`", *(_cell(own.get((method, target)), reasons) for target in targets)]
            for method in dict.fromkeys(method for method, _ in own)
        ]
        blocks.append("\n".join(table([model, *targets], rows)))
    blocks += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n\n".join(blocks) + "\n"


def _cell(line: Mapping[str, Any] | None, reasons: list[str]) -> str:
    if line is None:
        return ""
    if "refused" in line:
        if line["refused"] not in reasons:
            reasons.append(line["refused"])
        return f"- ({reasons.index(line['refused']) + 1})"
    parity = line["parity"]
    text = f"{parity['answers_equal']} of {parity['samples']}"
    if ":" in line["target"]:
        text = f"{100 * parity['accuracy']:.1f} % right, {100 * parity['reference_accuracy']:.1f} before"
    return text + (" (fixed)" if line["fixed"] else "")


def command(
    models: Annotated[str, typer.Argument(help="Names or folders with commas between.")] = "nano-llava,nano-qwen",
    method: Annotated[str, typer.Option(help="Methods with commas between.")] = METHODS,
    to: Annotated[str, typer.Option(help="Targets with commas between; onnx:int8 is one.")] = (
        "hf,onnx,onnx:int8,openvino,pt2"
    ),
    keep: Annotated[str, typer.Option(help="Visual tokens per image.")] = "64",
    samples: Annotated[int, typer.Option(help="Questions of each parity check.", min=1)] = 100,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="Of a method, such as flextok.weights={model}; {model} is the model."),
    ] = None,
    keep_folders: Annotated[bool, typer.Option(help="Leave the exported folders there, for vtok card.")] = False,
    out: Annotated[Path, typer.Option(help="For exports.jsonl and exports.md.")] = Path("exports"),
) -> None:
    """Export every pair, keep what the parity checks found, and print a table; a run that was stopped goes on."""
    out.mkdir(parents=True, exist_ok=True)
    lines = out / LINES
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    done = {(line["model"], line["method"], line["target"]) for line in found}
    if any(line["keep"] != keep for line in found):
        raise VtokError(f"{lines} holds exports at another budget than {keep}; give another --out")
    wanted = pairs(*(text.split(",") for text in (models, method, to)))
    missing = [pair for pair in wanted if pair not in done]
    with progress("exporting", len(missing)) as advance:
        for pair in missing:
            folder = out / "-".join([Path(pair[0]).name, pair[1], keep, pair[2].replace(":", "-")])
            line = attempt(pair, keep, samples, folder, option or ())
            if not keep_folders:
                shutil.rmtree(folder, ignore_errors=True)
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            found.append(line)
            advance(1)
    places = {pair: place for place, pair in enumerate(wanted)}
    asked = [line for line in found if (line["model"], line["method"], line["target"]) in places]
    asked.sort(key=lambda line: places[line["model"], line["method"], line["target"]])
    text = tables(asked)
    (out / TABLE).write_text(text, encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    alone(command)
