"""What is measured, as tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

#: so few tokens a code say little about how often codes occur
FEW = 10


def report(found: Mapping[str, Any]) -> None:
    """What ``assess`` found on each set of pictures."""
    for name, entry in found.items():
        for label, reason in entry["left_out"].items():
            Console(stderr=True).print(f"left out {label}: {reason}", style="yellow", highlight=False)
        curve(name, entry["curve"])
        if "statistics" in entry:
            positions(entry["statistics"])


def curve(name: str, found: Mapping[str, Any]) -> None:
    """PSNR and SSIM over k."""
    rows = []
    for row in found["rows"]:
        rise = f"{row['rise']:+.2f} ± {row['rise_error']:.2f}" if "rise" in row else ""
        rows.append([f"{row['k']}", f"{row['psnr']:.2f}", f"{row['ssim']:.3f}", rise])
    _print(f"{name}: {found['pictures']} pictures", ["tokens", "PSNR, dB", "SSIM", "rise of PSNR"], rows)


def statistics(found: Mapping[str, Any]) -> None:
    """All that ``stats`` counts."""
    console = Console()
    console.print(
        f"{found['images']} images, {found['tokens']} tokens, {found['used']} of {found['codes']} codes used",
        highlight=False,
    )
    if found["tokens"] < FEW * found["codes"]:
        console.print(
            f"fewer than {FEW} tokens a code: entropies are floors, and Huffman's code knows the sample by heart",
            style="yellow",
            highlight=False,
        )
    rows = [[f"{fit['n']}", f"{fit['distinct']}", f"{fit['entropy']:.2f}", *_fit(fit)] for fit in found["zipf"]]
    _print("Zipf's law of n-grams", ["n", "distinct", "entropy, bits", "exponent", "KS distance"], rows)
    rows = [[f"{images}", f"{100 * share:.1f} %"] for images, share in found["innovation"]]
    _print("codes shown by the first images", ["images", "of all that are used"], rows)
    rows = [[name.replace("_", " "), f"{value:.3f}"] for name, value in found["compression"].items() if name != "saved"]
    _print("bits a token", ["code", "bits"], rows)
    positions(found)


def positions(found: Mapping[str, Any]) -> None:
    """What each position says: 1, 2, 4, ... and the last, and how many are dead."""
    every = found["positions"]
    last = len(every) - 1
    chosen = sorted({*(p for p in (0, *(2**e - 1 for e in range(1, 12))) if p <= last), last})
    rows = []
    for own in (every[place] for place in chosen):
        channels = "" if own["channels"] is None else f"{own['channels']:.2f}"
        row = [
            f"{own['position'] + 1}",
            f"{own['distinct']}",
            f"{own['entropy']:.2f}",
            f"{own['ceiling']:.2f}",
            channels,
        ]
        rows.append([*row, f"{100 * own['top']:.1f} %", "dead" if own["dead"] else ""])
    heads = ["position", "codes", "entropy, bits", "at most", "of its digits", "commonest", ""]
    dead = sum(own["dead"] for own in every)
    _print(f"positions: {dead} of {len(every)} dead, a dead tail of {found['dead_tail']}", heads, rows)


def _fit(fit: Mapping[str, Any]) -> list[str]:
    if fit["exponent"] is None:
        return ["too few repeats", ""]
    return [f"{fit['exponent']:.3f} ± {fit['error']:.3f}", f"{fit['distance']:.3f}"]


def _print(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
