"""vtok's models inside lmms-eval (0.7): requests to answers, and their costs to its tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from vtok.errors import VtokError
from vtok_eval.answering import Answer, Answerer, Prompt
from vtok_eval.arguments import Arguments

try:
    from accelerate import Accelerator
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
except ImportError as error:
    raise VtokError(f"lmms-eval 0.7 is not installed here ({error}); pip install lmms-eval==0.7.3") from error

#: of lmms-eval's own, which a user may put on its command line; no setting of vtok
FOREIGN = ("batch_size", "max_batch_size", "device")
#: lmms-eval's default between examples; as a stop string it would cut answers of several paragraphs
BLANK_LINE = "\n\n"


@dataclass
class Costs(TokenCounts):
    """lmms-eval's token counts of a sample, and vtok's beside them; all of it lands in ``*_samples_*.jsonl``.

    Attributes
    ----------
    visual_tokens, kept_tokens_input, kept_tokens_layers : float
        Per picture: before anything is dropped, those that enter the language model, and the average over its layers.
    prefill_ms : float
        Pixels to first logits, the batch's time over its samples.
    """

    visual_tokens: float = 0.0
    kept_tokens_input: float = 0.0
    kept_tokens_layers: float = 0.0
    prefill_ms: float = 0.0

    @classmethod
    def of(cls, answer: Answer) -> Costs:
        """Of one answer. Input tokens are those that the first decoder layer sees."""
        pictures, entering = len(answer.seen.tokens), float(answer.seen.layers[0][1])
        return cls(
            input_tokens=round(answer.text_tokens + pictures * entering),
            output_tokens=answer.new_tokens,
            visual_tokens=sum(answer.seen.tokens) / pictures if pictures else 0.0,
            kept_tokens_input=entering,
            kept_tokens_layers=answer.seen.average,
            prefill_ms=answer.prefill_ms,
        )

    def own(self) -> dict[str, float]:
        """vtok's part of the counts."""
        return {name: round(getattr(self, name), 3) for name in Costs.__annotations__}

    def to_dict(self) -> dict[str, Any]:
        """For the log of samples."""
        return {**super().to_dict(), **self.own()}


class Likelihood(tuple):
    """(loss, greedy) that reaches the task as it is.

    lmms-eval 0.7.3 makes a string of every tuple, but not of what ``GenerationResult`` holds. Its cache would give back
    a list, and that become a string, too: an answer that strips to nothing is not put into it.
    """

    def strip(self) -> str:
        """Blank."""
        return ""


class Vtok(lmms):
    """A model of transformers under ``vtok.compress``; pictures go in front of the text.

    Parameters
    ----------
    batch_size : int or str
        Samples at a time.
    max_batch_size : int, optional
        Not used.
    device : str, optional
        Where the model goes.
    **given
        As ``Arguments`` says; ``option_NAME`` is an option of the method. All of it belongs into ``--model_args``,
        which is the key of lmms-eval's cache.
    """

    is_simple = True

    def __init__(
        self, batch_size: int | str = 1, max_batch_size: int | None = None, device: str | None = None, **given: Any
    ) -> None:
        super().__init__()
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise VtokError(
                f"batch_size={batch_size}: vtok finds no size by itself; give a number, such as 8"
            ) from None
        if self.batch_size < 1:
            raise VtokError(f"batch_size={batch_size}: at least one sample has to go through at a time")
        self.arguments = Arguments.of({**given, "device": device})
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        own = self.accelerator.device if self._world_size > 1 else None
        self.model, processor = self.arguments.open(own)
        self.device = self.model.device
        self.answerer = Answerer(self.model, processor, self.arguments.pretrained, memory=True)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Vtok:
        """lmms-eval's way to make a model. What stands in ``--model_args`` comes before what the command line adds."""
        from lmms_eval.utils import simple_parse_args_string

        given = simple_parse_args_string(arg_string)
        added = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**{name: added[name] for name in FOREIGN if name in added}, **given})

    def clean(self) -> None:
        """Let go of the model: lmms-eval may start a judge on the same GPU."""
        del self.answerer
        super().clean()

    @property
    def tokenizer(self) -> Any:
        """Of the model."""
        return self.answerer.prompts.processor.tokenizer

    # -- requests -------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers in the order of the requests, with their costs."""
        before = (self.answerer.seconds, self.answerer.new_tokens)
        made: dict[int, Answer] = {}
        for numbers, how in self._batches([self._how(request) for request in requests]):
            until = [stop for stop in _listed(how.pop("until", ())) if stop != BLANK_LINE]
            prompts = [self._prompt(requests[number]) for number in numbers]
            limit = int(how.pop("max_new_tokens", self.arguments.max_new_tokens))
            answers = self.answerer.answer(prompts, max_new_tokens=limit, until=until, **how)
            made.update(zip(numbers, answers, strict=True))
        costs = [Costs.of(made[number]) for number in range(len(requests))]
        self._log(costs, self.answerer.seconds - before[0], self.answerer.new_tokens - before[1])
        texts = [made[number].text for number in range(len(requests))]
        return [GenerationResult(text, own) for text, own in zip(texts, costs, strict=True)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Mean loss of each continuation (lower is likelier, which is what lmms-eval's choices are ranked by)."""
        found: dict[int, Likelihood] = {}
        for numbers, _ in self._batches([{}] * len(requests)):
            prompts, continuations = [], []
            for number in numbers:
                context, continuation, *rest = requests[number].args
                doc = self._doc(*rest[1:]) if rest else None
                prompts.append(self._asked(context, rest[0](doc) if rest and callable(rest[0]) else None))
                continuations.append(continuation(doc) if callable(continuation) else continuation)
            likely = self.answerer.likelihood(prompts, continuations)
            found.update((i, Likelihood((-mean, greedy))) for i, (mean, greedy) in zip(numbers, likely, strict=True))
        return [GenerationResult(found[number]) for number in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not supported."""
        raise VtokError("vtok's model answers in one round; leave out tasks of output_type generate_until_multi_round")

    def _prompt(self, request: Any) -> Prompt:
        context, _, to_visual, *where = request.args
        return self._asked(context, to_visual(self._doc(*where)) if callable(to_visual) else None)

    def _how(self, request: Any) -> dict[str, Any]:
        return request.args[1]

    def _asked(self, text: str, visuals: Any) -> Prompt:
        """One turn of a user: pictures, then text."""
        parts: list[dict[str, Any]] = [{"type": "image", "image": visual} for visual in _pictures(visuals)]
        return self.answerer.prompt([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])

    def _doc(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _batches(self, settings: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Numbers of requests that share their settings, a batch at a time, with a bar on the first rank."""
        from tqdm import tqdm

        groups: dict[str, list[int]] = {}
        for number, how in enumerate(settings):
            groups.setdefault(repr(sorted(how.items())), []).append(number)
        with tqdm(total=len(settings), disable=self.rank != 0, desc="vtok", file=sys.stderr) as bar:
            for numbers in groups.values():
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    yield batch, dict(settings[batch[0]])
                    bar.update(len(batch))

    def _log(self, costs: Sequence[Costs], seconds: float, new_tokens: int) -> None:
        """This rank's means, and the median of the prefill, into lmms-eval's throughput table and the results file."""
        if not costs:
            return
        means: dict[str, Any] = {"total_requests": len(costs)}
        seeing = [cost for cost in costs if cost.visual_tokens] or list(costs)
        for name in Costs.__annotations__:
            average = median if name == "prefill_ms" else fmean
            means[name] = average(getattr(cost, name) for cost in seeing)
        if self.answerer.peak_mb is not None:
            means["prefill_peak_mb"] = self.answerer.peak_mb
        log_metrics(seconds, new_tokens, new_tokens / seconds if seconds else 0.0, means)


class VtokChat(Vtok):
    """The same for tasks that write messages: pictures stand where the task puts them, if the template can."""

    is_simple = False

    def _prompt(self, request: Any) -> Prompt:
        _, to_messages, _, *where = request.args
        turns = []
        for message in to_messages(self._doc(*where)):
            content = message["content"]
            if not isinstance(content, str):
                content = [_part(part) for part in content]
            turns.append({"role": message["role"], "content": content})
        return self.answerer.prompt(turns)

    def _how(self, request: Any) -> dict[str, Any]:
        return request.args[2]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval's ``url`` is whatever stands for the picture."""
    if part["type"] == "image":
        return {"type": "image", "image": part.get("url", part.get("image"))}
    return dict(part)


def _pictures(visuals: Any) -> Iterable[Any]:
    """What a task's ``doc_to_visual`` gave, videos refused."""
    for visual in visuals or ():
        if isinstance(visual, dict) or (isinstance(visual, str) and not _looks_like_a_picture(visual)):
            raise VtokError(
                "this task gives a video or sound; vtok's model reads pictures only, so take tasks with pictures"
            )
        yield visual


def _looks_like_a_picture(path: str) -> bool:
    return path.lower().endswith((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"))


def _listed(until: Any) -> list[str]:
    return [until] if isinstance(until, str) else list(until or ())
