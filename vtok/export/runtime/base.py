"""An exported model that answers: prompts, positions, the loop over new tokens; the graphs run in a subclass."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vtok.errors import VtokError
from vtok.export.runtime import pictures
from vtok.export.runtime.prompt import Prompt, build
from vtok.export.runtime.sampling import Sampler
from vtok.export.runtime.settings import Settings

PICTURES = 16
"""Pictures that go through the vision graph at once."""


@dataclass
class Generated:
    """What one call gave.

    Attributes
    ----------
    tokens : ndarray
        (B, T) int64 new tokens, the end token included, padding behind it.
    kept : list of list of ndarray
        ``kept[sample][image]``: original indices of the visual tokens that were kept, ascending, as in ``vtok.Report``.
    logits : ndarray
        (B, V) fp32 of the first new token.
    prompt_tokens : list of int
        Columns of each sample that the decoder saw.
    seconds : dict of str to float
        ``encode`` (pixels to visual tokens), ``first`` (pixels to the first token, ``encode`` included), ``all``.
    """

    tokens: np.ndarray
    kept: list[list[np.ndarray]]
    logits: np.ndarray
    prompt_tokens: list[int]
    seconds: dict[str, float] = field(default_factory=dict)


class ExportedVLM(ABC):
    """A folder of three graphs, ready to answer.

    Parameters
    ----------
    folder : str or Path
        That ``vtok export`` wrote, or a model's that was exported there.
    resize : bool
        Stretch pictures to the layout that the graphs were made for. Otherwise pictures of another layout are refused
        (LLaVA-NeXT and Qwen; LLaVA-1.5's processor brings all pictures to one).
    processor : ProcessorMixin, optional
        Instead of the folder's own.

    Attributes
    ----------
    settings : Settings
        Token ids, sizes, and the plan of the vision side.

    Raises
    ------
    VtokError
        The folder was not exported, or to another format; a package is missing.
    """

    target: ClassVar[str] = ""

    def __init__(self, folder: str | Path, *, resize: bool = False, processor: Any = None) -> None:
        self.folder, self.resize = Path(folder), resize
        self.settings = Settings.read(self.folder, self.target)
        self._processor = processor

    # -- graphs -------------------------------------------------------------------------------------------------

    @abstractmethod
    def vision(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, ...) fp32 pixels to features (B, k, D) and kept (B, k)."""

    @abstractmethod
    def embed(self, ids: np.ndarray) -> np.ndarray:
        """(B, L) ids to embeddings (B, L, D)."""

    @abstractmethod
    def decode(
        self, embeds: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: Any | None
    ) -> tuple[np.ndarray, Any]:
        """One forward of the decoder.

        Parameters
        ----------
        embeds : ndarray
            (B, L, D).
        mask : ndarray
            (B, P + L) int64.
        positions : ndarray
            (B, L) or (3, B, L) int64.
        cache : object or None
            What the last call returned; ``None`` in a prefill.

        Returns
        -------
        tuple
            Logits (B, V) of the last column, and the cache.
        """

    # -- answers ------------------------------------------------------------------------------------------------

    @property
    def processor(self) -> Any:
        """The folder's processor, loaded when it is first needed.

        Raises
        ------
        VtokError
            There is none.
        """
        if self._processor is None:
            import transformers

            library: Any = transformers
            try:
                self._processor = library.AutoProcessor.from_pretrained(self.folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise VtokError(
                    f"{self.folder} holds no processor that transformers can load; pass one as processor=, or give "
                    "generate_ids what a processor would give"
                ) from error
            if self._processor.tokenizer.pad_token is None:
                self._processor.tokenizer.pad_token = self._processor.tokenizer.eos_token
        return self._processor

    def inputs(self, images: Any, prompts: Sequence[str]) -> Any:
        """What the processor makes of pictures and prompts, as arrays.

        Parameters
        ----------
        images : PIL.Image, or sequence of pictures or of lists of them
            One picture or one list of pictures a prompt; ``None`` for text alone.
        prompts : sequence of str
            Questions, which the chat template wraps with the pictures in front of them; a prompt that already holds
            placeholders is taken as it stands.
        """
        owned = [
            [pictures.resized(self.settings, picture.convert("RGB")) if self.resize else picture for picture in own]
            for own in pictures.by_prompt(images, len(prompts))
        ]
        texts = [self._text(prompt, len(own)) for prompt, own in zip(prompts, owned, strict=True)]
        return self.processor(
            images=owned if any(owned) else None, text=texts, padding=True, padding_side="left", return_tensors="pt"
        )

    def _text(self, prompt: str, count: int) -> str:
        token = self.processor.image_token
        if token in prompt or not self.processor.chat_template:
            return prompt if token in prompt else "\n".join([token] * count + [prompt])
        content: list[dict[str, str]] = [{"type": "image"}] * count + [{"type": "text", "text": prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def generate(
        self,
        images: Any,
        prompts: str | Sequence[str],
        max_new_tokens: int = 64,
        *,
        streamer: Any = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Any:
        """Answers to prompts about pictures.

        Parameters
        ----------
        images, prompts
            As for ``inputs``; one prompt may be a string.
        max_new_tokens : int
            Most tokens of an answer.
        streamer : BaseStreamer, optional
            Of transformers (``TextStreamer``, ``TextIteratorStreamer``): is given tokens as they come, of one prompt.
        temperature, top_k, top_p, seed
            As for ``Sampler``; greedy by default.

        Returns
        -------
        str or list of str
            The answer, or one for each prompt, without special tokens.

        Raises
        ------
        VtokError
            Pictures, prompts or settings that do not fit.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        found = self.generate_ids(self.inputs(images, texts), max_new_tokens, streamer=streamer, **drawn)
        answers = self.processor.tokenizer.batch_decode(found.tokens, skip_special_tokens=True)
        answers = [answer.strip() for answer in answers]
        return answers[0] if isinstance(prompts, str) else answers

    def stream(self, images: Any, prompt: str, max_new_tokens: int = 64, **sampling: Any) -> Iterator[str]:
        """The answer to one prompt in pieces, as they come; joined, they are the answer with its outer blanks.

        Parameters
        ----------
        images, prompt, max_new_tokens, **sampling
            As for ``generate``.
        """
        tokenizer = self.processor.tokenizer
        tokens: list[int] = []
        told = ""
        for step, _ in self._steps(self._prefill(self.inputs(images, [prompt])), max_new_tokens, Sampler(**sampling)):
            tokens.append(int(step[0]))
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            # a character of several tokens is no character until the last is there
            if len(text) > len(told) and not text.endswith("�"):
                yield text[len(told) :]
                told = text

    def generate_ids(
        self, inputs: Mapping[str, Any], max_new_tokens: int = 64, *, streamer: Any = None, **sampling: Any
    ) -> Generated:
        """New tokens to what a processor gave.

        Parameters
        ----------
        inputs : mapping
            ``input_ids`` (B, L), ``attention_mask`` (B, L; all ones without it), and pictures: ``pixel_values`` with
            ``image_sizes`` or ``image_grid_thw`` where the family has them. Tensors or arrays.
        max_new_tokens : int
            At least 1.
        streamer, **sampling
            As for ``generate``.

        Returns
        -------
        Generated
            Tokens, kept indices, and the first logits.

        Raises
        ------
        VtokError
            Inputs that do not fit the export.
        """
        sampler = Sampler(**sampling)
        ids = np.asarray(inputs["input_ids"])
        if streamer is not None:
            if len(ids) != 1:
                raise VtokError(
                    f"a streamer takes one prompt at a time and there are {len(ids)}; call generate for each"
                )
            streamer.put(ids)
        start = time.perf_counter()
        begun = self._prefill(inputs)
        seconds = {"encode": begun.encoded, "first": time.perf_counter() - start}
        steps = []
        for step, _ in self._steps(begun, max_new_tokens, sampler):
            steps.append(step)
            if streamer is not None:
                streamer.put(step)
        if streamer is not None:
            streamer.end()
        seconds["all"] = time.perf_counter() - start
        prompt = begun.prompt
        return Generated(np.stack(steps, 1), prompt.kept, begun.logits, prompt.mask.sum(1).tolist(), seconds)

    def _prefill(self, inputs: Mapping[str, Any]) -> Begun:
        start = time.perf_counter()
        ids = np.asarray(inputs["input_ids"])
        given = inputs.get("attention_mask")
        mask = np.ones_like(ids) if given is None else np.asarray(given)
        pixels = pictures.batch(self.settings, inputs)
        plan = self.settings.plan
        features, kept = np.zeros((0, plan.kept, plan.width), np.float32), np.zeros((0, plan.kept), np.int64)
        if len(pixels):
            parts = [self.vision(pixels[at : at + PICTURES]) for at in range(0, len(pixels), PICTURES)]
            features, kept = (np.concatenate(found) for found in zip(*parts, strict=True))
        encoded = time.perf_counter() - start
        prompt = build(self.settings, ids, mask, kept)
        embeds = np.array(self.embed(prompt.ids))
        embeds[prompt.visual] = features.reshape(-1, features.shape[-1])
        logits, cache = self.decode(embeds, prompt.mask, prompt.positions, None)
        return Begun(prompt, logits, cache, encoded)

    def _steps(self, begun: Begun, max_new_tokens: int, sampler: Sampler) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens (B,) and the logits (B, V) that they were chosen by, one after the other."""
        if max_new_tokens < 1:
            raise VtokError(f"max_new_tokens={max_new_tokens}: give at least 1")
        settings, prompt = self.settings, begun.prompt
        logits, cache, mask = begun.logits, begun.cache, prompt.mask
        ends = np.array(sorted(settings.ends), np.int64)
        done = np.zeros(len(mask), bool)
        for number in range(max_new_tokens):
            step = np.where(done, settings.padding, sampler(logits))
            yield step, logits
            done |= np.isin(step, ends)
            if number + 1 == max_new_tokens or done.all():
                return
            mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], 1)
            positions = (prompt.following + number)[:, None]
            if settings.multimodal:
                positions = np.broadcast_to(positions, (3, *positions.shape)).copy()
            logits, cache = self.decode(self.embed(step[:, None]), mask, positions, cache)


@dataclass
class Begun:
    """A prefill that is done: its prompt, the logits (B, V), the cache, and how long the pictures took in seconds."""

    prompt: Prompt
    logits: np.ndarray
    cache: Any
    encoded: float
