"""``python -m vtok_eval.models.tokenizer_card NAME --run FOLDER``: card of a trained image tokenizer."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vtok.bench.measure import machine
from vtok.cli import alone
from vtok.errors import VtokError
from vtok.tokenizers import FlexTok
from vtok.tokenizers.train import FINISHED, REPORT, SHEET
from vtok.tokenizers.train import parameters as learnt
from vtok_eval.harness.store import write_json
from vtok_eval.models.about import PICTURES as LICENCES
from vtok_eval.render.markdown import table
from vtok_eval.render.quality import draw
from vtok_eval.render.words import count

MEASURED, LOG, PLOT = "measured.json", "training.jsonl", "quality.png"
#: pictures of a batch whose encoding and decoding are timed, and how often
BATCH, ROUNDS = 32, 9
#: what PSNR does not tell
FLOW = (
    "A flow draws one picture of those that the tokens allow, with edges where the mean of all of them is a blur. So "
    "its PSNR is lower than a regression's on the same tokens: look at the pictures."
)


def speed(tokenizer: FlexTok) -> dict[str, Any]:
    """Pictures a second, encoded to all tokens and decoded from them, in this process's threads: the median round."""
    side = tokenizer.config.image_size
    images = torch.rand(BATCH, 3, side, side, generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            tokenizer.decode(tokenizer.encode(images))
            seconds.append(time.perf_counter() - start)
    return {"images_per_second": BATCH / statistics.median(seconds[1:]), "batch": BATCH, **machine(torch.device("cpu"))}


def card(
    name: str,
    measured: Mapping[str, Any],
    report: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    notes: str = "",
) -> str:
    """The text of the card.

    Parameters
    ----------
    name : str
        Of the tokenizer.
    measured : mapping
        ``measured.json``: sizes, and what ``speed`` gave.
    report : mapping
        ``report.json`` of its training, as ``vtok.tokenizers.train.assess`` writes it.
    log : sequence of mapping
        Of the training.
    notes : str
        How the shipped weights' training differed from what the command does, if it did.
    """
    last, speed = log[-1], measured["speed"]
    parts = [
        f"# Image tokenizer {name}",
        f"A picture of {measured['side']} x {measured['side']} pixels as 1 to {measured['tokens']} ordered tokens of "
        f"{measured['codes']:,} codes, and back; `{measured['decoder']}` decoder, {measured['parameters']:,} "
        f"parameters, {measured['megabytes']:.1f} MB ([docs/tokenizers.md](../../docs/tokenizers.md)).",
        f"```python\nfrom vtok.tokenizers import FlexTok\nfrom vtok_eval.models.tokenizers import folder\n\n"
        f'tokenizer = FlexTok.from_pretrained(folder("{name}"))\ntokens = tokenizer.encode(images)\n'
        "pictures = tokenizer.decode(tokens[:, :4])\n```",
        f"or `vtok tokenizer show {name} photo.jpg --out sheet.png`. It was trained on drawn scenes alone; photographs "
        "are beyond what it has seen.",
        *([FLOW] if measured["decoder"] == "flow" else []),
        "## Quality over the number of tokens",
        f"![PSNR over tokens, and what each position says]({PLOT})",
        *[part for key, found in report.items() for part in _set(key, found)],
        "## Speed",
        f"{speed['images_per_second']:.0f} pictures a second, encoded and decoded in batches of {speed['batch']}: "
        f"{speed['device']}, {count(speed['threads'], 'thread')}, torch {speed['torch']}.",
        "## Training",
        f"`python -m vtok_eval.train {name}-tokenizer`; {last['step']:,} batches, last loss {last['loss']:.4f}; the "
        "log is beside this card. Scenes are drawn on the fly: no picture comes twice.",
        *([notes.strip()] if notes.strip() else []),
        "## Licences",
        f"Weights: Apache-2.0.\n{LICENCES}",
    ]
    return "\n\n".join(parts) + "\n"


def _set(name: str, found: Mapping[str, Any]) -> list[str]:
    """What was measured on one set of pictures."""
    curve = found["curve"]
    rows = [
        [
            f"{row['k']}",
            f"{row['psnr']:.2f}",
            f"{row['ssim']:.3f}",
            f"{row['rise']:+.2f} \N{PLUS-MINUS SIGN} {row['rise_error']:.2f}" if "rise" in row else "",
        ]
        for row in curve["rows"]
    ]
    rises = "rises with every doubling" if curve["rises"] else "does not rise with every doubling"
    parts = [
        f"### {name}",
        f"{curve['pictures']} pictures that it was not trained on; PSNR {rises}.",
        "\n".join(table(["tokens", "PSNR, dB", "SSIM", "rise"], rows)),
        f"![What 1, 2, 4, ... tokens show]({SHEET.format(name)})",
    ]
    if (stats := found.get("statistics")) is not None:
        places = stats["positions"]
        dead = sum(own["dead"] for own in places)
        parts.append(
            f"Code usage: {stats['used']:,} codes in {stats['tokens']:,} tokens; {dead} of {len(places)} positions "
            f"dead, a dead tail of {stats['dead_tail']}."
        )
        parts.append("\n".join(table(["position", "codes", "entropy, bits", "at most", "of its digits", "commonest, %"],
                                     [_position(own) for own in places])))  # fmt: skip
    return parts


def _position(own: Mapping[str, Any]) -> list[str]:
    digits = "" if own["channels"] is None else f"{own['channels']:.2f}"
    cells = [f"{own['position'] + 1}", f"{own['distinct']}", f"{own['entropy']:.2f}", f"{own['ceiling']:.2f}"]
    return [*cells, digits, f"{100 * own['top']:.1f}"]


def command(
    name: Annotated[str, typer.Argument(help="Of the tokenizer: nano or nano-flow.")],
    run: Annotated[Path, typer.Option(help="Folder of its training.")],
    out: Annotated[Path, typer.Option(help="Folder of cards.")] = Path("model_cards"),
) -> None:
    """Write out/NAME-tokenizer: README.md and what it is made of, from a finished training and the training.md that
    lies there. Times the tokenizer."""
    report = run / REPORT
    if not report.is_file():
        raise VtokError(f"{run} holds no finished training ({REPORT} is missing); run the same training command again")
    tokenizer = FlexTok.from_pretrained(run / FINISHED)
    folder = out / f"{name}-tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    found = json.loads(report.read_text(encoding="utf-8"))
    for part in (REPORT, *(SHEET.format(key) for key in found)):
        (folder / part).write_bytes((run / part).read_bytes())
    (folder / LOG).write_bytes((run / "log.jsonl").read_bytes())
    weights = sum(path.stat().st_size for path in (run / FINISHED).iterdir())
    config = tokenizer.config
    sizes: dict[str, Any] = {
        "side": config.image_size,
        "tokens": config.tokens,
        "codes": tokenizer.codes,
        "decoder": config.decoder,
    }
    sizes |= {"parameters": learnt(tokenizer), "megabytes": weights / 1e6}
    write_json(folder / MEASURED, {**sizes, "speed": speed(tokenizer)})
    draw(found, folder / PLOT)
    (folder / "README.md").write_text(written(name, folder), encoding="utf-8")
    typer.echo(f"wrote {folder / 'README.md'}")


def written(name: str, folder: Path) -> str:
    """The card that the files beside it give."""
    measured, report = (json.loads((folder / part).read_text(encoding="utf-8")) for part in (MEASURED, REPORT))
    log = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    notes = folder / "training.md"
    return card(name, measured, report, log, notes.read_text(encoding="utf-8") if notes.is_file() else "")


if __name__ == "__main__":
    alone(command)
