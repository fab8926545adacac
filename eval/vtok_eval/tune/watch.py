"""Speed-ups of the prefill, paired with the plain model round by round, each measured once and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtok.bench.contest import Contender, Row, timed_round
from vtok.bench.measure import machine
from vtok.progress import progress as progress_bar
from vtok_eval.harness import store
from vtok_eval.harness.answers import Answers
from vtok_eval.harness.batch import inputs_of
from vtok_eval.harness.cells import PLAIN, Entry
from vtok_eval.samples import Task

TIMES = "tune_times.jsonl"


@dataclass
class Watch:
    """Times entries.

    Attributes
    ----------
    answers : Answers
        The model.
    out : Path
        Folder of the run.
    key : str
        Fingerprint of what answers depend on; times of other models and machines are not taken up.
    samples, repeats : int
        Questions, and rounds with each.
    clock : {"wall", "cpu"}
        As for ``vtok.bench.run``.
    progress : bool
        Show a bar.
    """

    answers: Answers
    out: Path
    key: str
    samples: int
    repeats: int
    clock: str
    progress: bool

    def ratios(self, entries: Sequence[Entry], tasks: Sequence[Task]) -> dict[str, list[list[float]]]:
        """Entry -> for every timed question the plain model's prefill over its own, one a round."""
        questions = self._chosen(tasks)
        names = [[task.name, sample.id] for task, sample in questions]
        where = machine(self.answers.model.device)
        key = store.fingerprint([self.key, where, self.clock, self.repeats, names])
        known = {line["entry"]: line["ratios"] for line in store.read(self.out / TIMES) if line["key"] == key}
        new = [entry for entry in entries if entry.id not in known]
        if new:
            found = self._timed(new, questions)
            with store.Lines(self.out / TIMES) as file:
                file.append([{"key": key, "entry": name, "ratios": ratios} for name, ratios in found.items()])
            known.update(found)
        return {entry.id: known[entry.id] for entry in entries}

    def _chosen(self, tasks: Sequence[Task]) -> list[tuple[Task, Any]]:
        """Questions with pictures, one task after the other in turns."""
        columns = [[(task, sample) for sample in task.samples if sample.images] for task in tasks]
        depth = max(map(len, columns), default=0)
        turns = [column[i] for i in range(depth) for column in columns if i < len(column)]
        return turns[: self.samples]

    def _timed(self, entries: Sequence[Entry], questions: Sequence[tuple[Task, Any]]) -> dict[str, list[list[float]]]:
        model, adapter = self.answers.model, self.answers.adapter
        contenders = [Contender(Row(PLAIN, "plain"))]
        contenders += [Contender(Row(own.id, "method", keep=own.budget), own.chain) for own in entries]
        found: dict[str, list[list[float]]] = {entry.id: [] for entry in entries}
        steps = len(questions) * (self.repeats + 1) * len(contenders)
        with progress_bar(f"timing {len(entries)} configurations", steps, self.progress) as advance:
            for task, sample in questions:
                inputs = inputs_of(self.answers, task, sample)
                if inputs is None:
                    advance((self.repeats + 1) * len(contenders))
                    continue
                ready = [own for own in contenders if self._warm(own, inputs)]
                advance(len(contenders))
                if not ready or ready[0] is not contenders[0]:
                    continue
                rounds: dict[str, list[float]] = {own.row.name: [] for own in ready[1:]}
                for turn in range(self.repeats):
                    times = timed_round(model, adapter, inputs, ready, turn, 1, self.clock, advance)
                    prefill = {row.name: own["prefill"] for row, own in times}
                    for name, ratios in rounds.items():
                        ratios.append(round(prefill[PLAIN] / prefill[name], 4))
                for name, ratios in rounds.items():
                    found[name].append(ratios)
        return found

    def _warm(self, contender: Contender, inputs: dict[str, Any]) -> bool:
        """One untimed round, and whether it can serve this question: what cannot is reported with the answers."""
        model, adapter = self.answers.model, self.answers.adapter
        try:
            timed_round(model, adapter, inputs, [contender], 0, 1, self.clock, lambda steps: None)
        except torch.AcceleratorError:  # nothing works any more after one
            raise
        # whatever it raises here it raises when it is asked, too, where it is reported
        except Exception:
            return False
        return True
