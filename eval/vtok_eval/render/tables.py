"""The tables of the page: everything, each task, groups, published numbers, problems, words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from vtok_eval import published
from vtok_eval.render.charts import told, whisker
from vtok_eval.render.columns import Column, against_random, columns
from vtok_eval.render.html import Html, join, tag
from vtok_eval.render.palette import Style
from vtok_eval.render.results import Entry, Run, interval, number
from vtok_eval.render.words import NONE, TO, budget, percent, points, stars


def wrap(table: Html, kind: str = "", label: str = "") -> Html:
    """A box that scrolls by itself where the screen is too narrow."""
    return tag("div", table, class_=f"scroll {kind}".strip(), tabindex=0, role="region", aria_label=label or None)


def name_of(entry: Entry, styles: Mapping[str, Style]) -> Html:
    """Dot, name, and what is to be said about the entry."""
    style = styles.get(entry.name)
    parts: list[object] = [tag("i", class_=f"pip {style.css}" if style else "pip none")]
    parts.append(tag("span", entry.name, class_="name", title=entry.note or None))
    if entry.stands_in_for:
        parts.append(tag("span", f"stands in for {entry.stands_in_for.rsplit('@', 1)[0]}", class_="under link"))
    if entry.status == "raised":
        text = f"ran at {budget(round(entry.number('budget') or 0))}"
        parts.append(tag("span", text, class_="under warn", title=entry.note or None))
    elif entry.status != "ok":
        parts.append(tag("span", entry.status, ": " if entry.note else "", entry.note, class_="under bad"))
    elif entry.note and entry.keep is None:
        parts.append(tag("span", entry.note, class_="under"))
    return join(parts)


def summary(run: Run, styles: Mapping[str, Style]) -> Html:
    """Every entry, every number. The plain model stands apart, so that it stays on top whatever the order."""
    shown = columns(run)
    heads = [tag("th", "method", rowspan=2, scope="col", class_="who", data_key="name")]
    heads.append(tag("th", "keep", rowspan=2, scope="col", data_key="keep", aria_sort="descending"))
    for group, members in groupby(shown, key=lambda column: column.group):
        heads.append(tag("th", group, colspan=len(list(members)), scope="colgroup", class_="group first"))
    firsts = _firsts(shown)
    second = [
        tag(
            "th",
            column.head,
            scope="col",
            data_key=column.key,
            data_rising=column.rising,
            title=column.help,
            class_="first" if column.key in firsts else None,
        )
        for column in shown
    ]
    low = _low(run)
    top = [_row(run, entry, shown, styles, low, set()) for entry in (run.plain, run.blank) if entry is not None]
    body = []
    for keep in run.keeps:
        here = run.at(keep)
        best = _best(run, keep)
        for place, entry in enumerate(here):
            body.append(_row(run, entry, shown, styles, low, best, opens=place == 0))
    table = tag(
        "table",
        tag("caption", "Every method at every budget"),
        tag("thead", tag("tr", heads), tag("tr", second)),
        tag("tbody", top, class_="reference") if top else None,
        tag("tbody", body, class_="entries"),
        id="results",
        class_="numbers",
    )
    return wrap(table, "tall", "All results")


def _firsts(shown: Sequence[Column]) -> set[str]:
    return {next(iter(members)).key for _, members in groupby(shown, key=lambda column: column.group)}


def _low(run: Run) -> float:
    """Where the bars of intervals begin."""
    lows = [ci[0] for entry in run.compressed if (ci := interval(entry.score(), "ci"))]
    return max(0.0, min(lows, default=0.0) - 0.02)


def _best(run: Run, keep: float) -> set[str]:
    reached = run.reached(keep)
    top = max((entry.accuracy() or 0.0 for entry in reached), default=None)
    return {entry.id for entry in reached if len(reached) > 1 and entry.accuracy() == top}


def _row(
    run: Run,
    entry: Entry,
    shown: Sequence[Column],
    styles: Mapping[str, Style],
    low: float,
    best: set[str],
    opens: bool = False,
) -> Html:
    cells = [tag("th", name_of(entry, styles), scope="row", class_="who", data_v=entry.name)]
    keep = run.in_tokens(entry.keep) if entry.keep is not None else None
    cells.append(tag("td", budget(entry.keep), data_v=keep))
    firsts = _firsts(shown)
    for column in shown:
        value = column.value(entry)
        content: Html | str = column.text(entry) if value is not None else NONE
        kinds = ["first"] if column.key in firsts else []
        if column.key == "accuracy" and entry.id in best:
            kinds.append("best")
        if column.key == "interval" and value is not None:
            plain = run.plain.accuracy() if run.plain else None
            content = join(whisker(interval(entry.score(), "ci"), entry.accuracy(), plain, low), tag("small", content))
        if column.key == "difference":
            content = _difference(entry) if value is not None else NONE
        if column.key == "p_random" and value is not None:
            content = _beside_random(run, entry, column)
        cells.append(tag("td", content, data_v=value, class_=" ".join(kinds) or None))
    status = entry.status if entry.keep is not None else None
    kind = " ".join(filter(None, ("opens" if opens else "", status if status != "ok" else "")))
    return tag("tr", cells, class_=kind or None, data_keep=None if entry.keep is None else f"{entry.keep:g}")


def _difference(entry: Entry) -> Html | str:
    value = entry.number("overall", "difference", "value")
    if value is None:
        return NONE
    marks = stars(entry.number("overall", "p_plain"))
    ci = interval(entry.score(), "difference", "ci")
    title = f"95% interval {points(ci[0])} to {points(ci[1])}" if ci else None
    return tag("span", points(value), tag("sup", marks, class_="stars"), title=title)


def _beside_random(run: Run, entry: Entry, column: Column) -> Html | str:
    p = against_random(entry)
    other = next((e for e in run.compressed if e.name == "random" and e.keep == entry.keep), None)
    text = column.text(entry)
    if p is None or p >= 0.05 or other is None:
        return tag("span", text, class_="even")
    above = (entry.accuracy() or 0.0) > (other.accuracy() or 0.0)
    return tag("span", "▲ " if above else "▼ ", text, class_="up" if above else "down")


def matrices(run: Run, styles: Mapping[str, Style]) -> Html:
    """Retention by task and method, one table a budget, coloured by how much is lost."""
    tasks = run.by_need()
    made = []
    for keep in run.keeps:
        head = [tag("th", "method", scope="col", class_="who")]
        head += [tag("th", tag("span", task), scope="col", class_="task") for task in tasks]
        head.append(tag("th", "all", scope="col", class_="task first"))
        body = []
        for entry in run.at(keep):
            cells = [tag("th", name_of(entry, styles), scope="row", class_="who")]
            for task in [*tasks, None]:
                cells.append(_heat(entry, task))
            body.append(tag("tr", cells, class_=entry.status if entry.status != "ok" else None))
        share = run.in_tokens(keep) / run.full if run.full else None
        title = f"{budget(keep)} tokens" if keep >= 1 else f"{budget(keep)} of the tokens"
        extra = f" · {percent(share, 0)}% of {run.full:.0f}" if share and keep >= 1 and run.full else ""
        table = tag(
            "table",
            tag("caption", title, tag("span", extra)),
            tag("thead", tag("tr", head)),
            tag("tbody", body),
            class_="numbers heat",
        )
        made.append(wrap(table, label=f"Accuracy kept at {title}"))
    return tag("div", made, class_="pair")


def _heat(entry: Entry, task: str | None) -> Html:
    retention = entry.retention(task)
    kind = "first" if task is None else ""
    if retention is None:
        return tag("td", NONE, class_=kind or None)
    lost, won = max(0.0, 1 - retention), max(0.0, retention - 1)
    strength = min(1.0, lost / 0.5) ** 0.8 if lost else min(1.0, won / 0.15)
    side = "loss" if lost >= 0.005 else "win" if won >= 0.005 else ""
    p = entry.number("tasks", task, "p_plain") if task else entry.number("overall", "p_plain")
    sure = "sure" if p is not None and p < 0.05 else ""
    if not entry.reached:  # of another budget: not to be compared by colour
        side = sure = ""
    style = f"--a:{100 * strength:.0f}%" if side else None
    kinds = " ".join(filter(None, (kind, side, sure)))
    return tag("td", percent(retention, 0), class_=kinds or None, style=style, title=told(entry, task))


def groups(run: Run, styles: Mapping[str, Style]) -> Html | None:
    """Accuracy by sample group, and below it how much of the plain model's that is."""
    if not run.groups:
        return None
    plain = run.plain
    base = {name: number(plain.score() if plain else None, "groups", name, "accuracy") for name in run.groups}
    heads = [tag("th", "method", rowspan=2, scope="col", class_="who")]
    heads += [
        tag("th", budget(keep), colspan=len(run.groups), scope="colgroup", class_="group first") for keep in run.keeps
    ]
    second = [
        tag("th", name, scope="col", class_="first" if place == 0 else None)
        for _ in run.keeps
        for place, name in enumerate(run.groups)
    ]
    body = []
    for name in run.names:
        cells: list[Html] = []
        for keep in run.keeps:
            entry = run.named(name, keep)
            for place, group in enumerate(run.groups):
                kinds = ["first"] if place == 0 else []
                kinds += ["off"] if entry is not None and not entry.reached else []
                own = number(entry.score(), "groups", group, "accuracy") if entry is not None else None
                below = base[group]
                kept = tag("small", percent(own / below)) if own is not None and below else None
                cells.append(tag("td", percent(own), kept, class_=" ".join(kinds) or None))
        style = styles[name]
        who = tag(
            "th", tag("i", class_=f"pip {style.css}"), tag("span", name, class_="name"), scope="row", class_="who"
        )
        body.append(tag("tr", who, cells))
    sizes = {name: sum((task.get("groups") or {}).get(name, 0) for task in run.tasks) for name in run.groups}
    said = ", ".join(f"{name} {percent(base[name])}% of {sizes[name]:,}" for name in run.groups)
    table = tag(
        "table",
        tag("caption", "Accuracy, %; below it the share of the plain model's", tag("span", f" · plain: {said}")),
        tag("thead", tag("tr", heads), tag("tr", second)),
        tag("tbody", body),
        class_="numbers",
    )
    return wrap(table, label="Accuracy by group")


def beside_published(run: Run) -> Html | None:
    """Ours and what others printed for the same geometry; a table of its own, nothing is averaged."""
    model = published.counterpart(str(run.model.get("family")), run.full)
    if model is None:
        return None
    rows = [
        row
        for row in published.rows(model=model, benchmark=published.RETENTION)
        if row.method in run.names or any(row.keep == keep for keep in run.keeps)
    ]
    if not rows:
        return None
    order = {name: place for place, name in enumerate(run.names)}
    cells: dict[tuple[float, str], list[published.Row]] = {}
    for row in sorted(rows, key=lambda row: (-row.keep, order.get(row.method, len(order)), row.method)):
        cells.setdefault((row.keep, row.method), []).append(row)
    heads = ["method", "tokens", str(run.model.get("name") or "this run"), f"{model}, printed", "by"]
    kinds = ["who", None, "first", "first", "by"]
    head = [tag("th", name, scope="col", class_=kind) for name, kind in zip(heads, kinds, strict=True)]
    body = []
    previous: float | None = None
    for (keep, method), found in cells.items():
        ours = run.named(method, keep)
        own = percent(ours.retention()) if ours is not None and ours.reached else NONE
        values = sorted(row.value for row in found)
        span = f"{values[0]:.1f}" + (f"{TO}{values[-1]:.1f}" if values[-1] > values[0] else "")
        by = [
            [", " if place else "", tag("span", f"{row.source} {row.value:.1f}", title=row.note or row.where)]
            for place, row in enumerate(sorted(found, key=lambda row: -row.value))
        ]
        cells_ = [tag("th", tag("span", method, class_="name" if method in order else None), scope="row", class_="who")]
        cells_ += [tag("td", budget(keep)), tag("td", own, class_="first ours"), tag("td", span, class_="first")]
        cells_.append(tag("td", by, class_="by"))
        body.append(tag("tr", cells_, class_="opens" if keep != previous else None))
        previous = keep
    table = tag(
        "table",
        tag("caption", "Accuracy kept, % of the plain model"),
        tag("thead", tag("tr", head)),
        tag("tbody", body),
        class_="numbers",
    )
    where = {row.source: row.where for row in rows}
    listed = tag("dl", [(tag("dt", source), tag("dd", text)) for source, text in where.items()], class_="words")
    return join(wrap(table, "tall", "Published numbers"), listed)


def problems(run: Run) -> Html:
    """What went wrong, or that nothing did."""
    found = run.results.get("problems") or []
    if not found:
        return tag("p", "No sample was lost, no answer was empty.")
    head = tag("tr", [tag("th", name, scope="col", class_="who") for name in ("task", "sample", "entry", "what")])
    rows = [
        tag(
            "tr",
            [tag("td", str(item.get(key) or "all"), class_="who") for key in ("task", "sample", "entry", "message")],
        )
        for item in found
    ]
    return wrap(tag("table", tag("thead", head), tag("tbody", rows), class_="plainly"), label="Problems")


def words(run: Run) -> Html:
    """What the columns mean."""
    items = [("keep", "The budget that was asked for: visual tokens per image, averaged over the decoder's layers.")]
    items += [(column.head, column.help) for column in columns(run)]
    if any(entry.status == "raised" for entry in run.entries):
        items.append(
            (
                "ran at",
                "The method cuts too late to get that low on this model. Its row shows the smallest budget it reaches, "
                "so it must not be compared with the others of its block; beside it stands its chain behind a first "
                "stage that does get there.",
            )
        )
    if any(entry.status == "refused" for entry in run.entries):
        items.append(("refused", "The method does not fit this model; the row says why."))
    return tag("dl", [(tag("dt", head), tag("dd", text)) for head, text in items], class_="words")
