"""The base class of every method, and the registry that finds them by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

import vtok_kernels as kernels
from vtok.errors import VtokError
from vtok.view import Selection, Shape, Stage


@dataclass(frozen=True)
class Method:
    """A compression method: a frozen record of options with pure functions. It knows no model.

    The short way is to set ``site`` (and ``layer`` for encoder and decoder sites) and to write ``score``: the best
    tokens stay. Override ``select`` for anything but top-k, ``stages`` for more than one action.

    Class attributes:
        site: where it acts first: ``"encoder"``, ``"input"`` or ``"decoder"``.
        layer: for encoder and decoder: before which layer.
        reads: what the engine must record for the views (see ``vtok.view.Stage``).
        positions: the authors' position policy on families that allow both.
        whole: it reads whole pictures, so no method may thin them before it.
        blind: its choice follows from layout and seed alone, and what it merges are fixed averages.
        late: the option that leaves its stages inside the decoder out, set to ``None``.
        exact: it keeps as many tokens as it is told to; grids that have to fit keep fewer.
        newlines: the tower site's rule for newline tokens of tiled images: ``"drop"`` or ``"keep"``.
        presets: published budgets and settings by name.
        refusals: family -> reason, where the method cannot serve a family.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    site: ClassVar[str] = "input"
    layer = None
    reads: ClassVar[frozenset[str]] = frozenset()
    positions: ClassVar[str] = "keep"
    whole: ClassVar[bool] = False
    blind: ClassVar[bool] = False
    late: ClassVar[str] = ""
    exact: ClassVar[bool] = True
    newlines: ClassVar[str] = "drop"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    refusals: ClassVar[Mapping[str, str]] = {}

    def score(self, view: Any) -> Tensor:
        """(G, n) importance of each token; higher stays."""
        raise NotImplementedError(f"{type(self).__name__} defines neither score nor select")

    def select(self, view: Any, count: int) -> Tensor | Selection:
        """(G, count) indices that stay, ascending; a (G, n) bool mask where the count depends on the data."""
        return kernels.topk(self.score(view), count)

    def stages(self, shape: Shape) -> Sequence[Stage]:
        """Actions on a model of this shape, in order of execution."""
        layer = self.default_layer(shape)
        return (Stage(self.site, layer, self.select, reads=self.reads, share=getattr(self, "share", 0.5)),)

    def default_layer(self, shape: Shape) -> int | None:
        """``layer`` checked against the model's depth."""
        layer = getattr(self, "layer", None)
        if self.site == "input":
            return None
        depth = shape.depth if self.site == "decoder" else shape.tower_depth
        if layer is None or not 0 < layer < depth:
            raise VtokError(
                f"{self.name or type(self).__name__} acts before {self.site} layer {layer}, but this model has layers "
                f"0 to {depth - 1}; pass layer= between 1 and {depth - 1}"
            )
        return layer

    def prepare(self, model: nn.Module) -> Method:
        """The method as it will act on this model: ``vtok.compress`` calls this once, before any hook goes in.

        For methods that measure something first (``random_deep`` with ``layer="auto"``).
        """
        return self

    def automatic(self) -> tuple[Method, int | float] | None:
        """For ``keep="auto"``: the method as it then acts, and the most it may keep. ``None``: it has no such mode."""
        return None

    def fixed(self, view: Any, count: int) -> tuple[Tensor, Callable[[Tensor], Tensor] | None] | None:
        """For exported graphs: a choice that does not depend on the picture. ``None``: it does.

        Returns:
            (count,) positions that stay, ascending, the same for every span of the view's layout, and what makes
            tokens (G, count, D) of the view's features (``None``: they stay as they are).
        """
        if not self.blind:
            return None
        # the rows of an identity matrix come out as the shares of each token
        probe = torch.eye(view.size, device=view.features.device)[None]
        answer = self.select(dataclasses.replace(view, features=probe, tokens=view.tokens[:1], places=(0,)), count)
        if isinstance(answer, Tensor):
            return answer[0], None
        shares = answer.features
        if shares is None:
            return answer.indices[0], None
        return answer.indices[0], lambda features: (shares @ features.to(shares.dtype)).to(features.dtype)

    def stored(self, folder: Path) -> Method:
        """The method as ``vtok.save`` writes it down; what its options cannot hold (trained weights) goes into files in
        ``folder``."""
        return self

    def restored(self, folder: Path) -> Method:
        """What ``stored`` wrote down, with its files in ``folder``."""
        return self

    def variants(self, shape: Shape) -> Sequence[Mapping[str, Any]]:
        """Changes of options that ``vtok tune`` tries on a model of this shape, beside the presets."""
        return ()

    def digest(self) -> str:
        """Tells trained weights apart that the options only name; answers depend on it. Empty where there are none."""
        return ""

    def refuse(self, shape: Shape) -> str | None:
        """Why this method cannot serve a model of this shape, or ``None``."""
        if self.site == "encoder" and shape.tower_depth == 0:
            return "it acts inside a vision tower, and this model has none"
        if self.site != "encoder" and shape.depth == 0:
            return "it acts in front of or inside a language model, and this model has none"
        return self.refusals.get(shape.family)

    @classmethod
    def serves(cls, family: str) -> bool:
        """Whether a family is not refused outright."""
        bare = family in BARE
        return family not in cls.refusals and (cls.site == "encoder" if bare else True)

    def options(self) -> dict[str, Any]:
        """Options that differ from their defaults, for reports and ``vtok_config.json``."""
        changed = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                changed[item.name] = value
        return changed


#: families of vision transformers without a language model
BARE = ("hf_vit", "timm_vit", "open_clip_vit")

_REGISTRY: dict[str, type[Method]] = {}
_T = TypeVar("_T", bound=type[Method])
_loaded = False


def register(name: str) -> Callable[[_T], _T]:
    """Class decorator: make a method available by name in ``vtok.compress``, the command line and the benchmarks."""

    def decorate(cls: _T) -> _T:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise VtokError(f"{cls!r} is not a vtok.Method; derive the class from vtok.Method before registering it")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


def _load() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    import vtok.methods  # noqa: F401  (registers the built-in methods)

    for entry in entry_points(group="vtok.methods"):
        found = entry.load()
        if isinstance(found, type) and issubclass(found, Method) and entry.name not in _REGISTRY:
            register(entry.name)(found)


def registry() -> dict[str, type[Method]]:
    """All known methods by name, built-in ones and those of installed packages."""
    _load()
    return dict(sorted(_REGISTRY.items()))


def get(name: str, **options: Any) -> Method:
    """A method by name with its options.

    Raises:
        VtokError: unknown name (lists the known ones) or option (lists the method's options).
    """
    known = registry()
    if name not in known:
        raise VtokError(f"there is no method {name!r}; known are {', '.join(known)}")
    cls = known[name]
    _check_options(cls, options)
    return cls(**options)


def _check_options(cls: type[Method], options: Mapping[str, Any]) -> None:
    fields = [item.name for item in dataclasses.fields(cls)]
    name = cls.name or cls.__name__
    unknown = [option for option in options if option not in fields]
    if unknown:
        listing = ", ".join(fields) if fields else "none"
        raise VtokError(f"{name} has no option {', '.join(map(repr, unknown))}; its options are: {listing}")
    _check_types(cls, name, options)


def _check_types(cls: type[Method], name: str, options: Mapping[str, Any]) -> None:
    try:
        hints = get_type_hints(cls)
    except Exception:  # annotations of a third party that do not resolve
        return
    for option, value in options.items():
        kinds = get_args(hints[option]) if isinstance(hints[option], UnionType) else (hints[option],)
        kinds = tuple(get_origin(kind) or kind for kind in kinds)
        if not all(isinstance(kind, type) for kind in kinds):
            continue
        wide = (*kinds, *((int,) if float in kinds else ()), *((list,) if tuple in kinds else ()))
        if not isinstance(value, wide) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            default = next(item.default for item in dataclasses.fields(cls) if item.name == option)
            raise VtokError(f"{name} takes {wanted} as {option}, not {value!r}; its default is {default!r}")


def resolve(method: str | Method | Sequence[str | Method], options: Mapping[str, Any]) -> tuple[Method, ...]:
    """The methods a user asked for, checked, in order of their sites.

    Raises:
        VtokError: nothing given, something that is no method, unknown options, options beside a list.
    """
    if isinstance(method, (str, Method)):
        parts: list[str | Method] = [method]
    elif isinstance(method, Sequence) and method:
        parts = list(method)
        if options:
            raise VtokError(
                f"options {', '.join(options)} beside a list of methods are ambiguous; "
                'give them to one method: ["divprune", vtok.get("random_deep", layer=20)]'
            )
    else:
        raise VtokError(f"{method!r} is no method; give a name, a vtok.Method or a list of them")
    chain: list[Method] = []
    for part in parts:
        if isinstance(part, str):
            chain.append(get(part, **options))
        elif isinstance(part, Method):
            _check_options(type(part), options)
            chain.append(dataclasses.replace(part, **options) if options else part)
        else:
            raise VtokError(f"{part!r} is no method; give a name, a vtok.Method or a list of them")
    order = {"encoder": 0, "input": 1, "decoder": 2}
    chain.sort(key=lambda item: order[item.site])
    return tuple(chain)
