"""One batch of questions through one entry."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from vtok.protocol import Adapter
from vtok_eval.harness.cells import Entry
from vtok_eval.harness.counts import Seen, of_last
from vtok_eval.harness.features import Features
from vtok_eval.harness.prompts import Prompts


def greedy(model: Any, prompts: Prompts, max_new_tokens: int) -> Any:
    """The model's own generation settings without sampling and beams."""
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
    config.update(max_new_tokens=max_new_tokens, max_length=None, use_cache=True)
    if config.pad_token_id is None:
        config.pad_token_id = prompts.processor.tokenizer.pad_token_id
    return config


def identity(picture: Image.Image) -> bytes:
    """What two equal pictures have in common, whatever their names."""
    head = f"{picture.mode} {picture.size}".encode()
    return hashlib.blake2b(head + picture.tobytes(), digest_size=16).digest()


class Answers:
    """Asks a model.

    Parameters
    ----------
    model, adapter
        Not compressed.
    prompts : Prompts
        Of the model's processor.
    max_new_tokens : int
        Longest answer.
    features : Features
        Shared image features.
    """

    def __init__(self, model: Any, adapter: Adapter, prompts: Prompts, max_new_tokens: int, features: Features) -> None:
        self.model, self.adapter, self.prompts, self.features = model, adapter, prompts, features
        self.config = greedy(model, prompts, max_new_tokens)

    def inputs(self, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Any:
        """Inputs of a batch where the model is."""
        return self.prompts.inputs(texts, pictures).to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def ask(
        self, entry: Entry, inputs: Mapping[str, Any], images: Sequence[int], pictures: Sequence[bytes]
    ) -> list[tuple[str, Seen]]:
        """Answers of a batch, and what of its pictures the decoder saw.

        Parameters
        ----------
        entry : Entry
            Runs under it.
        inputs : mapping
            As ``inputs`` gave them.
        images : sequence of int
            Pictures of each sample.
        pictures : sequence of bytes
            Identities of all pictures, in order.
        """
        with self.features.on(entry, pictures):
            out = self.model.generate(**inputs, generation_config=self.config)
            seen = of_last(self.model, self.adapter, inputs, images)
        texts = self.prompts.answers(out[:, inputs["input_ids"].shape[1] :])
        return list(zip(texts, seen, strict=True))
