"""Every question to every entry, interleaved, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vtok.errors import VtokError
from vtok_eval.harness import store
from vtok_eval.harness.answers import Answers
from vtok_eval.harness.batch import Batch, sentence
from vtok_eval.harness.cells import Entry, originals
from vtok_eval.harness.ranks import Ranks
from vtok_eval.samples import Sample, Task

Judge = Callable[[str, Sample], bool]


@dataclass
class Asking:
    """The questions of one process.

    Attributes
    ----------
    answers : Answers
        The model.
    entries : sequence of Entry
        The plain model first.
    tasks : sequence of Task
        With the samples to ask.
    batch_size : int
        Questions at a time.
    judge : callable
        (answer, sample) -> right or wrong.
    out : Path
        Folder of the run.
    ranks : Ranks
        This process's share.
    advance : callable
        Told how many answers are there.
    """

    answers: Answers
    entries: Sequence[Entry]
    tasks: Sequence[Task]
    batch_size: int
    judge: Judge
    out: Path
    ranks: Ranks
    advance: Callable[[int], None]
    originals: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.originals = originals(self.entries)

    def run(self) -> None:
        """Ask what ``samples.jsonl`` does not hold yet; after every entry of a batch its answers are on the disk.

        Raises
        ------
        VtokError
            The disk is full.
        """
        done = {store.key_of(line) for line in store.read(self.out / store.SAMPLES)}
        with store.Lines(self.out / store.share(self.ranks.rank, self.ranks.world)) as file:
            for number, (task, samples) in enumerate(self._batches()):
                if self.ranks.mine(number):
                    self._ask(number, task, samples, done, file)

    def _batches(self) -> list[tuple[Task, Sequence[Sample]]]:
        """The same ones whatever is done already, so that a run that goes on asks in the same company. Questions about
        one picture come close together, also those of other tasks: its features are remembered for a while only."""
        found = []
        for task in self.tasks:
            samples = sorted(task.samples, key=lambda sample: sample.images)
            for start in range(0, len(samples), self.batch_size):
                found.append((task, samples[start : start + self.batch_size]))
        return sorted(found, key=lambda batch: batch[1][0].images)

    def _ask(self, number: int, task: Task, samples: Sequence[Sample], done: set[store.Key], file: store.Lines) -> None:
        todo = {
            entry.id: {own.id for own in samples if (entry.id, task.name, own.id) not in done} for entry in self.entries
        }
        self.advance(sum(len(samples) - len(names) for names in todo.values()))
        if not any(todo.values()):
            return
        batch = Batch.of(self.answers, task, samples)
        plain, *rest = self.entries
        shift = number % max(1, len(rest))
        found: dict[str, list[dict[str, Any]]] = {}
        for entry in (plain, *rest[shift:], *rest[:shift]):
            if todo[entry.id]:
                original = self.originals[entry.id]
                if original not in found:
                    found[original] = list(self._lines(entry, batch))
                lines = [{**line, "entry": entry.id} for line in found[original] if line["sample"] in todo[entry.id]]
                file.append(lines)
                self.advance(len(lines))

    def _lines(self, entry: Entry, batch: Batch) -> Iterator[dict[str, Any]]:
        """A line of every sample; where the batch fails, its samples are asked one by one."""
        for sample, error in batch.broken:
            yield self._line(entry, batch.task, sample, "", error=error)
        if not batch.samples:
            return
        try:
            found = batch.ask(entry)
        except torch.AcceleratorError as error:  # nothing works any more after one
            raise VtokError(
                f"{entry.id} made the {self.answers.model.device.type} fail ({sentence(error)}); what is written so "
                "far is kept, and the same command goes on from there"
            ) from error
        # methods, adapters and processors may be anybody's; whatever one sample makes them raise is written into its
        # line, and the others of a run of hours are still asked
        except Exception as error:
            if len(batch.samples) == 1:
                yield self._line(entry, batch.task, batch.samples[0], batch.texts[0], error=sentence(error))
                return
            for single in batch.singles():
                yield from self._lines(entry, single)
            return
        for sample, text, (answer, seen) in zip(batch.samples, batch.texts, found, strict=True):
            yield self._line(entry, batch.task, sample, text, answer, seen)

    def _line(
        self,
        entry: Entry,
        task: Task,
        sample: Sample,
        prompt: str,
        answer: str = "",
        seen: Any = None,
        error: str | None = None,
    ) -> dict[str, Any]:
        return {
            "entry": entry.id,
            "task": task.name,
            "sample": sample.id,
            "prompt": prompt,
            "answer": answer,
            "truth": sample.answer,
            "correct": bool(answer) and bool(self.judge(answer, sample)),
            "kept": seen.kept if seen else [],
            "tokens": seen.tokens if seen else [],
            "layers_average": round(seen.average, 4) if seen else 0.0,
            "layers": seen.layers if seen else [],
            "mac_ratio": round(seen.mac_ratio, 6) if seen else 0.0,
            "error": error,
        }
