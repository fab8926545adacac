"""``report.html``: one file, no network, light and dark, on a screen, on a phone and on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from vtok_eval.render import tables
from vtok_eval.render.axes import costs
from vtok_eval.render.charts import curves, key, pareto
from vtok_eval.render.html import Html, join, tag
from vtok_eval.render.palette import Style, css, styles
from vtok_eval.render.pictures import Scene, scenes
from vtok_eval.render.results import BASELINES, ENOUGH, Entry, Run, interval, number
from vtok_eval.render.words import budget, chance, count, parameters, percent, points, times, tokens
from vtok_eval.samples import Task

MARGIN = 0.03
"""A loss of accuracy hardly worth speaking of, where even the low end of the interval stays above it."""


def page(run: Run, folder: Path, tasks: Sequence[Task] = ()) -> str:
    """The whole file."""
    looks = styles(run.names)
    sections = [section for section in _sections(run, looks, folder, tasks) if section[2] is not None]
    links = tag("nav", [tag("a", title, href=f"#{name}") for name, title, _ in sections], aria_label="Sections")
    body = [tag("section", tag("h2", title), content, id=name) for name, title, content in sections]
    title = f"vtok eval: {run.model.get('name', '')}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(f"{_file('page.css')}\n{css(looks)}\n")),
    )
    made = f"Made by vtok {run.results.get('vtok', '')} from results.json of {run.results.get('created', '')}."
    whole = tag(
        "html",
        head,
        tag(
            "body",
            tag("header", _header(run)),
            links,
            tag("main", body),
            tag("footer", made),
            tag("script", Html(_file("page.js"))),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{whole}\n"


def _file(name: str) -> str:
    return files("vtok_eval.render").joinpath(name).read_text(encoding="utf-8")


def _sections(
    run: Run, looks: Mapping[str, Style], folder: Path, tasks: Sequence[Task]
) -> list[tuple[str, str, Html | None]]:
    return [
        ("choice", "Which method", _choice(run, looks)),
        ("cost", "Accuracy against cost", _cost(run, looks)),
        ("all", "All results", _results(run, looks)),
        ("tasks", "Task by task", _tasks(run, looks)),
        ("groups", " and ".join(run.groups).capitalize() or "Groups", _groups(run, looks)),
        ("kept", "What was kept", _kept(*scenes(run, folder, tasks))),
        ("published", "Published numbers", _published(run)),
        ("problems", "Problems", tables.problems(run)),
        ("run", "How it was run", _how(run)),
        ("words", "Glossary", tables.words(run)),
    ]


# -- head ---------------------------------------------------------------------------------------------------------


def _header(run: Run) -> Html:
    model, machine = run.model, run.results.get("machine") or {}
    kinds = len(run.names)
    facts = [
        ("model", f"{model.get('family', '')}, {parameters(number(model, 'parameters'))} parameters"),
        ("visual tokens", f"{tokens(run.full)} per image"),
        ("questions", f"{run.samples:,} in {count(len(run.tasks), 'task')}"),
        ("compared", f"{count(kinds, 'method')}, {count(len(run.keeps), 'budget')}"),
        ("machine", f"{machine.get('device', model.get('device', ''))}, {model.get('dtype', '')}"),
    ]
    shown = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts]
    return join(
        tag("p", "vtok eval", class_="eyebrow"),
        tag("h1", str(model.get("name", ""))),
        tag("p", _verdict(run), class_="verdict"),
        tag("dl", shown, class_="facts"),
    )


def _verdict(run: Run) -> str:
    """What the run says in two sentences."""
    plain = run.plain
    if plain is None or plain.accuracy() is None:
        return ""
    text = f"The plain model answers {percent(plain.accuracy())}% right"
    if run.full:
        text += f" with all {tokens(run.full)} visual tokens"
    text += ". "
    sure = [entry for entry in run.drawn() if _surely(entry)]
    best = min(sure, key=lambda e: (e.tokens or 0.0, -(e.accuracy() or 0.0), -(e.speedup or 0.0)), default=None)
    if best is None:
        return text + f"No compressed entry is sure to stay within {percent(MARGIN, 0)} points of that."
    low, high = interval(best.score(), "difference", "ci") or (0.0, 0.0)
    text += (
        f"Down to {tokens(best.tokens)} tokens it can be had within {percent(MARGIN, 0)} points of that: {best.name} "
    )
    text += f"differs by {points(best.number('overall', 'difference', 'value'))} "
    text += f"(95% interval {points(low)} to {points(high)})"
    if best.speedup is not None:
        text += f" at {times(best.speedup)} the prefill speed"
    return text + "."


def _surely(entry: Entry) -> bool:
    ci = interval(entry.score(), "difference", "ci")
    return ci is not None and ci[0] >= -MARGIN


# -- sections -----------------------------------------------------------------------------------------------------


def _choice(run: Run, looks: Mapping[str, Style]) -> Html | None:
    cards = [_card(run, keep, looks) for keep in run.keeps]
    return tag("div", cards, class_="cards") if cards else None


def _card(run: Run, keep: float, looks: Mapping[str, Style]) -> Html | None:
    reached = run.reached(keep)
    if not reached:
        return None
    random = next((e for e in reached if e.name == "random"), None)
    best, rest = reached[0], [entry for entry in reached[1:] if entry is not random][:2]
    share = run.in_tokens(keep) / run.full if run.full else None
    title = [tag("b", f"{budget(keep)} tokens" if keep >= 1 else f"{budget(keep)} of the tokens")]
    if share and keep >= 1:
        title.append(tag("span", f"{percent(share, 0)}%"))
    facts = [f"{percent(best.accuracy())}% right"]
    if best.speedup is not None:
        facts.append(f"{times(best.speedup)} prefill speed")
    shown = [
        tag("h3", title),
        tag("p", percent(best.retention()), tag("small", "% kept"), class_="big"),
        tag("p", tag("i", class_=f"pip {looks[best.name].css}"), tag("b", best.name), class_="winner"),
        tag("p", ", ".join(facts)),
    ]
    if rest:
        others = join([[", " if i else "", f"{e.name} {percent(e.retention())}"] for i, e in enumerate(rest)])
        shown.append(tag("p", "then ", others, class_="quiet"))
    if random is not None and random is not best:
        p = best.number("overall", "p_random")
        shown.append(
            tag(
                "p",
                f"random {percent(random.retention())}",
                f", p {_against(p)}" if p is not None else "",
                class_="quiet",
            )
        )
    if best.name in BASELINES:
        shown.append(tag("p", "A baseline is ahead of every method here.", class_="quiet"))
    return tag("div", shown, class_="card")


def _against(p: float) -> str:
    text = chance(p)
    return text.replace("<", "< ") if text.startswith("<") else f"= {text}"


def _cost(run: Run, looks: Mapping[str, Style]) -> Html | None:
    axes = costs(run)
    if not axes:
        return None
    inputs = [tag("input", type="radio", name="cost", id=f"by-{c.key}", checked=i == 0) for i, c in enumerate(axes)]
    labels = tag("div", [tag("label", c.title, for_=f"by-{c.key}") for c in axes], class_="tabs") if axes[1:] else None
    panels = [
        tag(
            "figure",
            tag("div", pareto(run, c, looks, 1120, 520), class_="wide"),
            tag("div", pareto(run, c, looks, 400, 420), class_="narrow"),
            class_=f"panel by-{c.key}",
        )
        for c in axes
    ]
    note = (
        "Each point is a method at one budget; a method's budgets are joined. The heavy line is the front: nothing "
        "else is both cheaper and more often right. Greys are baselines. Point at a mark for its numbers."
    )
    return tag("div", inputs, labels, panels, key(run, looks), tag("p", note, class_="note"), class_="plots")


def _results(run: Run, looks: Mapping[str, Style]) -> Html:
    buttons = [tag("button", "all budgets", type="button", data_only="", aria_pressed="true")]
    for keep in run.keeps:
        buttons.append(tag("button", budget(keep), type="button", data_only=f"{keep:g}", aria_pressed="false"))
    few = len(run.keeps) < 2
    bar = None if few else tag("div", buttons, class_="tabs filter", hidden=True)
    note = "Click a heading to sort. The best accuracy of each budget is bold."
    remarks = [tag("p", remark, class_="note") for remark in run.remarks()]
    return join(bar, tables.summary(run, looks), tag("p", note, class_="note"), remarks)


def _tasks(run: Run, looks: Mapping[str, Style]) -> Html | None:
    if not run.tasks:
        return None
    lows = [a for task in run.task_names for e in run.entries if (a := e.accuracy(task)) is not None]
    low = max(0.0, int(min(lows, default=0.0) * 10) / 10)
    sizes = {str(task["name"]): int(task.get("samples") or 0) for task in run.tasks}
    drawn = []
    for task in run.by_need():
        chart = curves(run, task, looks, low)
        if chart is None:
            continue
        need = run.need(task)
        base = run.plain.accuracy(task) if run.plain else None
        if need is not None:
            said = f"{percent(ENOUGH, 0)}% kept from {tokens(need.tokens)} tokens ({need.name})"
        else:
            said = f"{percent(ENOUGH, 0)}% kept by nothing tried"
        title = [tag("b", task), f" {count(sizes.get(task), 'sample')}"]
        if base is not None:
            title.append(f", plain {percent(base)}%")
        drawn.append(tag("figure", tag("figcaption", title), chart, tag("p", said, class_="note")))
    note = (
        "Accuracy against visual tokens (layer average, doubling to the right), tasks that need few tokens first. "
        "Dashed: plain model; dotted: empty pictures, where the run has them; upright: fewest tokens that keep "
        f"{percent(ENOUGH, 0)}% of the plain accuracy."
    )
    heat = (
        "Below, the share of the plain accuracy that is left, in per cent; bold where the difference is significant by "
        "itself (p < 0.05)."
    )
    return join(
        tag("div", key(run, looks), tag("div", drawn, class_="small-multiples"), class_="plots"),
        tag("p", note, class_="note"),
        tag("h3", "Accuracy kept"),
        tag("p", heat, class_="note"),
        tables.matrices(run, looks),
    )


def _groups(run: Run, looks: Mapping[str, Style]) -> Html | None:
    table = tables.groups(run, looks)
    if table is None:
        return None
    rest = ", ".join(f"“{name}”" for name in run.groups[1:])
    note = f"Accuracies elsewhere on this page are of group “{run.groups[0]}” alone; {rest} is reported here."
    return join(tag("p", note), table)


def _kept(keep: float | None, found: Sequence[Scene]) -> Html | None:
    if not found or keep is None:
        return None
    shown = []
    for scene in found:
        tiles = []
        for tile in scene.tiles:
            mark = tag("span", "✓" if tile.correct else "✗", class_="mark", aria_hidden="true")
            verdict = "right" if tile.correct else "wrong"
            plain = tile.entry.method is None
            alt = f"{tile.entry.name}: {tile.kept} tokens left" if not plain else "the picture"
            said = tag("span", mark, tile.answer or "(no answer)", class_="said", title=verdict)
            caption = tag("figcaption", tag("b", _breakable(tile.entry.name)), said)
            picture = tag("img", src=tile.data, alt=alt, loading="lazy")
            tiles.append(tag("figure", picture, caption, class_=f"tile {verdict}"))
        asked = [tag("b", scene.sample.question), f" Right: {scene.sample.answer}"]
        where = f"{scene.sample.task} · {scene.sample.id}"
        shown.append(
            tag(
                "div",
                tag("p", asked, tag("span", where, class_="where")),
                tag("div", tiles, class_="tiles"),
                class_="scene",
            )
        )
    what = f"{budget(keep)} tokens" if keep >= 1 else f"{budget(keep)} of the tokens"
    note = (
        f"Samples on which methods disagree, at {what}. Clear cells are the tokens that reach the last decoder layer; "
        "for merging methods those that others were merged into. What is dark was dropped or merged."
    )
    return join(tag("p", note), shown)


def _breakable(name: str) -> Html:
    """A method's name that may wrap behind its joints."""
    return join([[part, Html("<wbr>") if part in "+_" else None] for part in re.split(r"([+_])", name)])


def _published(run: Run) -> Html | None:
    table = tables.beside_published(run)
    if table is None:
        return None
    note = (
        "Numbers of other models on other questions, laid beside this run because the geometry is the same. They enter "
        "no average. Sources differ among themselves by several points, and not all count tokens over the layers."
    )
    return join(tag("p", note), table)


def _how(run: Run) -> Html:
    machine = dict(run.results.get("machine") or {})
    settings = {key: value for key, value in (run.results.get("settings") or {}).items() if value is not None}
    model = {key: value for key, value in run.model.items() if value is not None}
    shown = []
    for title, facts in (("Model", model), ("Machine", machine), ("Settings", settings)):
        rows = [tag("div", tag("dt", str(k).replace("_", " ")), tag("dd", _plainly(v))) for k, v in facts.items()]
        shown.append(tag("div", tag("h3", title), tag("dl", rows, class_="pairs")))
    sources: dict[str, list[str]] = {}
    for task in run.tasks:
        sources.setdefault(str(task.get("source") or "unknown"), []).append(str(task["name"]))
    said = [
        ("command", _code(run.results.get("command"))),
        ("fingerprint", _code(run.results.get("fingerprint"))),
        ("tasks", "; ".join(f"{', '.join(names)} ({source})" for source, names in sources.items())),
        ("finished", str(run.results.get("created", ""))),
    ]
    return join(
        tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in said if value], class_="words"),
        tag("div", shown, class_="columns"),
    )


def _code(text: object) -> Html | None:
    return tag("code", str(text)) if text else None


def _plainly(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
