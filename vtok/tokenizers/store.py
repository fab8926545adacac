"""Tokens in a file: safetensors, as few bytes as their codes need, with what they were made from beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vtok.errors import VtokError
from vtok.tokenizers.bridge import TokenBridge

FORMAT = "1"
#: the narrowest kind that holds so many codes
KINDS = {2**8: torch.uint8, 2**16: torch.uint16, 2**32: torch.uint32, 2**63: torch.int64}


@dataclass(frozen=True)
class Tokens:
    """Tokens of some pictures.

    Attributes
    ----------
    rows : list of Tensor
        One a picture: (k,) long, or (k, d) float where they are continuous.
    labels : list of str
        What the pictures are called.
    codes : int or None
        Size of the codebook; ``None``: continuous.
    levels : tuple of int
        Digits of a code, the lowest first, where it has any.
    tokenizer : str
        Fingerprint of the tokenizer that made them.
    """

    rows: list[Tensor]
    labels: list[str] = field(default_factory=list)
    codes: int | None = None
    levels: tuple[int, ...] = ()
    tokenizer: str = ""


def fingerprint(tokenizer: Any) -> str:
    """The same for tokenizers with the same tokens, whatever their decoders; other for any others."""
    weight = tokenizer.to_tokens.weight.detach().cpu().float().numpy().tobytes()
    fields = json.dumps(tokenizer.config.deciding(), sort_keys=True)
    return hashlib.sha256(fields.encode() + weight).hexdigest()[:16]


def write(path: str | Path, tokens: Tokens, bridge: TokenBridge | None = None) -> int:
    """Write a file; its size in bytes.

    Parameters
    ----------
    path : str or Path
        Of the file.
    tokens : Tokens
        What it will hold.
    bridge : TokenBridge, optional
        Continuous tokens are written in its few bits a number (arXiv 2503.16430); in half precision without it.

    Raises
    ------
    VtokError
        There is nothing to write.
    """
    if not tokens.rows:
        raise VtokError("there are no tokens to write; encode one picture at least")
    flat = torch.cat([row.cpu() for row in tokens.rows])
    tensors = {"lengths": torch.tensor([len(row) for row in tokens.rows], dtype=torch.int32)}
    about: dict[str, Any] = {
        "labels": tokens.labels,
        "codes": tokens.codes,
        "levels": tokens.levels,
        "tokenizer": tokens.tokenizer,
    }
    if tokens.codes is not None:
        flat = flat.to(next(kind for most, kind in KINDS.items() if tokens.codes <= most))
    elif bridge is not None:
        about |= {"bits": bridge.bits, "shape": list(flat.shape)}
        tensors |= {"centre": bridge.centre, "spread": bridge.spread}
        flat = bridge.pack(bridge.encode(flat))
    else:
        flat = flat.half()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": flat, **tensors}, path, {"vtok_tokens": FORMAT, "about": json.dumps(about)})
    return path.stat().st_size


def read(path: str | Path) -> Tokens:
    """What ``write`` wrote, or the tokens of any other tokenizer.

    Parameters
    ----------
    path : str or Path
        A file of ``write``; or whole numbers in ``.safetensors`` (a table (images, positions) named ``tokens``, or the
        only one), in ``.npy``, or in ``.jsonl`` (a list a line, of any length).

    Raises
    ------
    VtokError
        No such file, or nothing that can be read as tokens.
    """
    path = Path(path)
    if not path.is_file():
        raise VtokError(f"there is no file {path}; give one that vtok tokenizer encode wrote")
    readers = {".safetensors": _safetensors, ".npy": _npy, ".jsonl": _jsonl}
    if path.suffix not in readers:
        raise VtokError(f"{path} has no ending of a tokens file; known are {', '.join(readers)}")
    try:
        return readers[path.suffix](path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, VtokError):
            raise
        raise VtokError(f"{path} cannot be read as tokens: {error}") from error


def _safetensors(path: Path) -> Tokens:
    with safe_open(path, "pt") as file:
        meta = file.metadata() or {}
        names = list(file.keys())
        if "vtok_tokens" not in meta:
            if "tokens" not in names and len(names) != 1:
                raise VtokError(f"{path} holds {', '.join(names)}; name the table of tokens 'tokens'")
            return _table(file.get_tensor("tokens" if "tokens" in names else names[0]), path)
        if meta["vtok_tokens"] != FORMAT:
            raise VtokError(f"{path} has format {meta['vtok_tokens']}, this vtok reads {FORMAT}: upgrade vtok")
        about = json.loads(meta["about"])
        flat, lengths = file.get_tensor("tokens"), file.get_tensor("lengths").tolist()
        bridge = None
        if "bits" in about:
            bridge = TokenBridge(about["bits"], file.get_tensor("centre"), file.get_tensor("spread"))
    if about["codes"] is not None:
        flat = flat.long()
    elif bridge is not None:
        flat = bridge.decode(bridge.unpack(flat, tuple(about["shape"])))
    else:
        flat = flat.float()
    return Tokens(
        list(flat.split(lengths)), about["labels"], about["codes"], tuple(about["levels"]), about["tokenizer"]
    )


def _table(table: Tensor, path: Path) -> Tokens:
    if table.ndim != 2 or table.is_floating_point():
        raise VtokError(f"{path} holds {table.dtype} {tuple(table.shape)}; give whole numbers (images, positions)")
    return Tokens(list(table.long()))


def _npy(path: Path) -> Tokens:
    import numpy

    return _table(torch.from_numpy(numpy.load(path, allow_pickle=False).astype("int64", casting="safe")), path)


def _jsonl(path: Path) -> Tokens:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or not all(isinstance(n, int) and not isinstance(n, bool) for line in lines for n in line):
        raise VtokError(f"{path} must hold a list of whole numbers a line, such as [17, 4, 250]")
    return Tokens([torch.tensor(line) for line in lines])


def of_length(tokens: Sequence[Tensor], k: int | None) -> list[Tensor]:
    """The first k of each."""
    return [row if k is None else row[:k] for row in tokens]
