"""What compresses one served model: token counts for vLLM's scheduler, and the tokens themselves for its prompt.

Both come from the plan of ``vtok.compress``, made on a skeleton of the model (its transformers class without weights).
So a served model keeps the tokens that the same settings keep in transformers, and refuses what they refuse there. In
the worker the engine's tower watcher is then put on vLLM's own tower.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtok.api import compress, session_of
from vtok.budget import Counts
from vtok.engine.dense_output import newline_mask
from vtok.engine.prefill import Prefill
from vtok.engine.segments import Segment
from vtok.engine.spans import Encoded, Span
from vtok.engine.towers import Tower, distribute
from vtok.errors import VtokError
from vtok.protocol import Medium
from vtok.serving.vllm.settings import Settings

logger = logging.getLogger("vtok")


class Compression:
    """The plan of one served model.

    Args:
        config: the model's configuration (of transformers).
        settings: what to do.

    Attributes:
        session: the session on the skeleton; a ``Plan``. ``adapter``: of the model's family.

    Raises:
        VtokError: settings that ``vtok.compress`` refuses, or that an inference server cannot serve.
    """

    def __init__(self, config: Any, settings: Settings) -> None:
        self.settings = settings
        model = skeleton(config)
        positions = settings.positions
        if positions == "auto" and not model_is_packed(config):
            positions = "reindex"  # vLLM numbers the tokens of such a prompt one after another
        compress(model, settings.methods, keep=settings.keep, positions=positions)
        self.session: Any = session_of(model)
        self.adapter: Any = self.session.adapter
        self._check()
        self._tokens: dict[tuple, int] = {}

    @property
    def name(self) -> str:
        return f"{self.session.name}, keep={self.session.keep}"

    def _check(self) -> None:
        session = self.session
        for method in session.methods:
            late = any(stage.site == "decoder" for stage in method.stages(session.shape))
            if late and (method.site == "decoder" or not method.late):
                raise VtokError(
                    f"{method.name} drops tokens inside the decoder, and vLLM gives every layer the same prompt; take "
                    "a method that acts before the decoder, such as divprune"
                )
            if late:
                raise VtokError(
                    f"{method.name} has a stage inside the decoder, and vLLM gives every layer the same prompt; leave "
                    f"that stage out: {method.late}=None"
                )
            if getattr(method, "auto", None) is not None:
                raise VtokError(
                    f"{method.name} decides by the picture how many tokens it needs, and vLLM makes room for them "
                    "before it has seen the picture; give a number as keep, and no auto="
                )
            if not method.exact:
                raise VtokError(
                    f"{method.name} keeps the largest grid below the budget, so prompts would not have the tokens that "
                    "were asked for; take uniform"
                )
        if session.positions == "keep" and not session.shape.packed:
            raise VtokError(
                f"vLLM numbers a {self.adapter.family} prompt's tokens one after another, and these settings keep the "
                'position ids of the survivors; compress with positions="reindex"'
            )

    # -- how many -----------------------------------------------------------------------------------------------

    def tokens(self, modality: str, call: Mapping[str, Any]) -> int:
        """Placeholders of one medium: what ``encode`` will leave of it.

        Args:
            modality: ``"image"``.
            call: what the family's ``get_image_features`` would be given beside pixels, for this one medium:
                ``image_sizes`` or ``image_grid_thw``, as lists.
        """
        key = (modality, repr(sorted(call.items())))
        if key not in self._tokens:
            self._tokens[key] = self._left(modality, call)
        return self._tokens[key]

    def _left(self, modality: str, call: Mapping[str, Any]) -> int:
        session = self.session
        (medium,) = self.adapter.media(modality, call)
        entry = session.counts(medium.length).entry
        if entry >= medium.length:
            return int(medium.length)
        left = int(medium.length)
        if session.tower_methods:
            left = self._left_by_tower(modality, call, medium)
        return min(entry, left) if session.input_stages else left

    def _left_by_tower(self, modality: str, call: Mapping[str, Any], medium: Medium) -> int:
        session = self.session
        goal = session.tower_count(medium.length)
        if session.shape.packed:
            return sum(distribute(min(goal, medium.length), [part.length for part in medium.parts]))
        tiles, per_tile = medium.tiles.stop, self.adapter.tile_length(modality)
        tower = session.tower
        valid = tower.valid_patches(modality, call, [medium], tiles, per_tile)
        left = sum(tower.tile_targets([medium], valid, tiles, per_tile))
        return left + int(newline_mask(medium).sum()) if tower.newline else left

    # -- which --------------------------------------------------------------------------------------------------

    def attach(self, tower: Any, watcher: type[Tower] | None) -> None:
        """Put the engine on vLLM's own tower.

        Args:
            tower: ``vtok.protocol.Tower`` of it.
            watcher: runs encoder stages on such a tower; ``None`` where nothing acts or looks inside.
        """
        self.adapter.tower = tower
        self.session.tower = (watcher or Tower)(self.session)
        self.session.tower.install()
        device = next(tower.root.parameters()).device
        for method in self.session.methods:
            source = getattr(method, "weights", None)
            if isinstance(source, str):  # the skeleton has no place for them
                from vtok.resampler.files import load

                object.__setattr__(method, "_loaded", load(source).to(device))
        logger.info("vtok: serving %s compressed by %s (%s)", self.adapter.family, self.name, self.settings.source)

    @property
    def inside(self) -> bool:
        """Whether anything acts or looks inside the vision tower."""
        return any(s.site == "encoder" or "saliency" in s.reads for s in self.session.stages)

    @property
    def looks_at_last(self) -> bool:
        """Whether the class token's attention at the tower's last block is asked for."""
        return self.session.shape.has_cls and any("saliency" in stage.reads for stage in self.session.stages)

    def encode(
        self, modality: str, call: Mapping[str, Any], features: Callable[[], Sequence[Tensor]], width: int | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """What stands of every medium of a call.

        Args:
            modality: ``"image"``.
            call: as ``get_image_features`` is given it, for all media.
            features: runs tower and projector; (length, D) of each medium, in placeholder order.
            width: channels that methods see; behind them are DeepStack planes, which go the way of their tokens.

        Returns:
            Of each medium the embeddings (k, D) and their indices (k,) within the medium.

        Raises:
            VtokError: the count is not what ``tokens`` said.
        """
        media = self.adapter.media(modality, call)
        planes: list[Tensor] = []

        def seen() -> list[Tensor]:
            found = features()
            if width is not None:
                planes.extend(x[:, width:] for x in found)
            return [x[:, :width] for x in found]

        self.session.encoding = True
        try:
            output, encoded = self.session.tower.encode(modality, call, media, seen, (), {})
        finally:
            self.session.encoding = False
        rows = [torch.cat(both, 1) for both in zip(output, planes, strict=True)] if planes else list(output)
        kept: list[tuple[Tensor, Tensor]] = [(x, torch.empty(0)) for x in rows]
        together: dict[tuple, list[int]] = {}
        for number, item in enumerate(encoded):
            together.setdefault((item.medium.length, item.count, item.medium.parts), []).append(number)
        for numbers in together.values():
            beside = torch.stack([planes[n] for n in numbers]) if planes else None
            found = self._enter([encoded[n] for n in numbers], torch.stack([output[n] for n in numbers]), beside)
            for number, row in zip(numbers, found, strict=True):
                kept[number] = row
        return kept

    def _enter(
        self, encoded: Sequence[Encoded], features: Tensor, planes: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """What the tower left, then the input stages, of media of one length: each is a prompt of its own here."""
        session = self.session
        length = features.shape[1]
        columns = torch.arange(length, device=features.device)
        # the place in the prompt seeds random draws; vLLM encodes a picture once for all prompts: the first place
        spans = [Span(row, 0, item, columns) for row, item in enumerate(encoded)]
        counts: list[Counts] = [session.counts(length)] * len(spans)
        chain = session.entry_counts(length, counts[0].entry)[session.tower_methods :]
        stages = [(stage, [count] * len(spans)) for stage, count in zip(session.input_stages, chain, strict=False)]
        run = Prefill(self.adapter, spans, counts, stages, (), False)
        run.segments = [Segment.whole(None, len(spans), length, [columns] * len(spans), features.device)]
        features = run._select_inputs(features, run.segments[0], list(range(len(spans))))
        last = run.segments[-1]
        rows = [features[row][last.columns[row]] for row in range(len(spans))]
        if planes is not None:
            places = torch.arange(planes.shape[0] * length, device=columns.device).view(-1, length)
            poured = run.pour(planes.flatten(0, 1), places)
            rows = [
                torch.cat((x, poured[own[tokens]]), 1) for x, own, tokens in zip(rows, places, last.tokens, strict=True)
            ]
        return list(zip(rows, last.tokens, strict=True))


def skeleton(config: Any) -> Any:
    """The transformers model of a configuration, without weights.

    Raises:
        VtokError: transformers has no class of this architecture.
    """
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    cls: Any = getattr(transformers, named, None)
    if cls is None:
        raise VtokError(f"transformers has no {named or 'architecture in this configuration'}, which vtok would serve")
    with torch.device("meta"):
        return cls(copy.deepcopy(config)).eval()


def model_is_packed(config: Any) -> bool:
    """Whether the family has rotary positions of rows and columns (Qwen), which survivors keep."""
    return hasattr(config, "vision_start_token_id")


def checked(kept: Sequence[tuple[Tensor, Tensor]], promised: Sequence[int], name: str) -> list[tuple[Tensor, Tensor]]:
    """``encode``'s answer, where each medium has as many tokens as its prompt has placeholders.

    Raises:
        VtokError: it has not.
    """
    for (features, _), count in zip(kept, promised, strict=True):
        if len(features) != count:
            raise VtokError(
                f"{name} left {len(features)} tokens of a picture where the prompt has {count} places; the method's "
                "count depends on the picture, which vLLM cannot serve"
            )
    return list(kept)
