"""``python -m vtok_eval.models.ordered NAME --results FOLDER``: card of a trained resampler, from what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.cli import alone
from vtok.errors import VtokError
from vtok_eval.harness import store
from vtok_eval.harness.cells import Entry
from vtok_eval.harness.score import Table, collect
from vtok_eval.models import enough
from vtok_eval.models.about import PICTURES as LICENCES
from vtok_eval.render.markdown import page_markdown, table
from vtok_eval.render.results import Run, read
from vtok_eval.render.words import chance, percent, points

#: rows of the run: the resampler, the averages it is compared with, and what it started from
TRAINED, AVERAGES, START = "trained", "averages", "start"
COMPARED, AUTO = "compared.json", "auto.json"
PICTURES = {"pareto.png": "Accuracy against visual tokens", "curves.png": "Task by task"}
LEVEL = 0.05


def compared(folder: Path) -> list[dict[str, Any]]:
    """What a run on bundled tasks says of the resampler at every budget, the smallest first.

    Returns
    -------
    list of dict
        ``keep``; ``accuracy`` and its ``ci``; ``averages`` and ``best`` (the best method without training), each with
        its ``accuracy`` and the paired difference ``value``, ``ci``, ``p``; ``step``, the difference to the budget
        before.

    Raises
    ------
    VtokError
        No finished run, or one without these rows.
    """
    run = read(folder)
    names = set(run.names)
    if missing := {TRAINED, AVERAGES} - names:
        raise VtokError(
            f"{folder} has no row {' and '.join(sorted(missing))}; run vtok eval with --method "
            f"{TRAINED}=flextok,{AVERAGES}=flextok,... and -o {TRAINED}.weights=NAME"
        )
    scores = _table(run, folder)
    rows: list[dict[str, Any]] = []
    for keep in sorted(run.keeps):
        own = run.named(TRAINED, keep)
        if own is None or not own.reached:
            continue
        others = [e for e in run.reached(keep) if e.name != TRAINED and e.accuracy() is not None]
        row: dict[str, Any] = {"keep": keep, "accuracy": own.accuracy(), "ci": (own.score() or {})["ci"]}
        averages = next((e for e in others if e.name == AVERAGES), None)
        best = max(others, key=lambda e: e.accuracy() or 0.0, default=None)
        for key, other in (("averages", averages), ("best", best)):
            if other is not None:
                row[key] = {"name": other.name, "accuracy": other.accuracy(), **scores.against(own.id, other.id)}
        if rows:
            before = run.named(TRAINED, rows[-1]["keep"])
            assert before is not None
            row["step"] = scores.against(own.id, before.id)
        rows.append(row)
    return rows


def _table(run: Run, folder: Path) -> Table:
    from vtok_eval import tasks

    asked = tasks.load(list(run.task_names), limit=run.results["settings"]["limit"])
    entries = [
        Entry(e.id, e.method, keep=e.keep, status=e.status) for e in run.entries if e.status != "refused"
    ]  # fmt: skip
    wanted = {(entry.id, task.name, own.id) for entry in entries for task in asked for own in task.samples}
    found = collect(store.read(folder / store.SAMPLES), wanted)
    if len(found) < len(wanted):
        raise VtokError(f"{len(wanted) - len(found)} answers are missing in {folder}; run the same vtok eval again")
    return Table(entries, asked, found, run.results["settings"]["seed"])


def verdicts(rows: Sequence[Mapping[str, Any]], run: Run | None = None) -> list[str]:
    """Sentences on what was asked of a resampler: that more tokens never say less, and that it beats what is free."""
    falls = [row for row in rows if "step" in row and row["step"]["ci"][1] < 0]
    said = [
        "No doubling of the tokens makes it worse (95% intervals of paired differences)."
        if not falls
        else "Worse than with half the tokens (95% interval of the paired difference): "
        + ", ".join(f"{row['keep']:g} ({points(row['step']['value'])})" for row in falls)
        + "."
    ]
    few = [row for row in rows if row["keep"] <= 64 and "averages" in row]
    not_above = [row for row in few if row["averages"]["value"] <= 0 or row["averages"]["p"] >= LEVEL]
    said.append(
        "Better than averages at every number of tokens up to 64 (McNemar, p < 0.05)."
        if not not_above
        else "Not significantly better than averages at " + ", ".join(f"{row['keep']:g}" for row in not_above) + "."
    )
    for row in rows:
        if row["keep"] in (16, 32) and "best" in row:
            best = row["best"]
            said.append(
                f"At {row['keep']:g} tokens the best of these methods without training is {best['name']} with "
                f"{percent(best['accuracy'])}; the resampler is {points(best['value'])} points from it "
                f"(p = {chance(best['p'])})."
            )
            if run is not None:
                said[-1] += f" Task by task: {_by_task(run, row['keep'], best['name'])}."
    return said


def _by_task(run: Run, keep: float, other: str) -> str:
    """Differences of accuracy on each task, the largest gain first."""
    own, best = run.named(TRAINED, keep), run.named(other, keep)
    assert own is not None and best is not None
    gains = {task: (own.accuracy(task) or 0.0) - (best.accuracy(task) or 0.0) for task in run.task_names}
    return ", ".join(f"{task} {points(gain)}" for task, gain in sorted(gains.items(), key=lambda item: -item[1]))


def card(
    name: str,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    log: Sequence[Mapping[str, Any]],
    notes: str = "",
    config: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
    auto: Mapping[str, Any] | None = None,
) -> str:
    """The text of the card.

    Parameters
    ----------
    name : str
        Of the model that the resampler is for.
    results : mapping
        ``results.json`` of the run.
    rows : sequence of mapping
        As ``compared`` gives them.
    log : sequence of mapping
        Of the training.
    notes : str
        On the training.
    config : mapping, optional
        The resampler's.
    pictures : sequence of str
        Which plots lie beside the card.
    auto : mapping, optional
        ``command`` and ``rows`` of what ``keep="auto"`` gave.
    """
    run = Run(results)
    plain = run.plain.accuracy() if run.plain else None
    config = config or {}
    heads = ["tokens", "accuracy, % (95% interval)", "than with half", "averages", "difference, p", "best untrained",
             "difference, p"]  # fmt: skip
    parts = [
        f"# Ordered tokens of {name}",
        f"An `OrderedResampler` of {config.get('blocks')} blocks, {config.get('width')} channels, for 1 to "
        f"{config.get('tokens')} tokens of a picture, which start as `{config.get('scheme')}` "
        "([docs/resampler.md](../../docs/resampler.md)). One set of weights serves every number of tokens. Distilled "
        f"from [{name}](../{name}/README.md), which stayed frozen.",
        f'```python\nvtok.compress(model, "flextok", keep=17, weights="{name}")\n```',
        "## Accuracy",
        f"Overall, with all tokens {percent(plain)}. `{results['command']}` on {results['machine']['device']}, torch "
        f"{results['machine']['torch']}, transformers {results['machine']['transformers']}; {run.samples} questions, "
        "paired. Differences are points of the resampler's accuracy over the other's.",
        "\n".join(table(heads, [_row(row) for row in rows])),
        "\n".join(f"- {sentence}" for sentence in verdicts(rows, run)),
        *(f"![{says}]({file})" for file, says in PICTURES.items() if file in pictures),
        "Every task at every budget: [tables.md](tables.md).",
        *([] if auto is None else enough.section(auto["rows"], auto["command"])),
        "## Training",
        f"`python -m vtok_eval.train {name}-resampler`; the log is beside this card.",
        *([notes.strip()] if notes.strip() else []),
        "\n".join(table(["stage", "batches", "last loss", "at the end"], _stages(log))),
        "## Licences",
        f"Weights: Apache-2.0, as those of {name}.\n{LICENCES}",
    ]
    return "\n\n".join(parts) + "\n"


def _row(row: Mapping[str, Any]) -> list[str]:
    low, high = row["ci"]
    cells = [f"{row['keep']:g}", f"{percent(row['accuracy'])} ({percent(low)} to {percent(high)})"]
    cells.append(points(row["step"]["value"]) if "step" in row else "")
    for key in ("averages", "best"):
        other = row.get(key)
        named = "" if other is None else (f"{other['name']} " if key == "best" else "") + percent(other["accuracy"])
        cells += [named, "" if other is None else f"{points(other['value'])}, {chance(other['p'])}"]
    return cells


def _stages(log: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    last = {line["stage"]: line for line in log if "step" in line}
    rows = []
    for stage, line in last.items():
        numbers = ", ".join(
            f"{key} {x:.2f}" for key, x in line.items() if key not in ("stage", "step", "seconds", "loss")
        )
        rows.append([stage, str(line["step"]), f"{line['loss']:.3f}", numbers])
    return rows


def command(
    name: Annotated[str, typer.Argument(help="Of the model: nano-llava or nano-qwen.")],
    results: Annotated[Path, typer.Option(help="Folder that vtok eval wrote.")],
    auto: Annotated[Path | None, typer.Option(help="Folder of a run whose rows have auto.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of cards.")] = Path("model_cards"),
) -> None:
    """Write out/NAME-resampler: README.md, tables.md, compared.json, results.json and auto.json from runs of vtok eval,
    with the training.jsonl and training.md that lie there."""
    from vtok_eval.models import resamplers

    folder = out / f"{name}-resampler"
    folder.mkdir(parents=True, exist_ok=True)
    rows = compared(results)
    pictures = [file for file in PICTURES if (results / file).is_file()]
    for file in pictures:
        (folder / file).write_bytes((results / file).read_bytes())
    (folder / store.RESULTS).write_text((results / store.RESULTS).read_text(encoding="utf-8"), encoding="utf-8")
    store.write_json(folder / COMPARED, rows)
    if auto is not None:
        store.write_json(folder / AUTO, {"command": read(auto).results["command"], "rows": enough.measured(auto)})
    run = read(folder)
    (folder / "tables.md").write_text(page_markdown(run), encoding="utf-8")
    (folder / "README.md").write_text(written(name, folder, resamplers.folder(name)), encoding="utf-8")
    typer.echo(f"wrote {folder / 'README.md'}")


def written(name: str, folder: Path, weights: Path) -> str:
    """The card that the files beside it, and the resampler's configuration, give."""
    results = json.loads((folder / store.RESULTS).read_text(encoding="utf-8"))
    rows = json.loads((folder / COMPARED).read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    notes = folder / "training.md"
    config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    pictures = [file for file in PICTURES if (folder / file).is_file()]
    said = notes.read_text(encoding="utf-8") if notes.is_file() else ""
    auto = json.loads((folder / AUTO).read_text(encoding="utf-8")) if (folder / AUTO).is_file() else None
    return card(name, results, rows, log, said, config, pictures, auto)


if __name__ == "__main__":
    alone(command)
