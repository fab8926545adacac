"""HTML from function calls: what is not markup already is escaped, always."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "col", "wbr"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def join(*children: Any) -> Html:
    """Children one after the other: markup as it is, all else escaped, ``None`` left out, lists unfolded."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, str):
            parts.append(escape(child))
        elif isinstance(child, Iterable):
            parts.append(str(join(*child)))
        else:
            parts.append(escape(str(child)))
    return Html("".join(parts))


def tag(kind: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. ``class_`` is ``class``, ``data_key`` is ``data-key``; ``True`` is a bare attribute, ``None`` and
    ``False`` none."""
    parts = [kind]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False:
            parts.append(f'{key}="{escape(str(value))}"')
    head = " ".join(parts)
    return Html(f"<{head}>") if kind in VOID else Html(f"<{head}>{join(*children)}</{kind}>")
