"""A session: the hooks of one compressed model, from ``compress`` to ``restore``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from vtok.engine.dense import DenseTower
from vtok.engine.language import STATE, Language
from vtok.engine.packed import PackedTower
from vtok.engine.plan import Plan
from vtok.engine.prefill import Prefill
from vtok.engine.spans import Encoding
from vtok.engine.towers import Tower, Wrapped
from vtok.errors import VtokError
from vtok.method import Method
from vtok.protocol import Adapter

logger = logging.getLogger("vtok")


class Session(Plan):
    """A plan in force: owns the hooks, and stands around the model's own calls. Every hook is a bound method or a
    partial of one, so ``deepcopy`` of a compressed model gives an independent compressed model.

    Args:
        model: the model that was given to ``vtok.compress``.
        adapter, methods, keep, positions: as for ``Plan``.

    Attributes:
        tower: watches the vision side, ``None`` where there is nothing to watch.
        language: narrows the language side.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, methods: Sequence[Method], keep: int | float, positions: str
    ) -> None:
        super().__init__(adapter, methods, keep, positions)
        self.model = model
        self.tower = make_tower(self)
        self.language = Language(self)
        self.handles: list[RemovableHandle] = []
        self.wrapped: list[Wrapped] = []
        self.encoding = False

    @property
    def last(self) -> Prefill | None:
        """The last prefill, where it had visual tokens."""
        return self.language.last

    @property
    def last_text(self) -> tuple[int, int] | None:
        """Rows and columns of the last prefill, where it had none."""
        return self.language.last_text

    # -- hooks in, hooks out ------------------------------------------------------------------------------------

    def install(self) -> None:
        """Register every hook, or leave the model untouched when one finds nothing to hold on to."""
        try:
            if self.tower is not None:
                self.tower.install()
            if self.adapter.base is not None:
                self._install_language(self.adapter.base)
            if hasattr(self.model, "generate"):
                self.wrapped.append(Wrapped(self.model, "generate", self._generate))
            if hasattr(self.model, "save_pretrained"):
                self.wrapped.append(Wrapped(self.model, "save_pretrained", save_plain))
        except BaseException:
            self.remove()
            raise

    def _install_language(self, base: nn.Module) -> None:
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
        self.language.install(self.hook)

    def hook(self, handle: RemovableHandle) -> None:
        self.handles.append(handle)

    def remove(self) -> None:
        """Take every hook and wrapper off again."""
        for handle in self.handles:
            handle.remove()
        for wrapped in reversed(self.wrapped):
            wrapped.remove()
        self.handles, self.wrapped = [], []

    # -- encoder calls ------------------------------------------------------------------------------------------

    def _encode(self, modality: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``get_image_features``: tell the tower its budgets, then read off what it kept."""
        if self.encoding:  # Qwen3-VL encodes a video through get_image_features
            return original(*args, **kwargs)
        self._check_recomputation()
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        arguments = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        media = self.adapter.media(modality, arguments)
        assert self.tower is not None
        timer, call = self.language.timer, self.language.call
        start = timer.begin(self._device())
        self.encoding = True
        try:
            output, encoded = self.tower.encode(modality, arguments, media, original, args, kwargs)
        finally:
            self.encoding = False
        timer.end("encode", start, self._device())
        encoding = Encoding(modality, encoded)
        if isinstance(output, tuple):
            if call is None:
                raise VtokError(f"get_{modality}_features of a compressed model needs return_dict=True")
        else:
            setattr(output, STATE, encoding)
        if call is not None:
            call.encodings[modality] = encoding
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

    # -- the model ----------------------------------------------------------------------------------------------

    def _generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``generate``: what follows its prompt in a prefill (the draft of speculative decoding, or what was
        generated so far without a cache) is no part of the question, and must not choose the tokens."""
        language = self.language
        names = ("inputs", "input_ids", "inputs_embeds")
        prompt = next((kwargs[name] for name in names if kwargs.get(name) is not None), args[0] if args else None)
        language.prompt_length = prompt.shape[1] if isinstance(prompt, Tensor) else None
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk and isinstance(prompt, Tensor) and prompt.ndim == 2 and language.has_placeholders(prompt):
            language.prompt_length = None
            raise VtokError(
                f"prefill_chunk_size={chunk} cuts the prompt into pieces, and a compressed model needs the whole "
                "prompt in one prefill; leave prefill_chunk_size out"
            )
        try:
            return original(*args, **kwargs)
        finally:
            language.prompt_length = None

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Features that ``generate`` encoded carry what the tower kept; accelerate's hooks copy them on their way."""
        for modality, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            if hasattr(output, STATE):
                self.language.given[modality] = getattr(output, STATE)

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.language.given = {}


def save_plain(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``save_pretrained``: say that it leaves the settings out."""
    logger.warning("vtok: save_pretrained saves the plain weights; vtok.save(model, folder) keeps the settings too")
    return original(*args, **kwargs)


def make_tower(session: Any) -> Any:
    """The watcher of the vision side that a session's methods need."""
    if any(stage.site == "encoder" for stage in session.stages):
        return (PackedTower if session.adapter.tower.packed else DenseTower)(session)
    return Tower(session) if session.adapter.base is not None else None
