"""What Qwen's families share in vLLM: a budget of visual tokens for pictures; videos stay whole.

Each class stands before one of vLLM's own among the bases of a served class.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.multimodal.processing import PromptReplacement

from vtok.errors import VtokError
from vtok.protocol import Tower
from vtok.serving.vllm import positions
from vtok.serving.vllm.compression import Compression, checked
from vtok.serving.vllm.served import compression_of

if TYPE_CHECKING:
    from typing import Any as Base  # one of vLLM's classes
else:
    Base = object

#: switches vLLM's pruning interface on and prunes no video: 1 - 1e-17 is 1
ON = 1e-17


class Info(Base):
    """Token counts of pictures: the budget's."""

    def get_num_image_tokens(
        self, *, image_width: int, image_height: int, image_processor: Any, mm_kwargs: Mapping[str, object]
    ) -> int:
        given: dict[str, Any] = {"image_width": image_width, "image_height": image_height}
        given |= {"image_processor": image_processor, "mm_kwargs": mm_kwargs}
        compression = compression_of(self.ctx.model_config)
        if compression is None:
            return int(super().get_num_image_tokens(**given))
        size, _ = self._get_vision_info(**given, num_frames=1, modality="image")
        patch = self.get_hf_config().vision_config.patch_size
        return compression.tokens("image", {"image_grid_thw": [[1, size.height // patch, size.width // patch]]})


class Processor(Base):
    """Puts as many placeholders into a prompt as a picture will have tokens."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        compression = compression_of(self.info.ctx.model_config)
        if compression is None:
            return updates
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        token = self.info.get_tokenizer().get_vocab()[processor.image_token]

        def placeholders(number: int) -> list[int]:
            grid = out_mm_kwargs["image"][number]["image_grid_thw"].data.tolist()
            return [token] * compression.tokens("image", {"image_grid_thw": [grid]})

        short = PromptReplacement(modality="image", target=[token], replacement=placeholders)
        return [short if update.modality == "image" else self.whole(update) for update in updates]

    def whole(self, update: Any) -> Any:
        """The update of a video, none of whose tokens go."""
        return update


class Served(Base):
    """A model of vLLM's; with settings, every picture becomes as many tokens as the budget says."""

    compression: Compression | None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        compression = compression_of(vllm_config.model_config, fresh=True)
        if vllm_config.model_config.multimodal_config.get_limit_per_prompt("image") == 0:
            compression = None  # there may be no tower
        if compression is not None:
            if compression.inside:
                raise VtokError(
                    f"{compression.name} acts inside the vision tower, which vtok does on vLLM's CLIP and SigLIP "
                    "towers alone; take a method behind the tower, such as divprune"
                )
            vllm_config.model_config.multimodal_config.video_pruning_rate = ON
            if vllm_config.parallel_config.pipeline_parallel_size > 1:
                raise VtokError(
                    "positions of Qwen's surviving tokens are known to the first pipeline stage alone; scale out with "
                    "--tensor-parallel-size or --data-parallel-size"
                )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compression = compression
        self._moves: tuple[Tensor, Tensor] | None = None
        if compression is not None:
            own: Tower = compression.adapter.tower
            compression.attach(
                Tower(self.visual, list(self.visual.blocks), own.blocks, packed=True, unit=own.unit), None
            )

    # -- pictures -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _process_image_input(self, image_input: Any) -> Any:
        plain = super()._process_image_input
        compression = self.compression
        if compression is None or image_input["type"] != "pixel_values":
            return plain(image_input)
        grids = image_input["image_grid_thw"].tolist()
        call = {"pixel_values": image_input["pixel_values"], "image_grid_thw": grids}
        kept = compression.encode("image", call, lambda: plain(image_input), self.config.text_config.hidden_size)
        counts = [compression.tokens("image", {"image_grid_thw": [grid]}) for grid in grids]
        side = self.visual.spatial_merge_size
        return tuple(
            positions.pack(rows, positions.grid_positions(1, height // side, width // side)[:, tokens.cpu()])
            for (rows, tokens), (_, height, width) in zip(checked(kept, counts, compression.name), grids, strict=True)
        )

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        if self.compression is None:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)
        if image_input["type"] == "pixel_values":
            return image_embeds_split
        side = self.visual.spatial_merge_size
        return tuple(
            positions.pack(rows, positions.grid_positions(frames, height // side, width // side))
            for rows, (frames, height, width) in zip(
                image_embeds_split, image_input["image_grid_thw"].tolist(), strict=True
            )
        )

    # -- positions ----------------------------------------------------------------------------------------------

    @abstractmethod
    def runs(self, input_tokens: list[int], mm_features: list[Any]) -> list[positions.Run]:
        """Placeholders of pictures and videos in a prompt."""

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        if self.compression is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        return positions.prompt_positions(len(input_tokens), self.runs(input_tokens, mm_features))

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Any, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        if self.compression is None:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        columns = ((ids == self.config.image_token_id) | (ids == self.config.video_token_id)).nonzero().flatten()
        return positions.place(columns, multimodal_embeddings, mrope_positions, num_computed_tokens)

    # vLLM 0.32's CPU runner leaves the pruning interface out: then the channels arrive here, and the survivors, which
    # all stand at their picture's first position, are moved on the way to the language model

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        self._moves = None
        if self.compression is not None and multimodal_embeddings and self.carries(multimodal_embeddings[0]):
            rows = [positions.unpack(packed) for packed in multimodal_embeddings]
            multimodal_embeddings = [features for features, _, _ in rows]
            assert is_multimodal is not None
            self._moves = is_multimodal.nonzero().flatten(), torch.cat([relative for _, _, relative in rows], 1)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def carries(self, embeddings: Tensor) -> bool:
        """Whether positions are beside these embeddings."""
        return bool(embeddings.shape[1] > self.config.text_config.hidden_size)

    def forward(
        self,
        input_ids: Any,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        **more: Any,
    ) -> Any:
        moves, self._moves = self._moves, None
        if moves is not None:
            where, relative = moves
            positions = positions.clone()
            positions[:3, where.to(positions.device)] += relative.to(positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **more)
