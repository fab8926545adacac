"""Settings as other harnesses hand them over: flat names and plain values, to a model under ``vtok.compress``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import vtok
from vtok.errors import VtokError
from vtok.geometry import geometries
from vtok.io import CONFIG, load
from vtok.method import Method, get, registry
from vtok.values import option_value
from vtok_eval import models
from vtok_eval.harness import loading
from vtok_eval.harness.ranks import Ranks

OPTION = "option_"


@dataclass(frozen=True)
class Arguments:
    """Which model, compressed how.

    Attributes
    ----------
    pretrained : str
        An embedded model (``nano-llava``), a folder, a repository of the hub, or a geometry with random weights.
    method : str or None
        A method or a chain of them (``"divprune+random_deep"``); ``None``: the plain model, or whatever settings the
        folder was saved with.
    keep : int, float or None
        Visual tokens per image averaged over the decoder layers, or a share of them.
    preset : str or None
        A published setting of the method, instead of ``keep``.
    positions : str
        As for ``vtok.compress``.
    compat : bool or None
        The authors' released behaviour, for methods that know the option.
    options : mapping
        Of the method by name; in a chain of the one method that has such an option, or by ``"method.name"``.
    dtype : str
        ``"auto"`` (the checkpoint's) or a type of torch, such as ``"bfloat16"``.
    device : str or None
        Where the model goes; ``None``: the first GPU if there is one.
    device_map, attn_implementation : str or None
        As for ``from_pretrained``.
    max_new_tokens : int
        Where the task sets none.
    """

    pretrained: str
    method: str | None = None
    keep: int | float | None = None
    preset: str | None = None
    positions: str = "auto"
    compat: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    max_new_tokens: int = 1024

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Arguments:
        """From flat arguments, where ``option_NAME`` is an option of the method.

        Raises
        ------
        VtokError
            A name that does not exist, no ``pretrained``, or settings that need a method and have none.
        """
        known = {item.name for item in dataclasses.fields(cls)} - {"options"}
        values, options = {}, dict(given.get("options") or {})
        for name, value in given.items():
            if name.startswith(OPTION):
                options[name.removeprefix(OPTION)] = _value(value)
            elif name in known:
                values[name] = None if value in ("", "none", "None") else value
            elif name != "options":
                listing = ", ".join(sorted(known))
                raise VtokError(f"there is no argument {name!r}; known are {listing} and {OPTION}NAME")
        if not values.get("pretrained"):
            raise VtokError("which model? give pretrained=..., a folder, a repository or an embedded model's name")
        made = cls(options=options, **{name: value for name, value in values.items() if value is not None})
        needing = [name for name in ("keep", "preset", "compat") if getattr(made, name) is not None]
        needing += [f"{OPTION}{name}" for name in options]
        if made.method is None and needing:
            raise VtokError(f"{', '.join(needing)} need a method; give method=..., such as method=divprune")
        return made

    def chain(self) -> list[Method]:
        """The methods with their options.

        Raises
        ------
        VtokError
            An unknown method or option, or an option that several methods of a chain have.
        """
        names = [] if self.method is None else self.method.split("+")
        for name in names:
            get(name)
        options = dict(self.options)
        own: dict[str, dict[str, Any]] = {name: {} for name in names}
        if self.compat is not None:
            able = [name for name in names if "compat" in _options(name)]
            if not able:
                raise VtokError(f"{self.method} has no released behaviour of its own to follow; leave compat out")
            for name in able:
                own[name]["compat"] = self.compat
        for option, value in options.items():
            owner, name = self._owner(option, names)
            own[owner][name] = value
        return [get(name, **own[name]) for name in names]

    def _owner(self, option: str, names: list[str]) -> tuple[str, str]:
        owner, dot, name = option.rpartition(".")
        if dot:
            if owner not in names:
                raise VtokError(f"{OPTION}{option} is of {owner}, which is not among {', '.join(names)}")
            return owner, name
        able = [method for method in names if option in _options(method)]
        if len(able) > 1:
            raise VtokError(f"{' and '.join(able)} both have {option}; write {OPTION}{able[-1]}.{option}=...")
        return (able or names)[0], option

    def open(self, device: Any = None) -> tuple[Any, Any]:
        """The model in eval mode, compressed as asked for, and its processor.

        Parameters
        ----------
        device : torch.device, optional
            Instead of the one asked for: a rank's own.

        Raises
        ------
        VtokError
            Nothing of that name, settings that do not fit the model, or no processor beside it.
        """
        chain, _ = self.chain(), self._dtype()  # a wrong name need not wait for the weights
        place = torch.device(device or loading.place(self.device, Ranks()))
        if self.pretrained in geometries():
            model, processor = loading.load(self.pretrained, self._dtype(), place)
        else:
            processor = loading.processor(self.pretrained)  # a second, where the weights take minutes
            model = self._model()
        if self.device_map is None:
            model = model.to(place)
        if chain:
            methods: Any = chain[0] if len(chain) == 1 else chain
            vtok.compress(model, methods, keep=self.keep, preset=self.preset, positions=self.positions)
        return model.eval(), processor

    def _model(self) -> Any:
        kw: dict[str, Any] = {"dtype": self._dtype()}
        for name in ("device_map", "attn_implementation"):
            if getattr(self, name) is not None:
                kw[name] = getattr(self, name)
        folder = loading.folder_of(self.pretrained)
        if self.method is None and folder is not None and (folder / CONFIG).is_file():
            return load(folder, **kw)
        return loading.model_of(self.pretrained, **kw)

    def _dtype(self) -> Any:
        if self.dtype == "auto" and (self.pretrained in models.MODELS or self.pretrained in geometries()):
            return torch.float32  # as in vtok eval, whatever the files hold
        if self.dtype == "auto" or isinstance(self.dtype, torch.dtype):
            return self.dtype
        found = getattr(torch, str(self.dtype), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise VtokError(f"dtype={self.dtype} is no floating type; take auto, float32, bfloat16 or float16")
        return found


def _options(method: str) -> list[str]:
    return [item.name for item in dataclasses.fields(registry()[method])]


def _value(given: Any) -> Any:
    """An option as JSON reads it: ``null``, lists as tuples; a harness may have made -1 a float."""
    if isinstance(given, str):
        given = None if given.lower() == "none" else option_value(given)
    if isinstance(given, float) and given < 0 and given.is_integer():
        return int(given)
    return tuple(given) if isinstance(given, list) else given
