"""From files to files: what the commands of ``vtok tokenizer`` do, one function each."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image

from vtok.errors import VtokError
from vtok.progress import progress
from vtok.tokenizers import metrics, stats, store
from vtok.tokenizers.bridge import TokenBridge
from vtok.tokenizers.data import Pictures
from vtok.tokenizers.flextok import CONFIG, FlexTok
from vtok.tokenizers.pictures import reconstructions
from vtok.tokenizers.train import FINISHED, levels, stream, views

#: name -> function of the name that returns a tokenizer's folder
GROUP = "vtok.tokenizers"


def device_of(name: str | None) -> str:
    """``--device``, or cuda where there is one.

    Raises
    ------
    VtokError
        There is no such device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise VtokError(f"there is no {name} on this machine; leave --device out")
    return name


def vae_of(folder: Path | None, device: str) -> Any:
    """A diffusers autoencoder from a folder, ``None`` from none.

    Raises
    ------
    VtokError
        diffusers is missing, or cannot load it.
    """
    if folder is None:
        return None
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise VtokError("--vae needs the package diffusers, which is not installed: pip install diffusers") from error
    try:
        return AutoencoderKL.from_pretrained(folder).to(device).eval()
    except (OSError, ValueError) as error:
        raise VtokError(f"diffusers cannot load a VAE from {folder}: {str(error).strip().splitlines()[0]}") from error


def tokenizer(name: str, device: str | None = None, vae: Path | None = None) -> FlexTok:
    """A tokenizer from its folder, from the folder of a training, or by the name of an installed one.

    Raises
    ------
    VtokError
        It is none of these, or cannot be loaded.
    """
    place, folder = device_of(device), Path(name)
    if not folder.is_dir():
        installed = {entry.name: entry for entry in entry_points(group=GROUP)}
        if name not in installed:
            known = f" ({', '.join(installed)})" if installed else ""
            raise VtokError(
                f"{name} is neither a folder nor an installed tokenizer{known}; train one: vtok tokenizer train"
            )
        folder = installed[name].load()(name)
    elif not (folder / CONFIG).is_file() and (folder / FINISHED / CONFIG).is_file():
        folder = folder / FINISHED
    return FlexTok.from_pretrained(folder, vae=vae_of(vae, place)).to(place)


@torch.no_grad()
def encode(
    tok: FlexTok,
    pictures: Pictures,
    out: Path,
    *,
    k: int | str | None = None,
    quality: float = 0.05,
    bits: int | None = None,
    limit: int | None = None,
    batch: int = 32,
) -> dict[str, Any]:
    """Pictures to a file of tokens.

    Returns
    -------
    dict
        ``"pictures"``, ``"tokens"``, ``"bytes"`` and ``"left_out"`` (label -> reason).

    Raises
    ------
    VtokError
        No picture can be read, or ``bits`` for tokens that are discrete already.
    """
    if bits is not None and tok.codes is not None:
        raise VtokError("--bits is for continuous tokens; this tokenizer's are whole numbers already, leave it out")
    rows: list[torch.Tensor] = []
    labels: list[str] = []
    odd: dict[str, str] = {}
    for images, names in stream(pictures, tok.config.image_size, limit, odd, batch):
        rows += [row.cpu() for row in tok.encode(images, k, quality=quality)]
        labels += names
    tokens = store.Tokens(rows, labels, tok.codes, levels(tok), store.fingerprint(tok))
    size = store.write(out, tokens, None if bits is None else TokenBridge.fit(torch.cat(rows), bits))
    return {"pictures": len(rows), "tokens": sum(map(len, rows)), "bytes": size, "left_out": odd}


def decode(
    tok: FlexTok,
    path: Path,
    out: Path,
    *,
    k: int | None = None,
    limit: int | None = None,
    batch: int = 32,
    **decoding: Any,
) -> list[Path]:
    """A file of tokens to pictures.

    Raises
    ------
    VtokError
        The tokens are another tokenizer's.
    """
    tokens = store.read(path)
    own = store.fingerprint(tok)
    if tokens.tokenizer and tokens.tokenizer != own:
        raise VtokError(
            f"{path} was written by another tokenizer ({tokens.tokenizer}, this is {own}); decode with that"
        )
    rows = store.of_length(tokens.rows[:limit], k)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with progress("decode", len(rows)) as advance:
        for first in range(0, len(rows), batch):
            for place, image in enumerate(tok.decode(rows[first : first + batch], **decoding), first):
                # a label is whatever the file says: of its path no more than the name is taken
                name = PurePosixPath(tokens.labels[place]).stem if place < len(tokens.labels) else ""
                target = out / (f"{place:06d}-{name}.png" if name else f"{place:06d}.png")
                to_pil_image(image.cpu()).save(target)
                written.append(target)
                advance(1)
    return written


def show(
    tok: FlexTok,
    pictures: Pictures,
    out: Path,
    *,
    ks: Sequence[int] | None = None,
    rows: int = 8,
    limit: int = 64,
    **decoding: Any,
) -> dict[str, Any]:
    """A picture of reconstructions, and the curve over k that goes with it.

    Raises
    ------
    VtokError
        No picture can be read, or the file cannot be written.
    """
    batches, odd = views(pictures, tok.config.image_size, limit)
    sheet = reconstructions(tok, torch.cat(batches)[:rows], ks, **decoding)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise VtokError(f"cannot write the picture {out}: {error}; give a name such as out.png") from error
    with progress("reconstruct", sum(map(len, batches))) as advance:
        curve = metrics.curve(tok, batches, ks, advance=advance, **decoding)
    return {"name": pictures.name, "picture": str(out), "left_out": odd, "curve": curve.as_dict()}


def count(path: str | Path, codes: int | None, digits: Sequence[int], seed: int) -> stats.Statistics:
    """Statistics of a file of tokens."""
    tokens = store.read(path)
    return stats.statistics(tokens.rows, codes or tokens.codes, levels=digits or tokens.levels, seed=seed)


@torch.no_grad()
def count_with(tok: FlexTok, pictures: Pictures, limit: int, seed: int) -> stats.Statistics:
    """Statistics of what a tokenizer makes of pictures.

    Raises
    ------
    VtokError
        Its tokens are continuous.
    """
    if tok.codes is None:
        raise VtokError(
            "this tokenizer's tokens are continuous and have no codes to count; take one with fsq, vq or binary"
        )
    found = [tok.encode(images).cpu() for images, _ in stream(pictures, tok.config.image_size, limit, {})]
    return stats.statistics(torch.cat(found), tok.codes, levels=levels(tok), seed=seed)
