"""Markdown tables for model cards and the README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vtok_eval.render.columns import Column, columns
from vtok_eval.render.results import Entry, Run, interval
from vtok_eval.render.words import NONE, TO, budget, count, percent, stars, tokens

SHORT = ("retention", "difference", "p_random", "hard", "average", "macs", "prefill", "speedup", "share")
"""Columns of the summary besides accuracy with its interval; the page has them all."""


def summary_markdown(results: Mapping[str, Any] | Run, keeps: Iterable[float] | None = None) -> str:
    """One table: a row a method and budget, the best accuracy of each budget bold.

    Parameters
    ----------
    results : mapping
        ``results.json`` as it was read.
    keeps : iterable of float, optional
        Only these budgets.
    """
    run = results if isinstance(results, Run) else Run(results)
    shown = [column for column in columns(run) if column.key in SHORT]
    heads = ["method", "keep", "accuracy, % (95% interval)"]
    heads += [_head(column) for column in shown]
    rows = []
    if run.plain is not None:
        rows.append([run.plain.id, NONE, _accuracy(run.plain), *(column.text(run.plain) for column in shown)])
    wanted = run.keeps if keeps is None else [keep for keep in run.keeps if keep in set(keeps)]
    for keep in wanted:
        top = max((entry.accuracy() or 0.0 for entry in run.reached(keep)), default=None)
        for entry in run.at(keep):
            if entry.status == "refused" or entry.accuracy() is None:
                rows.append([_name(entry), budget(keep), entry.status, *([NONE] * len(shown))])
                continue
            best = entry.reached and entry.accuracy() == top
            cells = [column.text(entry) if column.value(entry) is not None else NONE for column in shown]
            rows.append([_name(entry), budget(keep), _accuracy(entry, best), *cells])
    return "\n".join([*table(heads, rows), *_remarks(run, wanted)]) + "\n"


def tasks_markdown(run: Run, keeps: Sequence[float] | None = None) -> str:
    """Accuracy of every task, a table a budget; what is lost against the plain model with its significance."""
    names = run.by_need()
    plain = run.plain
    blocks = []
    for keep in run.keeps if keeps is None else keeps:
        rows = []
        if plain is not None:
            rows.append([plain.id, *(percent(plain.accuracy(task)) for task in [*names, None])])
        for entry in run.at(keep):
            if entry.accuracy() is None:
                continue
            cells = [percent(entry.accuracy(task)) + stars(entry.number("tasks", task, "p_plain")) for task in names]
            cells.append(percent(entry.accuracy()) + stars(entry.number("overall", "p_plain")))
            rows.append([_name(entry), *cells])
        title = f"{budget(keep)} tokens" if keep >= 1 else f"{budget(keep)} of the tokens"
        blocks.append("\n".join([f"### {title}", "", *table(["method", *names, "all"], rows)]))
    return "\n\n".join(blocks) + "\n"


def page_markdown(run: Run) -> str:
    """All of ``results.md``: what was run, the summary, the tasks, the groups."""
    model, machine = run.model, run.results.get("machine") or {}
    command = str(run.results.get("command") or "").replace("```", "")
    where = [str(machine.get("device") or "unknown machine"), str(model.get("dtype") or "")]
    where += [f"{name} {machine[name]}" for name in ("torch", "transformers") if machine.get(name)]
    lines = [
        f"# {_plain(model.get('name', 'Results'))}",
        "",
        f"{count(run.samples, 'question')} in {count(len(run.tasks), 'task')}; "
        f"{tokens(run.full)} visual tokens per image; {_plain(', '.join(filter(None, where)))}.",
        "",
        *(["```", command, "```", ""] if command else []),
        "## All methods",
        "",
        summary_markdown(run),
        "## Task by task",
        "",
        "Accuracy, %; asterisks as above, against the plain model.",
        "",
        tasks_markdown(run),
    ]
    if run.groups:
        lines += ["## " + " and ".join(run.groups).capitalize(), "", *_groups(run), ""]
    return "\n".join(lines).rstrip() + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    return [*lines, *(f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows)]


def _head(column: Column) -> str:
    """A heading that stands without the one above it."""
    if column.group == "time, ms":
        return f"{column.head}, ms"
    return {"retention": "kept, %", "hard": "hard, %", "average": "average tokens"}.get(column.key, column.head)


def _accuracy(entry: Entry, best: bool = False) -> str:
    text = percent(entry.accuracy())
    ci = interval(entry.score(), "ci")
    text = f"**{text}**" if best else text
    return f"{text} ({percent(ci[0])}{TO}{percent(ci[1])})" if ci else text


def _name(entry: Entry) -> str:
    return f"{entry.name} †" if entry.status == "raised" else entry.name


def _remarks(run: Run, keeps: Sequence[float]) -> list[str]:
    here = [entry for keep in keeps for entry in run.at(keep)]
    lines = [
        "kept: share of the plain accuracy; vs plain: percentage points, \\* p < 0.05, \\*\\* p < 0.01, "
        "\\*\\*\\* p < 0.001 (McNemar, exact); vs random: p-value; hard: samples that merely shrinking the picture to "
        "the same budget gets wrong; of random: speed as a share of random pruning with the same cuts."
    ]
    if any(entry.status == "raised" for entry in here):
        raised = {e.name: e.number("budget") or 0.0 for e in here if e.status == "raised"}
        said = ", ".join(f"{name} {tokens(least)}" for name, least in raised.items())
        lines.append(f"† cuts too late for this budget and ran at the smallest it reaches ({said}).")
    lines += [_plain(remark) for remark in run.remarks()]
    lines += [f"{e.name}: {_plain(e.note)}" for e in _once(e for e in here if e.status == "refused" and e.note)]
    return ["", "<br>".join(lines)]


def _once(entries: Iterable[Entry]) -> list[Entry]:
    return list({entry.name: entry for entry in entries}.values())


def _groups(run: Run) -> list[str]:
    rows = []
    for entry in [*([run.plain] if run.plain else []), *(e for keep in run.keeps for e in run.at(keep))]:
        if entry.accuracy() is not None:
            own = [percent(entry.number("overall", "groups", name, "accuracy")) for name in run.groups]
            rows.append([_name(entry), budget(entry.keep), *own])
    return table(["method", "keep", *(f"{name}, %" for name in run.groups)], rows)


def _plain(text: object) -> str:
    """Text that breaks no table and is no markup."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())
