"""The public calls: compress, restore, compressed, budget, report, save, load."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from vtok import report as reports
from vtok.budget import check_keep
from vtok.engine.plan import automatic, parse_keep, shape_of
from vtok.engine.session import Session
from vtok.errors import VtokError
from vtok.method import Method, registry, resolve
from vtok.protocol import Adapter
from vtok.report import Report

logger = logging.getLogger("vtok")
SESSION = "_vtok"
_ADAPTERS: dict[str, type[Adapter]] = {}


def register_adapter(cls: type[Adapter]) -> type[Adapter]:
    """Class decorator: teach vtok a model family. Installed packages use the entry-point group ``vtok.adapters``."""
    if not (isinstance(cls, type) and issubclass(cls, Adapter)) or not cls.family:
        raise VtokError(f"{cls!r} is no vtok adapter; derive it from vtok.protocol.Adapter and give it a family name")
    _ADAPTERS[cls.family] = cls
    return cls


def families() -> list[str]:
    """Names of the model families vtok knows, built-in ones and those of installed packages."""
    return sorted(_adapters())


def _adapters() -> dict[str, type[Adapter]]:
    found = dict(_ADAPTERS)  # first, so that one of them may take over a model
    for cls in _installed():
        found.setdefault(cls.family, cls)
    return found


@cache
def _installed() -> tuple[type[Adapter], ...]:
    """Adapters of installed packages: looked up once, which is 4 % of a small model's prefill."""
    return tuple(entry.load() for entry in entry_points(group="vtok.adapters"))


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises:
        VtokError: no family knows it.
    """
    for cls in _adapters().values():
        if cls.matches(model):
            return cls(model)
    raise VtokError(
        f"{type(model).__name__} belongs to no family vtok knows ({', '.join(families())}); pass the model itself, not "
        "a wrapper or pipeline, or write an adapter in six steps, see CONTRIBUTING"
    )


def methods(family: str | None = None) -> list[str]:
    """Names of all methods, or of those that can serve a family."""
    if family is None:
        return list(registry())
    if family not in _adapters():
        raise VtokError(f"there is no family {family!r}; known are {', '.join(families())}")
    return [name for name, cls in registry().items() if cls.serves(family)]


def compress(
    model: nn.Module,
    method: str | Method | Sequence[str | Method],
    *,
    keep: int | float | str | None = None,
    preset: str | None = None,
    positions: str = "auto",
    **options: Any,
) -> Any:
    """Prune or merge a model's visual tokens from now on. The model is changed in place (hooks only) and returned.

    Args:
        model: a vision-language model of transformers (or a bare vision transformer, for methods that act inside one).
        method: a name (``vtok.methods()``), a ``Method``, or a list of them, composed by site.
        keep: visual tokens per image averaged over the decoder layers: an int, or a share in (0, 1]. ``"auto"``: as
            many as each picture needs, for methods that can tell.
        preset: one of the method's published settings, instead of ``keep`` and options.
        positions: ``"keep"`` (survivors keep their position ids), ``"reindex"`` (ids are closed up), ``"auto"`` (the
            authors' choice; always ``"keep"`` on the Qwen families).
        **options: the method's options.

    Returns:
        ``model``.

    Raises:
        VtokError: with one sentence on what is wrong and what to do; the model is then left as it was.
    """
    if preset is not None:
        method, keep, options = _apply_preset(method, preset, keep, options)
    chain = resolve(method, options)
    adapter = adapter_of(model)
    shape = shape_of(adapter)
    for item in chain:
        reason = item.refuse(shape)
        if reason:
            raise VtokError(
                f"{item.name or type(item).__name__} cannot serve {adapter.family}: {reason}; methods that can: "
                f"{', '.join(methods(adapter.family))}"
            )
    late = next((item for item in chain[1:] if item.whole), None)
    if late is not None:
        raise VtokError(
            f"{late.name} reads whole pictures, and {chain[0].name} would thin them before it; put {late.name} first, "
            "with methods behind it that act between tower and language model or in the decoder"
        )
    wanted, chain = automatic(keep, chain)
    budget_ = parse_keep(wanted, chain)
    policy = _positions(positions, chain, adapter)
    _check_text(adapter)
    chain = tuple(item.prepare(model) for item in chain)
    session = Session(model, adapter, chain, budget_, policy)
    session.check_budget()
    previous = model.__dict__.get(SESSION)
    if previous is not None:
        logger.info("vtok: %s replaces %s on this model", session.name, previous.name)
        restore(model)
    try:
        session.install()
    except BaseException:
        if previous is not None:
            previous.install()
            model.__dict__[SESSION] = previous
        raise
    model.__dict__[SESSION] = session
    return model


def _apply_preset(method: Any, preset: str, keep: Any, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    chain = list(resolve(method, {}))
    owner = next((i for i in reversed(range(len(chain))) if preset in chain[i].presets), None)
    if owner is None:
        known = sorted({name for item in chain for name in item.presets})
        raise VtokError(f"there is no preset {preset!r} here; known are: {', '.join(known) or 'none'}")
    settings = dict(chain[owner].presets[preset])
    budget_ = settings.pop("keep")
    chain[owner] = resolve(chain[owner], {**settings, **options})[0]
    return (chain[0] if len(chain) == 1 else chain), (budget_ if keep is None else keep), {}


def _positions(positions: str, chain: Sequence[Method], adapter: Adapter) -> str:
    if positions not in ("auto", "keep", "reindex"):
        raise VtokError(f'positions={positions!r} is unknown; take "auto", "keep" or "reindex"')
    if positions == "auto":
        wanted = chain[-1].positions
        return wanted if wanted in adapter.positions else "keep"
    if positions not in adapter.positions:
        raise VtokError(
            f"positions={positions!r} makes no sense on {adapter.family}: its rotary positions are rows and columns of "
            'the picture; use positions="keep"'
        )
    return positions


def _check_text(adapter: Adapter) -> None:
    """Sliding-window layers count distance in columns, which pruning changes: refuse rather than be subtly wrong."""
    if adapter.text is None:
        return
    config: Any = adapter.text.config
    kinds = getattr(config, "layer_types", None)
    sliding = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
    if sliding and getattr(config, "use_sliding_window", True):
        raise VtokError(
            f"this decoder uses sliding-window attention (window {config.sliding_window}), which vtok does not support "
            "yet; set sliding_window=None in its text config if your prompts are shorter than the window"
        )


def restore(model: nn.Module) -> Any:
    """Take compression off again; the model is as it was found. Does nothing on a plain model."""
    session = model.__dict__.pop(SESSION, None)
    if session is not None:
        session.remove()
    return model


def session_of(model: nn.Module) -> Session:
    """The session of a compressed model.

    Raises:
        VtokError: the model is not compressed.
    """
    session = model.__dict__.get(SESSION)
    if session is None:
        raise VtokError('this model is not compressed; call vtok.compress(model, "divprune", keep=64) first')
    return session


@contextmanager
def compressed(model: nn.Module, method: str | Method | Sequence[str | Method], **kwargs: Any) -> Iterator[Any]:
    """``compress`` for a block; restores what was there before on the way out, also after an exception."""
    previous = model.__dict__.get(SESSION)
    compress(model, method, **kwargs)
    try:
        yield model
    finally:
        restore(model)
        if previous is not None:
            previous.install()
            model.__dict__[SESSION] = previous


@contextmanager
def budget(model: nn.Module, keep: int | float) -> Iterator[Any]:
    """Another budget for the calls of a block."""
    session = session_of(model)
    before, session.keep = session.keep, check_keep(keep)
    try:
        yield model
    finally:
        session.keep = before


def report(model: nn.Module) -> Report:
    """What the last prefill of a compressed model did.

    Raises:
        VtokError: the model is not compressed, or nothing has run through it yet.
    """
    session = session_of(model)
    if session.last is None and session.last_text is None:
        finished = getattr(session.tower, "finished", None)
        if finished is not None:
            return reports.of_tower(finished, session.name, float(session.keep), session.adapter.family)
        raise VtokError("nothing has run through this model since vtok.compress; run a forward or generate first")
    batch = session.last_text[0] if session.last_text is not None else 0
    if session.last is not None:
        batch = session.last.segments[0].index.shape[0]
    text: Any = session.adapter.text
    return reports.of_prefill(
        session.last, batch, session.name, float(session.keep), session.adapter.family, text.config, session.depth
    )
