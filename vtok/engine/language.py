"""The language side: what the base model, its text model and the decoder layers are given while a plan acts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtok.budget import Counts
from vtok.engine import decode
from vtok.engine.cache import cache_in, cache_of
from vtok.engine.plan import Plan
from vtok.engine.prefill import Prefill, padding_of
from vtok.engine.spans import Encoding, Span, locate
from vtok.engine.timing import Timer
from vtok.errors import VtokError
from vtok.view import Stage

STATE = "_vtok_state"
RUN = "vtok_run"


@dataclass
class Call:
    """One forward of the base model, as seen before it starts."""

    ids: Tensor | None
    arguments: Mapping[str, Any]
    encodings: dict[str, Encoding] = field(default_factory=dict)


class Language:
    """Finds the visual tokens of a prompt, narrows its prefill, and continues from the compressed cache.

    Args:
        plan: what acts.

    Attributes:
        call: the forward of the base model that is under way.
        given: encodings of features that came from ``generate``, by modality.
        prompt_length: columns of the prompt that ``generate`` was given; ``None`` outside of it.
        last: the last prefill that had visual tokens; ``last_text``: rows and columns of one that had none.
        timer: phases of the prefill that is under way or comes next.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.adapter = plan.adapter
        self.call: Call | None = None
        self.given: dict[str, Encoding] = {}
        self.prompt_length: int | None = None
        self.last: Prefill | None = None
        self.last_text: tuple[int, int] | None = None
        self.timer = Timer()
        self._run: Prefill | decode.Decode | None = None
        self._refed = 0
        self._started: object = None

    def install(self, hook: Callable[[RemovableHandle], None]) -> None:
        """Register the hooks, each told to ``hook``.

        Raises:
            VtokError: a decoder layer lacks a part that a method reads.
        """
        base, text = self.adapter.base, self.adapter.text
        hook(base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        hook(base.register_forward_hook(self._after_base, with_kwargs=True, always_call=True))
        hook(text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        hook(text.register_forward_hook(self._after_text, with_kwargs=True, always_call=True))
        if not self.plan.decoder_stages:
            return
        for number, layer in enumerate(self.plan.layers):
            hook(layer.register_forward_pre_hook(partial(self._before_layer, number), with_kwargs=True))
        for stage in self.plan.decoder_stages:
            previous: Any = self.plan.layers[(stage.layer or 1) - 1]
            for tap in [t for t in ("q", "k", "v") if t != "v" or "qkv" in stage.reads]:
                if {"attention", "qkv"} & stage.reads:
                    module = getattr(previous.self_attn, f"{tap}_proj", None)
                    if module is None:
                        raise VtokError(f"{type(previous.self_attn).__name__} has no {tap}_proj to read attention from")
                    hook(module.register_forward_hook(partial(self._tap, (stage.layer or 1) - 1, tap)))
            for number in stage.observed:
                observed: Any = self.plan.layers[number]
                for part in ("self_attn", "mlp"):
                    observe = partial(self._observe, number, part, stage)
                    hook(getattr(observed, part).register_forward_hook(observe, with_kwargs=True))

    def has_placeholders(self, ids: Tensor | None) -> bool:
        """Whether a prompt has a place for a picture or video."""
        return ids is not None and any(
            bool((ids == self.adapter.placeholder(modality)).any()) for modality in self.adapter.modalities
        )

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
        self._run = None
        embeds, cache = kwargs.get("inputs_embeds"), cache_of(kwargs)
        if embeds is None:
            return None
        state = getattr(cache, STATE, None)
        encodings = self.call.encodings if self.call is not None else {}
        if state is not None and not encodings and _holds_tokens(cache, embeds):
            if self.call is not None and self.call.arguments.get("position_ids") is None:
                kwargs = {**kwargs, "position_ids": None}  # the base model counts from the compressed cache
            cuts = bool(self.plan.decoder_stages)
            kwargs, self._run = decode.step(self.adapter, state, kwargs, cuts, self.prompt_length)
            self._refed = embeds.shape[1] - kwargs["inputs_embeds"].shape[1]
            if self._run is not None:
                kwargs[RUN] = self._run
            return args, kwargs
        ids = self.call.ids if self.call is not None else None
        if cache is not None and _holds_tokens(cache, None) and (encodings or self.has_placeholders(ids)):
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

    def _spans(self, kwargs: Mapping[str, Any], encodings: Mapping[str, Encoding]) -> list[Span]:
        if self.call is None or not (encodings or self.has_placeholders(self.call.ids)):
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
        plan = self.plan
        if plan.decoder_stages and getattr(cache, "is_compileable", False):
            raise VtokError(
                f"{plan.name} drops tokens inside the decoder, so its layers hold different lengths, which a static "
                "cache cannot; use the default cache, or a method at the encoder or input site such as divprune"
            )
        counts = [plan.counts(span.length) for span in spans]
        chain = [plan.entry_counts(span.length, count.entry) for span, count in zip(spans, counts, strict=True)]
        inside = plan.tower_methods
        inputs = [(stage, [row[inside + i] for row in chain]) for i, stage in enumerate(plan.input_stages)]
        counts = [fit(count, span) for count, span in zip(counts, spans, strict=True)]
        reindex = plan.positions == "reindex"
        run = Prefill(self.adapter, spans, counts, inputs, plan.decoder_stages, reindex, draft, self.timer)
        kwargs = run.enter(kwargs)
        if plan.decoder_stages:
            kwargs = {**kwargs, RUN: run}
        self._run = run
        if cache is not None:
            setattr(cache, STATE, None)
        return kwargs

    def _after_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        run, self._run = self._run, None
        if self._started is not None:
            embeds = kwargs.get("inputs_embeds")
            self.timer.end("prefill", self._started, None if embeds is None else embeds.device)
            self._started, self.timer = None, Timer()  # the run keeps its own; the next call starts at zero
        if self._refed and output is not None and not isinstance(output, tuple):
            hidden, refed = output.last_hidden_state, self._refed
            output.last_hidden_state = torch.cat((hidden[:, :1].expand(-1, refed, -1), hidden), 1)
        self._refed = 0
        if not isinstance(run, Prefill) or output is None:
            return None
        cache = cache_of(kwargs) if isinstance(output, tuple) else cache_in(output)
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
        hidden = run.layer(number, self.plan.layers, hidden, kwargs)
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    def _tap(self, layer: int, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        run = self._run
        if isinstance(run, Prefill):
            rows = run.query_rows if name == "q" else None
            held = output.detach() if rows is None else output.detach()[:, -rows:].clone()
            run.captured.setdefault(layer, {})[name] = held

    def _observe(
        self, layer: int, part: str, stage: Stage, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        run = self._run
        if isinstance(run, Prefill):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            run.observe_transition(layer, part, before, after, "couple_batch" in stage.reads)


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
