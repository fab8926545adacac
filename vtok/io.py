"""Save a compressed model and load it again: plain weights plus ``vtok_config.json``, like a PEFT adapter."""

from __future__ import annotations

import dataclasses
import json
import logging
import reprlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vtok.api import adapter_of, compress, session_of
from vtok.errors import VtokError
from vtok.method import Method, get, registry

logger = logging.getLogger("vtok")

CONFIG = "vtok_config.json"
FORMAT = 1
#: module that ``vtok export --to hf`` puts beside the weights, for transformers' auto classes
SHIM = "modeling_vtok"


def save(model: nn.Module, folder: str | Path, *, weights: bool = True) -> Path:
    """Save a compressed model: its plain weights, and how it is compressed.

    Parameters
    ----------
    model : nn.Module
        A model under ``vtok.compress``.
    folder : str or Path
        Made where missing.
    weights : bool
        Also save weights and model config (``save_pretrained``); without them the folder holds settings only.

    Returns
    -------
    Path
        The path of ``vtok_config.json``.

    Raises
    ------
    VtokError
        The model is not compressed, a method is not registered, or an option cannot be written as JSON.
    """
    session = session_of(model)
    config = {
        "format": FORMAT,
        "vtok": _version(),
        "family": session.adapter.family,
        "methods": [],
        "keep": session.keep,
        "positions": session.positions,
    }
    folder = Path(folder)
    if folder.is_file():
        raise VtokError(f"{folder} is a file; vtok.save needs the name of a folder")
    config["methods"] = [_written(method.stored(folder)) for method in session.methods]
    text = json.dumps(config, indent=2) + "\n"
    if weights:
        plain_saver(session, model)(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: str | Path, *, model: nn.Module | None = None, **kw: Any) -> Any:
    """Load what ``save`` wrote and compress it in the same way.

    Parameters
    ----------
    folder : str or Path
        With ``vtok_config.json``, and weights unless ``model`` is given.
    model : nn.Module, optional
        Use this model instead of weights in the folder.
    **kw
        To ``from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation`` ...).

    Returns
    -------
    nn.Module
        The compressed model.

    Raises
    ------
    VtokError
        A file is missing or damaged, a method is not registered, or the settings do not fit the model.
    """
    folder = Path(folder)
    config = read_config(folder)
    methods = [read_method(entry, folder) for entry in config["methods"]]
    if model is None:
        model = plain(folder, **kw)
    elif kw:
        raise VtokError(f"{', '.join(kw)} go to from_pretrained, but a model was given; leave one of them out")
    family = adapter_of(model).family
    if family != config.get("family", family):
        logger.warning("vtok: the settings in %s are of a %s, this is a %s", folder, config["family"], family)
    return compress(model, methods, keep=config["keep"], positions=config["positions"])


def is_folder(name: str, known: Collection[str] = ()) -> bool:
    """Whether a name is meant as a folder that is here.

    A folder without a model that is called as a known model is not: results that were written to ``nano-llava`` would
    hide the model of that name from the next run.

    Parameters
    ----------
    name : str
        A folder, or any other name of a model.
    known : collection of str
        What else goes by a name.
    """
    return Path(name).is_dir() and (name not in known or (Path(name) / "config.json").is_file())


def plain(folder: str | Path, **kw: Any) -> Any:
    """The uncompressed model of a local folder, by the class that its config names.

    Raises
    ------
    VtokError
        No such folder, no model in it, or one that transformers cannot load.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VtokError(f"there is no folder {folder}; give one that vtok.save or save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise VtokError(
            f"{folder} holds no model (no config.json), only settings at most; pass the model: "
            "vtok.load(folder, model=model)"
        )
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        named = (getattr(config, "architectures", None) or [""])[0]
        auto: Any = transformers.AutoModelForImageTextToText
        # a bare tower or a base model without head has a class of its own, which the auto class would dress up
        cls = auto if named.endswith("ForConditionalGeneration") else getattr(transformers, named, auto)
        return _unmarked(cls.from_pretrained(folder, **kw).eval())
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VtokError(f"transformers cannot load the model in {folder}: {reason}") from error


def _unmarked(model: Any) -> Any:
    """Without the config's pointer to the shim, which a later ``save_pretrained`` would not write beside it."""
    named = getattr(model.config, "auto_map", None)
    if isinstance(named, dict) and all(str(name).rpartition("--")[2].startswith(f"{SHIM}.") for name in named.values()):
        del model.config.auto_map
    return model


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked contents of a folder's ``vtok_config.json``.

    Raises
    ------
    VtokError
        Missing, not JSON, of another format, or incomplete.
    """
    path = Path(folder) / CONFIG
    if not path.parent.is_dir():
        raise VtokError(
            f"there is no folder {folder}; vtok.load reads local folders that vtok.save wrote (fetch a hub repository "
            "with huggingface_hub.snapshot_download first)"
        )
    if not path.is_file():
        raise VtokError(
            f"{folder} holds no {CONFIG}; load a plain model with from_pretrained and call vtok.compress, or write the "
            "file with vtok.save"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise VtokError(f"{path} cannot be read as JSON ({error}); save the model again with vtok.save") from error
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise VtokError(f"{path} is no vtok config: it names no format; save the model again with vtok.save")
    if config["format"] > FORMAT:
        raise VtokError(
            f"{path} has format {config['format']}, written by vtok {config.get('vtok', 'of a later version')}; this "
            f"vtok {_version()} reads up to format {FORMAT}: upgrade vtok"
        )
    missing = [key for key in ("methods", "keep", "positions") if key not in config]
    if missing:
        raise VtokError(f"{path} lacks {', '.join(missing)}; save the model again with vtok.save")
    if not isinstance(config["methods"], list) or not config["methods"]:
        raise VtokError(f"{path} names no methods; save the model again with vtok.save")
    return config


def _version() -> str:
    import vtok

    return vtok.__version__


def plain_saver(session: Any, model: Any) -> Any:
    """``save_pretrained`` as it was before ``compress`` put its warning around it."""
    if not hasattr(model, "save_pretrained"):
        raise VtokError(
            f"{type(model).__name__} has no save_pretrained; save its weights yourself and the settings with "
            "vtok.save(model, folder, weights=False)"
        )
    for wrapped in session.wrapped:
        if wrapped.owner is model and wrapped.name == "save_pretrained":
            return wrapped.original
    return model.save_pretrained


def _written(method: Method) -> dict[str, Any]:
    name = method.name
    if registry().get(name) is not type(method):
        cls = type(method).__name__
        raise VtokError(
            f"{cls} is not registered, so a saved model could not find it again; put "
            f'@vtok.register("{cls.lower()}") on the class'
        )
    options = method.options()
    for option, value in options.items():
        try:
            same = _tuples(json.loads(json.dumps(value))) == _tuples(value)
        except (TypeError, ValueError):
            same = False
        if not same:
            raise VtokError(
                f"option {option}={reprlib.repr(value)} of {name} cannot be written as JSON; use numbers, strings, "
                "tuples or None"
            )
    return {"name": name, "options": options}


def read_method(entry: Any, folder: Path) -> Method:
    """One method of a ``vtok_config.json``, with its files in ``folder``.

    Raises
    ------
    VtokError
        No name, a method that is not registered here, or options that it does not know.
    """
    name, options = (entry.get("name"), entry.get("options", {})) if isinstance(entry, Mapping) else (None, None)
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise VtokError(f"{folder / CONFIG} has a method without a name; save the model again with vtok.save")
    if name not in registry():
        raise VtokError(
            f"{folder / CONFIG} asks for the method {name!r}, which is not registered here; import the module with its "
            f"@vtok.register({name!r}) before vtok.load, or install the package that brings it"
        )
    listed = {item.name for item in dataclasses.fields(registry()[name]) if item.default_factory is list}
    options = {option: value if option in listed else _tuples(value) for option, value in options.items()}
    return get(name, **options).restored(folder)


def _tuples(value: Any) -> Any:
    """JSON knows no tuples: every list of an option was one."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_tuples(item) for item in value)
    return value
