"""A session: the hooks of one compressed model, from ``compress`` to ``restore``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from vtok.budget import Counts, Profile, check_keep, solve
from vtok.engine import decode
from vtok.engine.dense import DenseTower
from vtok.engine.packed import PackedTower
from vtok.engine.prefill import Prefill, padding_of
from vtok.engine.spans import Encoding, Span, locate
from vtok.engine.timing import Timer
from vtok.engine.towers import Tower, Wrapped
from vtok.errors import VtokError
from vtok.method import Method
from vtok.protocol import Adapter
from vtok.view import Shape, Stage

logger = logging.getLogger("vtok")
STATE = "_vtok_state"
RUN = "vtok_run"


@dataclass
class Call:
    """One forward of the base model, as seen before it starts."""

    ids: Tensor | None
    arguments: Mapping[str, Any]
    encodings: dict[str, Encoding] = field(default_factory=dict)


class Session:
    """Owns the hooks. Every hook is a bound method or a partial of one, so ``deepcopy`` of a compressed model gives an
    independent compressed model.

    Args:
        model: the model that was given to ``vtok.compress``.
        adapter: its family.
        methods: the chain, in order of sites.
        keep: budget, or ``None`` where every method carries its own counts.
        positions: ``"keep"`` or ``"reindex"``.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, methods: Sequence[Method], keep: int | float, positions: str
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.methods = tuple(methods)
        self.keep = keep
        self.positions = positions
        self.shape = shape_of(adapter)
        self.stages = [stage for method in self.methods for stage in stages_of(method, self.shape)]
        self.decoder_stages = sorted((s for s in self.stages if s.site == "decoder"), key=lambda s: s.layer or 0)
        self.input_stages = [stage for stage in self.stages if stage.site == "input"]
        shares = accumulate((stage.share for stage in self.decoder_stages), min)  # no later cut brings tokens back
        self.profile = Profile(
            tuple(stage.layer or 0 for stage in self.decoder_stages),
            tuple(shares),
            min((stage.floor for stage in self.decoder_stages), default=1),
        )
        self.name = "+".join(method.name or type(method).__name__ for method in self.methods)
        self.tower = make_tower(self)
        self.handles: list[RemovableHandle] = []
        self.wrapped: list[Wrapped] = []
        self.call: Call | None = None
        self.encoding = False
        self.run: Prefill | decode.Decode | None = None
        self.last: Prefill | None = None
        self.last_text: tuple[int, int] | None = None
        self.given: dict[str, Encoding] = {}
        self.prompt_length: int | None = None
        self.refed = 0
        self.timer = Timer()
        self._started: object = None

    # -- hooks in, hooks out ------------------------------------------------------------------------------------

    def install(self) -> None:
        """Register every hook, or leave the model untouched when one finds nothing to hold on to."""
        try:
            if self.tower is not None:
                self.tower.install()
            if self.adapter.base is not None:
                self._install_language()
            if hasattr(self.model, "generate"):
                self.wrapped.append(Wrapped(self.model, "generate", self._generate))
            if hasattr(self.model, "save_pretrained"):
                self.wrapped.append(Wrapped(self.model, "save_pretrained", save_plain))
        except BaseException:
            self.remove()
            raise

    def _install_language(self) -> None:
        base, text = self.adapter.base, self.adapter.text
        assert base is not None and text is not None
        for modality in self.adapter.modalities:
            name = f"get_{modality}_features"
            if not hasattr(base, name):
                raise VtokError(
                    f"{type(base).__name__} has no {name}; this version of transformers is not known to vtok"
                )
            self.wrapped.append(Wrapped(base, name, partial(self._encode, modality)))
        if self.model is not base:
            self.hook(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
            self.hook(self.model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True))
        self.hook(base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        self.hook(base.register_forward_hook(self._after_base, with_kwargs=True, always_call=True))
        self.hook(text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        self.hook(text.register_forward_hook(self._after_text, with_kwargs=True, always_call=True))
        if not self.decoder_stages:
            return
        for number, layer in enumerate(self.layers):
            self.hook(layer.register_forward_pre_hook(partial(self._before_layer, number), with_kwargs=True))
        for stage in self.decoder_stages:
            previous: Any = self.layers[(stage.layer or 1) - 1]
            for tap in [t for t in ("q", "k", "v") if t != "v" or "qkv" in stage.reads]:
                if {"attention", "qkv"} & stage.reads:
                    module = getattr(previous.self_attn, f"{tap}_proj", None)
                    if module is None:
                        raise VtokError(f"{type(previous.self_attn).__name__} has no {tap}_proj to read attention from")
                    self.hook(module.register_forward_hook(partial(self._tap, (stage.layer or 1) - 1, tap)))
            for number in stage.observed:
                observed: Any = self.layers[number]
                for part in ("self_attn", "mlp"):
                    hook = partial(self._observe, number, part, stage)
                    self.hook(getattr(observed, part).register_forward_hook(hook, with_kwargs=True))

    def hook(self, handle: RemovableHandle) -> None:
        self.handles.append(handle)

    def remove(self) -> None:
        """Take every hook and wrapper off again."""
        for handle in self.handles:
            handle.remove()
        for wrapped in reversed(self.wrapped):
            wrapped.remove()
        self.handles, self.wrapped = [], []

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.adapter.text.layers

    @property
    def depth(self) -> int:
        return self.shape.depth

    # -- budgets ------------------------------------------------------------------------------------------------

    def counts(self, tokens: int) -> Counts:
        """The budget of an image of ``tokens`` tokens, split over the chain."""
        has_entry = any(method.site != "decoder" for method in self.methods)
        return solve(tokens, self.keep, max(self.depth, 1), self.profile, has_entry, self.methods[-1].name)

    def check_budget(self) -> None:
        """Refuse now what every prefill would refuse: a share no schedule reaches, or a count on pictures of one size.

        Raises:
            VtokError: names the smallest budget that can be reached.
        """
        fixed = self.adapter.tile_length("image") if self.adapter.family == "llava" else None
        if self.decoder_stages and (fixed is not None or isinstance(self.keep, float)):
            self.counts(fixed or 576)

    def entry_counts(self, tokens: int, entry: int) -> list[int]:
        """Tokens after each method before the decoder (tower methods first), narrowing in equal ratios."""
        before = [method for method in self.methods if method.site != "decoder"]
        if not before:
            return []
        ratio = entry / tokens
        return [max(entry, round(tokens * ratio ** ((i + 1) / len(before)))) for i in range(len(before))]

    def tower_count(self, tokens: int) -> int:
        """Tokens of one image that the tower's methods must leave."""
        counts = self.entry_counts(tokens, self.counts(tokens).entry)
        inside = sum(1 for method in self.methods if method.site == "encoder")
        return counts[inside - 1] if inside else tokens

    # -- encoder calls ------------------------------------------------------------------------------------------

    def _encode(self, modality: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``get_image_features``: tell the tower its budgets, then read off what it kept."""
        if self.encoding:  # Qwen3-VL encodes a video through get_image_features
            return original(*args, **kwargs)
        self._check_recomputation()
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        call = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        media = self.adapter.media(modality, call)
        assert self.tower is not None
        start = self.timer.begin(self._device())
        self.encoding = True
        try:
            output, encoded = self.tower.encode(modality, call, media, original, args, kwargs)
        finally:
            self.encoding = False
        self.timer.end("encode", start, self._device())
        encoding = Encoding(modality, encoded)
        if isinstance(output, tuple):
            if self.call is None:
                raise VtokError(f"get_{modality}_features of a compressed model needs return_dict=True")
        else:
            setattr(output, STATE, encoding)
        if self.call is not None:
            self.call.encodings[modality] = encoding
        return output

    def _check_recomputation(self) -> None:
        """In transformers 5.17 (no more in 5.23) checkpointed blocks run their hooks once more in the backward pass,
        when the tower's state is gone."""
        block = self.adapter.tower.layers[0]
        checkpointed = getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled()
        inside = any(stage.site == "encoder" for stage in self.stages)
        if inside and checkpointed and "__call__" in GradientCheckpointingLayer.__dict__:
            raise VtokError(
                f"{self.name} acts inside the vision tower, whose checkpointed blocks this version of transformers "
                "runs anew with all tokens; update transformers, or call gradient_checkpointing_disable() on the tower"
            )

    def _device(self) -> Any:
        return next(self.model.parameters()).device

    def _generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``generate``: what follows its prompt in a prefill (the draft of speculative decoding, or what was
        generated so far without a cache) is no part of the question, and must not choose the tokens."""
        names = ("inputs", "input_ids", "inputs_embeds")
        prompt = next((kwargs[name] for name in names if kwargs.get(name) is not None), args[0] if args else None)
        self.prompt_length = prompt.shape[1] if isinstance(prompt, Tensor) else None
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk and isinstance(prompt, Tensor) and prompt.ndim == 2 and self._has_placeholders(prompt):
            self.prompt_length = None
            raise VtokError(
                f"prefill_chunk_size={chunk} cuts the prompt into pieces, and a compressed model needs the whole "
                "prompt in one prefill; leave prefill_chunk_size out"
            )
        try:
            return original(*args, **kwargs)
        finally:
            self.prompt_length = None

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Features that ``generate`` encoded carry what the tower kept; accelerate's hooks copy them on their way."""
        for modality, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            if hasattr(output, STATE):
                self.given[modality] = getattr(output, STATE)

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.given = {}

    # -- the base model -----------------------------------------------------------------------------------------

    def _before_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        arguments = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        self.call = Call(arguments.get("input_ids"), arguments)
        given = arguments.get("mm_encoder_outputs") or {}
        for modality, output in given.items():
            encoding = getattr(output, STATE, None) or self.given.get(modality)
            if encoding is None and output is not None:
                raise VtokError(
                    f"the {modality} features that were passed in come from before vtok.compress or from another "
                    f"model; call get_{modality}_features of the compressed model, or pass the pixels"
                )
            if encoding is not None:
                self.call.encodings[modality] = encoding

    def _after_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.call = None

    # -- the text model -----------------------------------------------------------------------------------------

    def _before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self.run = None
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if embeds is None:
            return None
        state = getattr(cache, STATE, None)
        encodings = self.call.encodings if self.call is not None else {}
        if state is not None and not encodings and _holds_tokens(cache, embeds):
            if self.call is not None and self.call.arguments.get("position_ids") is None:
                kwargs = {**kwargs, "position_ids": None}  # the base model counts from the compressed cache
            kwargs, self.run = decode.step(self.adapter, state, kwargs, bool(self.decoder_stages), self.prompt_length)
            self.refed = embeds.shape[1] - kwargs["inputs_embeds"].shape[1]
            if self.run is not None:
                kwargs[RUN] = self.run
            return args, kwargs
        ids = self.call.ids if self.call is not None else None
        if cache is not None and _holds_tokens(cache, None) and (encodings or self._has_placeholders(ids)):
            raise VtokError(
                "this prompt continues a cache that already holds tokens (chunked prefill, or a chat turn with a new "
                "image); a compressed model needs the whole prompt in one prefill: pass it without the old cache"
            )
        self._started = self.timer.begin(embeds.device)
        spans = self._spans(kwargs, encodings)
        draft = 0 if self.prompt_length is None else max(0, embeds.shape[1] - self.prompt_length)
        self.last_text = (embeds.shape[0], embeds.shape[1])
        self.last = None
        if not spans:
            if cache is not None and hasattr(cache, STATE):
                delattr(cache, STATE)
            return None
        return args, self._prefill(spans, kwargs, cache, draft)

    def _has_placeholders(self, ids: Tensor | None) -> bool:
        return ids is not None and any(
            bool((ids == self.adapter.placeholder(modality)).any()) for modality in self.adapter.modalities
        )

    def _spans(self, kwargs: Mapping[str, Any], encodings: Mapping[str, Encoding]) -> list[Span]:
        if self.call is None or not (encodings or self._has_placeholders(self.call.ids)):
            return []
        ids = self.call.ids
        if ids is None:
            ids = self._ids_of_embeds(self.call.arguments.get("inputs_embeds"))
        return locate(ids, self.adapter, encodings, padding_of(kwargs.get("attention_mask"), ids.shape[1]))

    def _ids_of_embeds(self, embeds: Any) -> Tensor:
        """Placeholders of a prompt that was given as embeddings: the rows equal to a placeholder's embedding."""
        ids = embeds.new_full(embeds.shape[:2], -1).long()
        table = self.adapter.base.get_input_embeddings()
        for modality in self.adapter.modalities:
            number = self.adapter.placeholder(modality)
            ids[(embeds == table(ids.new_tensor(number))).all(-1)] = number
        return ids

    def _prefill(self, spans: list[Span], kwargs: dict[str, Any], cache: Any, draft: int) -> dict[str, Any]:
        if self.decoder_stages and getattr(cache, "is_compileable", False):
            raise VtokError(
                f"{self.name} drops tokens inside the decoder, so its layers hold different lengths, which a static "
                "cache cannot; use the default cache, or a method at the encoder or input site such as divprune"
            )
        counts = [self.counts(span.length) for span in spans]
        chain = [self.entry_counts(span.length, count.entry) for span, count in zip(spans, counts, strict=True)]
        inside = sum(1 for method in self.methods if method.site == "encoder")
        inputs = [(stage, [row[inside + i] for row in chain]) for i, stage in enumerate(self.input_stages)]
        counts = [fit(count, span) for count, span in zip(counts, spans, strict=True)]
        reindex = self.positions == "reindex"
        run = Prefill(self.adapter, spans, counts, inputs, self.decoder_stages, reindex, draft, self.timer)
        kwargs = run.enter(kwargs)
        if self.decoder_stages:
            kwargs = {**kwargs, RUN: run}
        self.run = run
        if cache is not None:
            setattr(cache, STATE, None)
        return kwargs

    def _after_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        run, self.run = self.run, None
        if self._started is not None:
            embeds = kwargs.get("inputs_embeds")
            self.timer.end("prefill", self._started, None if embeds is None else embeds.device)
            self._started, self.timer = None, Timer()  # the run keeps its own; the next call starts at zero
        if self.refed and output is not None and not isinstance(output, tuple):
            hidden, refed = output.last_hidden_state, self.refed
            output.last_hidden_state = torch.cat((hidden[:, :1].expand(-1, refed, -1), hidden), 1)
        self.refed = 0
        if not isinstance(run, Prefill) or output is None:
            return None
        cache = (
            getattr(output, "past_key_values", None) if not isinstance(output, tuple) else kwargs.get("past_key_values")
        )
        if cache is not None:
            setattr(cache, STATE, decode.CacheState.after(run))
        self.last = run
        self.last_text = None
        return spread_output(run, output)

    # -- decoder layers -----------------------------------------------------------------------------------------

    def _before_layer(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        run = kwargs.get(RUN)
        if run is None:
            return None
        kwargs = dict(kwargs)
        del kwargs[RUN]
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = run.layer(number, self.layers, hidden, kwargs)
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    def _tap(self, layer: int, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        run = self.run
        if isinstance(run, Prefill):
            rows = run.query_rows if name == "q" else None
            held = output.detach() if rows is None else output.detach()[:, -rows:].clone()
            run.captured.setdefault(layer, {})[name] = held

    def _observe(
        self, layer: int, part: str, stage: Stage, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        run = self.run
        if isinstance(run, Prefill):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            run.observe_transition(layer, part, before, after, "couple_batch" in stage.reads)


def save_plain(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``save_pretrained``: say that it leaves the settings out."""
    logger.warning("vtok: save_pretrained saves the plain weights; vtok.save(model, folder) keeps the settings too")
    return original(*args, **kwargs)


def make_tower(session: Session) -> Tower | None:
    """The watcher of the vision side that a session's methods need."""
    if any(stage.site == "encoder" for stage in session.stages):
        return (PackedTower if session.adapter.tower.packed else DenseTower)(session)
    return Tower(session) if session.adapter.base is not None else None


def shape_of(adapter: Adapter) -> Shape:
    """What methods may know of the model behind an adapter."""
    tower = adapter.tower
    layers = adapter.text.layers if adapter.text is not None else ()
    return Shape(
        depth=len(layers),
        tower_depth=tower.feature_layer + 1,
        has_cls=tower.has_cls,
        packed=tower.packed,
        tiled=bool(getattr(adapter, "tiled", False)),
        family=adapter.family,
        full_layers=None if tower.full_layers is None else tuple(sorted(tower.full_layers)),
    )


def stages_of(method: Method, shape: Shape) -> Sequence[Stage]:
    """A method's stages on a model of this shape.

    Raises:
        VtokError: options that put a stage where the model has no layer, or that keep less than nothing.
    """
    stages = method.stages(shape)
    name = method.name or type(method).__name__
    for stage in stages:
        depth, first = (shape.depth, 1) if stage.site == "decoder" else (shape.tower_depth, 0)
        if stage.layer is not None and not first <= stage.layer < depth:
            raise VtokError(
                f"{name} would act at {stage.site} layer {stage.layer}, but this model's layers there go from "
                f"{first} to {depth - 1}; give it other layers"
            )
        if not 0 <= stage.share <= 1:
            raise VtokError(
                f"{name} would leave {stage.share:g} of the tokens, which is no share; give it one in [0, 1]"
            )
    return stages


def fit(counts: Counts, span: Span) -> Counts:
    """Counts of a span whose tower left fewer tokens than asked (tiny or padded pictures)."""
    left = span.encoded.count
    return Counts(counts.tokens, min(counts.entry, left), tuple(min(cut, left) for cut in counts.cuts))


def spread_output(run: Prefill, output: Any) -> Any:
    """The text model's output at full prompt length, so that logits, labels and losses keep their shapes."""
    last = run.segments[-1]
    if last.width == last.full and all(segment.relative is None for segment in run.segments):
        return output
    if isinstance(output, tuple):
        return (last.spread(output[0]), *output[1:])
    output.last_hidden_state = last.spread(output.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        states = output.hidden_states
        owners = [run.segments[run._segment_of(max(0, i - 1))] for i in range(len(states))]
        output.hidden_states = tuple(
            state if state is None or state.shape[1] == last.full else owner.spread(state)
            for owner, state in zip(owners, states, strict=True)
        )
    return output


def _holds_tokens(cache: Any, embeds: Tensor | None) -> bool:
    """Whether a cache already holds tokens. A single new token behind a marked cache is always a decoding step: that
    spares compiled decoding the look at a static cache's length."""
    if embeds is not None and embeds.shape[1] == 1:
        return True
    return int(cache.get_seq_length()) > 0


def parse_keep(keep: int | float | None, methods: Sequence[Method]) -> int | float:
    """The budget that was asked for, checked."""
    if keep is None:
        name = methods[-1].name or "the method"
        raise VtokError(f"{name} needs a budget: pass keep=64 (visual tokens per image) or keep=0.25 (share of them)")
    return check_keep(keep)
