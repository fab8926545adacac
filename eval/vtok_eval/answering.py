"""Prompts to answers in batches, with what each one cost: the part that plug-ins of other harnesses share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vtok.api import adapter_of
from vtok.bench.measure import FirstLogits, clock, prefill_peak
from vtok.errors import VtokError
from vtok.photo import opened
from vtok_eval.harness.counts import Seen, of_last
from vtok_eval.harness.prompts import Prompts, takes_instruction
from vtok_eval.samples import INSTRUCTION

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
SAMPLING = ("temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "no_repeat_ngram_size")


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt, one placeholder a picture, and its pictures in order."""

    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it cost.

    Attributes
    ----------
    text : str
        Without special tokens and outer blanks, up to the first stop string.
    new_tokens, text_tokens : int
        Generated, and of the prompt without its pictures.
    seen : Seen
        Visual tokens of each picture, and what each decoder layer saw of them.
    prefill_ms : float
        Pixels to first logits: the batch's time over its samples.
    """

    text: str
    new_tokens: int
    text_tokens: int
    seen: Seen
    prefill_ms: float


class Answerer:
    """A model and its processor, asked through chat messages.

    Parameters
    ----------
    model : PreTrainedModel
        Compressed or not.
    processor : ProcessorMixin
        Of the model.
    name : str
        Of the model. Embedded models were trained on bare questions: the line that asks for a single word or phrase is
        taken off their prompts.
    memory : bool
        Measure ``peak_mb``: costs one prefill more.

    Attributes
    ----------
    seconds, new_tokens : float, int
        Sums over all answers.
    peak_mb : float or None
        What the prefill of the first batch with pictures needed beside weights and inputs, in units of 2**20 bytes.
    """

    def __init__(self, model: Any, processor: Any, name: str = "", *, memory: bool = False) -> None:
        self.model = model
        self.prompts = Prompts(processor)
        self.bare = not takes_instruction(model, name)
        self.adapter = adapter_of(model)
        self.seconds, self.new_tokens = 0.0, 0
        self.memory = memory
        self.peak_mb: float | None = None

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """Messages of a chat through the processor's own template.

        Parameters
        ----------
        messages : sequence of mappings
            ``{"role": "user", "content": [...]}`` with ``{"type": "image", "image": picture or path}`` and
            ``{"type": "text", "text": ...}``.

        Raises
        ------
        VtokError
            Content that is neither text nor a picture.
        """
        images: list[Image.Image] = []
        turns = [{"role": turn["role"], "content": self._parts(turn["content"], images)} for turn in messages]
        return Prompt(self.prompts.rendered(turns), tuple(images))

    def _parts(self, content: Any, images: list[Image.Image]) -> list[dict[str, str]]:
        parts: list[dict[str, str]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                text = part["text"]
                if self.bare and text.endswith(INSTRUCTION):
                    text = text.removesuffix(INSTRUCTION).rstrip()
                parts.append({"type": "text", "text": text})
            elif part["type"] == "image":
                images.append(picture(part["image"]))
                parts.append({"type": "image"})
            else:
                raise VtokError(f"this prompt holds {part['type']}; vtok's plug-ins read text and pictures only")
        return parts

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 16, until: Sequence[str] = (), **sampling: Any
    ) -> list[Answer]:
        """Answers to a batch; rows with and without pictures go through apart.

        Parameters
        ----------
        prompts : sequence of Prompt
            Padded on the left.
        max_new_tokens : int
            At most.
        until : sequence of str
            The answer ends before the first of these.
        **sampling
            ``temperature``, ``top_p``, ``num_beams`` ... as for ``generate``; greedy without a positive temperature.
        """
        if not prompts:
            return []
        parts = [[i for i, prompt in enumerate(prompts) if bool(prompt.images) is seeing] for seeing in (True, False)]
        if all(parts):
            made: dict[int, Answer] = {}
            for part in parts:
                batch = self.answer([prompts[i] for i in part], max_new_tokens=max_new_tokens, until=until, **sampling)
                made.update(zip(part, batch, strict=True))
            return [made[i] for i in range(len(prompts))]
        inputs = self._inputs(prompts)
        if self.memory and self.peak_mb is None and prompts[0].images:  # also warms up what is timed below
            self.peak_mb = prefill_peak(self.model, inputs) / 2**20
        mark = FirstLogits(self.model.device)
        start = clock(self.model.device)
        tokens = self._generate(inputs, [mark], max_new_tokens, sampling)
        assert mark.seconds is not None
        self.seconds += clock(self.model.device) - start
        lengths = self._lengths(tokens)
        self.new_tokens += sum(lengths)
        seen = of_last(self.model, self.adapter, inputs, [len(prompt.images) for prompt in prompts])
        visual = (inputs["input_ids"] == self.adapter.placeholder("image")).sum(1)
        words = (inputs["attention_mask"].sum(1) - visual).tolist()
        texts = [_cut(text, until) for text in self.prompts.answers(tokens)]
        each = 1000 * (mark.seconds - start) / len(prompts)
        return [Answer(*row, each) for row in zip(texts, lengths, words, seen, strict=True)]

    @torch.no_grad()
    def likelihood(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """How likely each continuation is, as decoding after its prompt: what is kept depends on the prompt alone.

        Returns
        -------
        list of (float, bool)
            Mean log-probability of the continuation's tokens, and whether greedy decoding would have given them.

        Raises
        ------
        VtokError
            A continuation without tokens.
        """
        tokenizer = self.prompts.processor.tokenizer
        wanted = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            # behind "assistant\n" the blank that harnesses put before a continuation is one too many
            text = continuation.lstrip() if prompt.text[-1:].isspace() else continuation
            before, both = (tokenizer(piece)["input_ids"] for piece in (prompt.text, prompt.text + text))
            joined = both[: len(before)] == before
            ids = both[len(before) :] if joined else tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise VtokError(f"the continuation {continuation!r} has no tokens; give it some text")
            wanted.append(ids)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(wanted)
        for seeing in (True, False):
            part = [i for i, prompt in enumerate(prompts) if bool(prompt.images) is seeing]
            if not part:
                continue
            forced = _Forced([wanted[i] for i in part], tokenizer.eos_token_id)
            inputs = self._inputs([prompts[i] for i in part])
            self._generate(inputs, [forced], max(len(wanted[i]) for i in part), {"repetition_penalty": 1.0})
            for i, result in zip(part, forced.results(), strict=True):
                found[i] = result
        return found

    def _inputs(self, prompts: Sequence[Prompt]) -> Any:
        inputs = self.prompts.inputs([prompt.text for prompt in prompts], [prompt.images for prompt in prompts])
        return inputs.to(self.model.device, self.model.dtype)

    def _generate(
        self, inputs: Any, processors: list[LogitsProcessor], max_new_tokens: int, sampling: Mapping[str, Any]
    ) -> Tensor:
        """New tokens (B, L), pads behind the end."""
        given = {name: value for name, value in sampling.items() if name in SAMPLING and value is not None}
        warm = float(given.get("temperature") or 0) > 0 and sampling.get("do_sample") is not False
        how = {**given, "do_sample": True} if warm else {**given, **GREEDY}
        tokens = self.model.generate(
            **inputs,
            max_new_tokens=int(max_new_tokens),
            pad_token_id=self.prompts.processor.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList(processors),
            **how,
        )
        return tokens[:, inputs["input_ids"].shape[1] :]

    def _lengths(self, tokens: Tensor) -> list[int]:
        """Generated tokens of each row, the end included."""
        ends = self.model.generation_config.eos_token_id
        ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        rows = tokens.tolist()
        return [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]


def picture(given: Any) -> Image.Image:
    """A PIL image in RGB, from one or from a path.

    Raises
    ------
    VtokError
        A file that is no picture, or something else.
    """
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, str):
        return opened(given.removeprefix("file://"))
    raise VtokError(f"{type(given).__name__} is no picture; give a PIL image or the path of a picture file")


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


class _Forced(LogitsProcessor):
    """Makes generation say given tokens, and notes how likely each one was."""

    def __init__(self, wanted: Sequence[Sequence[int]], end: int) -> None:
        self.wanted, self.end, self.step = wanted, end, 0
        self.total = [0.0] * len(wanted)
        self.greedy = [True] * len(wanted)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        logs = torch.log_softmax(scores.float(), dim=-1)
        best = logs.argmax(-1).tolist()
        forced = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(self.wanted):
            token = ids[self.step] if self.step < len(ids) else self.end
            if self.step < len(ids):
                self.total[row] += logs[row, token].item()
                self.greedy[row] &= best[row] == token
            forced[row, token] = 0
        self.step += 1
        return forced

    def results(self) -> list[tuple[float, bool]]:
        """Mean log-probability and greediness of each row."""
        return [
            (total / len(ids), greedy) for total, ids, greedy in zip(self.total, self.wanted, self.greedy, strict=True)
        ]
