"""vtok's models inside VLMEvalKit: it has a table of models and no plug-ins, so a function writes into the table.

>>> from vtok_eval.vlmevalkit import register
>>> register("vtok-llava", pretrained="llava-hf/llava-1.5-7b-hf", method="flowcut", keep=64)  # doctest: +SKIP
>>> from vlmeval.run import main  # doctest: +SKIP
>>> main()  # doctest: +SKIP
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vtok.errors import VtokError
from vtok_eval.answering import Answerer
from vtok_eval.arguments import OPTION, Arguments

#: not set in a table's partial, but passed by VLMEvalKit where a name holds "Qwen2-VL" and the like
USE_VLLM = "use_vllm"
OURS = "vtok"


def register(name: str = "vtok-llava", **settings: Any) -> functools.partial:
    """Insert a model into ``vlmeval.config.supported_VLM``; ``--model NAME`` then finds it in this process.

    VLMEvalKit files its predictions under the name alone, so give other settings another name.

    Parameters
    ----------
    name : str
        Free, or one that this function gave before.
    **settings
        ``pretrained``, ``method``, ``keep`` and whatever else ``vtok_eval.arguments.Arguments`` knows. Any other name
        is an option of the method, as in ``vtok.compress``.

    Returns
    -------
    functools.partial
        What went into the table: call it to build the model.

    Raises
    ------
    VtokError
        VLMEvalKit is not installed, the name is one of its own models, or the settings are wrong.
    """
    table = _table()
    known = set(Arguments.__dataclass_fields__)
    flat = {
        key if key in known or key.startswith(OPTION) else f"{OPTION}{key}": value for key, value in settings.items()
    }
    Arguments.of(flat).chain()  # a wrong setting shows here, not hours later
    if name in table and getattr(table[name], "keywords", {}).get(OURS) is not True:
        raise VtokError(f"VLMEvalKit has a model {name} of its own; register this one under another name")
    table[name] = functools.partial(model_class(), **{OURS: True}, **flat)
    return table[name]


@functools.cache
def model_class() -> type:
    """The class of the registered models; made when asked for, because its base comes from VLMEvalKit.

    Raises
    ------
    VtokError
        VLMEvalKit is not installed.
    """
    _table()
    from vlmeval.vlm.base import BaseModel

    class Vtok(BaseModel):
        """Answers one question at a time with a model under ``vtok.compress``."""

        INTERLEAVE = True
        allowed_types: ClassVar = ["text", "image", "video"]

        def __init__(self, **given: Any) -> None:
            super().__init__()
            given.pop(OURS, None)
            if given.pop(USE_VLLM, False):
                raise VtokError("vtok compresses models of transformers; leave --use-vllm out")
            self.arguments = Arguments.of(given)
            self.model, processor = self.arguments.open()
            self.answerer = Answerer(self.model, processor, self.arguments.pretrained)

        def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            """The answer to one message of VLMEvalKit: a list of ``{"type": "image" or "text", "value": ...}``."""
            return self._answer([{"role": "user", "content": _parts(message)}])

        def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            """The answer to the last of several turns."""
            return self._answer([{"role": turn["role"], "content": _parts(turn["content"])} for turn in message])

        def _answer(self, turns: list[dict[str, Any]]) -> str:
            prompt = self.answerer.prompt(turns)
            return self.answerer.answer([prompt], max_new_tokens=self.arguments.max_new_tokens)[0].text

    return Vtok


def _parts(message: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kinds = {"image": "image", "text": "text"}
    for part in message:
        if part["type"] not in kinds:
            raise VtokError(f"this data set asks about a {part['type']}; vtok's model reads text and pictures only")
    return [{"type": part["type"], kinds[part["type"]]: part["value"]} for part in message]


def _table() -> dict[str, Any]:
    try:
        from vlmeval.config import supported_VLM
    except ImportError as error:
        raise VtokError(
            f"VLMEvalKit cannot be imported ({error}); install it: pip install ms-vlmeval, or from its repository"
        ) from error
    return supported_VLM
