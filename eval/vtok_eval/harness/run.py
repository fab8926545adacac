"""``evaluate``: ask every entry every question, in an order that rotates, and score the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtok.errors import VtokError
from vtok.progress import progress as progress_bar
from vtok_eval.harness import start, store, timing
from vtok_eval.harness.answers import Answers
from vtok_eval.harness.asking import Asking, Judge
from vtok_eval.harness.cells import Asked, drawing, line_up
from vtok_eval.harness.features import CAPACITY, Features
from vtok_eval.harness.ranks import Ranks
from vtok_eval.harness.results import described_task, finite, heading, row
from vtok_eval.harness.score import Table, collect
from vtok_eval.harness.settings import settings
from vtok_eval.harness.sizes import token_sizes
from vtok_eval.samples import Task
from vtok_eval.tasks import limited, right

SCHEMA = 1


def evaluate(
    model: Any,
    processor: Any,
    methods: Sequence[Asked],
    keeps: Sequence[int | float],
    tasks: Sequence[Task],
    out: str | Path,
    *,
    name: str = "",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 16,
    instruction: bool | None = None,
    seed: int = 0,
    blank: bool = False,
    time_samples: int = 8,
    repeats: int = 3,
    clock: str = "wall",
    share_features: bool = True,
    overwrite: bool = False,
    report: bool = True,
    progress: bool = True,
    command: str = "",
    judge: Judge | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Answer every question with every method at every budget, and compare.

    Parameters
    ----------
    model : nn.Module
        A vision-language model, not compressed.
    processor : ProcessorMixin
        Of the model.
    methods : sequence
        Names (``"divprune+random_deep"`` composes), methods, or lists of them.
    keeps : sequence of int or float
        Budgets, as for ``vtok.compress``.
    tasks : sequence of Task
        As ``vtok_eval.tasks.load`` gives them.
    out : str or Path
        Folder for ``results.json``, ``samples.jsonl`` and what else there is. A run that was stopped goes on there.
    name : str
        The model's name, for tables.
    options : mapping, optional
        Method name -> options, for methods that are given by name.
    limit : int, optional
        Only so many samples of each task, each group by its share.
    batch_size : int
        Questions at a time; changes no answer (in half precision: but for ties).
    max_new_tokens : int
        Longest answer.
    instruction : bool, optional
        Put the task's instruction behind the question. Default: unless the model's config says ``vtok_instruction``
        false, or it is one of the nano models.
    seed : int
        Of the bootstrap, and of methods that draw.
    blank : bool
        Ask the plain model with grey pictures, too: what the questions give away.
    time_samples, repeats : int
        Samples that are timed, and rounds over all entries with each; 0 samples: no timing.
    clock : {"wall", "cpu"}
        As for ``vtok.bench.run``.
    share_features : bool
        Encode a picture once for all methods that leave the vision tower alone. Changes no answer.
    overwrite : bool
        Throw away what ``out`` holds of an earlier run.
    report : bool
        Write ``report.html`` and plots, too.
    progress : bool
        Show bars when it takes longer than two seconds.
    command : str
        Noted in the results.
    judge : callable, optional
        (answer, sample) -> right or wrong; by default ``vtok_eval.tasks.right``.
    ranks : Ranks, optional
        This process's share, as ``vtok_eval.harness.ranks.joined`` gives it.

    Returns
    -------
    dict
        The contents of ``results.json``; of a rank other than 0 an empty one.

    Raises
    ------
    VtokError
        Settings that make no sense, a folder that holds answers made with other settings, or a full disk.
    """
    start.check(model, batch_size, limit, max_new_tokens, time_samples, repeats, clock)
    _check(tasks)
    ranks, out = ranks or Ranks(), Path(out)
    adapter = start.plain_adapter(model)
    prompts = start.prompts_of(model, processor, name, instruction)
    options = _seeded(methods, options or {}, seed)
    entries = line_up(model, methods, keeps, options, token_sizes(prompts, adapter, tasks), blank)
    features = Features(model, adapter, CAPACITY if share_features else 0)
    answers = Answers(model, adapter, prompts, max_new_tokens, features)
    asked = settings(model, prompts, answers.config, tasks, entries)
    cut = limited(tasks, limit)
    running = [entry for entry in entries if entry.status != "refused"]
    steps = sum(len(task.samples) for task in cut) * len(running)
    with store.locked(out, ranks.first):
        start.go_on(out, asked, overwrite, ranks)
        shown = progress and ranks.first
        with progress_bar(f"eval {name}".strip(), -(-steps // ranks.world), shown) as advance:
            Asking(answers, running, cut, batch_size, judge or right, out, ranks, advance).run()
        ranks.wait()
        if not ranks.first:
            return {}
        store.gather(out)
        key = store.fingerprint(asked)
        times = timing.measure(answers, running, cut, out, time_samples, repeats, clock, progress, key)
        wanted = {(entry.id, task.name, own.id) for entry in running for task in cut for own in task.samples}
        found = collect(store.read(out / store.SAMPLES), wanted)
        if len(found) < len(wanted):
            raise VtokError(f"{len(wanted) - len(found)} answers are missing in {out}; the same command asks for them")
        table = Table(entries, cut, found, seed)
        head = heading(SCHEMA, command, model, adapter, name)
        results = {
            **head,
            "model": {**head["model"], "tokens_per_image": table.tokens_per_image()},
            "settings": {
                "batch_size": batch_size,
                "limit": limit,
                "seed": seed,
                "max_new_tokens": max_new_tokens,
                "time_samples": time_samples,
                "repeats": repeats,
                "clock": clock,
                "instruction": prompts.instruction,
                "processes": ranks.world,
            },
            "fingerprint": key,
            "tasks": [described_task(task) for task in cut],
            "entries": [row(table, entry, times) for entry in entries],
            "problems": table.problems(),
        }
        results = finite(results)
        store.write_json(out / store.RESULTS, results)
        if report:
            _render(out, cut)
    return results


def _check(tasks: Sequence[Task]) -> None:
    if not any(task.samples for task in tasks):
        raise VtokError("there is no sample in these tasks, so nothing to ask; name other tasks or another folder")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise VtokError(f"two tasks have the same name ({', '.join(names)}); rename one")


def _seeded(methods: Sequence[Asked], options: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
    """Options with the seed for every named method that draws, unless it has one."""
    if not seed:
        return options
    found = {name: dict(own) for name, own in options.items()}
    for name in {part for asked in methods if isinstance(asked, str) for part in asked.split("+")}:
        if own := drawing(name, seed):
            found[name] = {**own, **found.get(name, {})}
    return found


def _render(out: Path, tasks: Sequence[Task]) -> None:
    try:
        from vtok_eval import render

        render.write(out, tasks)
    except (ImportError, OSError) as error:
        raise VtokError(
            f"the numbers are in {out / store.RESULTS}, but no report was drawn ({error}); once that is mended the "
            "same command draws it and asks nothing again"
        ) from error
