"""Values of options as people type them."""

from __future__ import annotations

import json
from typing import Any

WORDS = {"None": None, "True": True, "False": False}


def option_value(text: str) -> Any:
    """What a text means as an option: JSON (``3``, ``null``, ``[1, 2]``, which becomes a tuple), or ``None``, ``True``
    and ``False`` as Python and vtok's own messages write them; anything else is itself."""
    if text in WORDS:
        return WORDS[text]
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return tuple(found) if isinstance(found, list) else found
