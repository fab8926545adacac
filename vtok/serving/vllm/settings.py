"""Where the settings of a served model come from, and what they may say."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtok.errors import VtokError
from vtok.io import CONFIG, read_config, read_method
from vtok.method import Method, get
from vtok.serving.vllm import OFF, VARIABLE

KEYS = ("method", "options", "methods", "keep", "positions")


@dataclass(frozen=True)
class Settings:
    """What compresses a served model: as for ``vtok.compress``, with the place they come from for messages."""

    methods: tuple[Method, ...]
    keep: int | float
    positions: str
    source: str


def find(folder: str | Path, overrides: Any = None) -> Settings | None:
    """Settings of the model in ``folder``: ``--hf-overrides``, else ``VTOK_VLLM``, else its ``vtok_config.json``.

    Args:
        folder: what vLLM was given as the model; only a local folder can hold ``vtok_config.json``.
        overrides: the attribute ``vtok`` of the model's configuration, which ``--hf-overrides '{"vtok": ...}'`` sets:
            settings, ``False`` for none, or ``None`` where it was not given.

    Returns:
        ``None`` where nothing switches compression on.

    Raises:
        VtokError: settings that cannot be read, or that leave something out.
    """
    if overrides is not None:
        return None if overrides is False else parse(overrides, Path(folder), '--hf-overrides {"vtok": ...}')
    given = os.environ.get(VARIABLE, "").strip()
    if given.lower() in OFF:
        return None
    if given:
        return _from_variable(given, Path(folder))
    if (Path(folder) / CONFIG).is_file():
        return parse(read_config(folder), Path(folder), str(Path(folder) / CONFIG))
    return None


def _from_variable(given: str, folder: Path) -> Settings:
    if given.startswith("{"):
        try:
            return parse(json.loads(given), folder, VARIABLE)
        except ValueError as error:
            raise VtokError(f"{VARIABLE} is no JSON ({error}); write it like {EXAMPLE}") from error
    path = Path(given)
    if path.is_dir():
        return parse(read_config(path), path, str(path / CONFIG))
    if path.name == CONFIG:
        return parse(read_config(path.parent), path.parent, given)
    raise VtokError(f"{VARIABLE}={given!r} is neither JSON nor a folder with {CONFIG}; write it like {EXAMPLE}")


EXAMPLE = """'{"method": "divprune", "keep": 64}'"""


def parse(given: Any, folder: Path, source: str) -> Settings:
    """Settings from what a file, an override or the variable holds.

    Either the form of ``vtok_config.json`` (``methods`` is a list), or ``{"method": ..., "options": {...}}``; ``keep``
    in both, ``positions`` where it matters.

    Raises:
        VtokError: something is missing, unknown, or of the wrong kind.
    """
    if not isinstance(given, Mapping):
        raise VtokError(f"the settings in {source} are no JSON object; write them like {EXAMPLE}")
    if "format" not in given:
        unknown = sorted(set(given) - set(KEYS))
        if unknown:
            raise VtokError(f"{source} holds {', '.join(unknown)}, which is unknown; it may hold {', '.join(KEYS)}")
    if ("method" in given) == ("methods" in given):
        raise VtokError(f'{source} needs "method" (one name) or "methods" (a list), not both; write it like {EXAMPLE}')
    if "keep" not in given:
        raise VtokError(f'{source} needs a budget: add "keep", such as 64 (tokens per image) or 0.25 (share of them)')
    if "method" in given:
        methods: Sequence[Method] = (get(given["method"], **given.get("options", {})),)
    else:
        methods = [read_method(_entry(item), folder) for item in given["methods"]]
    return Settings(tuple(methods), given["keep"], given.get("positions", "auto"), source)


def _entry(item: Any) -> Any:
    return {"name": item} if isinstance(item, str) else item
