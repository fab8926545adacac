"""Charts as inline SVG: accuracy against cost, accuracy against tokens, intervals. Colours come from the page's CSS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vtok_eval.render.axes import Box, Cost, Scale, along, apart, front, marks, place, rail, ran_at, ticks, titles
from vtok_eval.render.html import Html, join, tag
from vtok_eval.render.palette import Style
from vtok_eval.render.results import Entry, Run, interval
from vtok_eval.render.words import NONE, budget, percent, points, stars, times, tokens


def svg(width: float, height: float, *children: object, **attributes: object) -> Html:
    """A drawing that scales to its box."""
    return tag("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def text(content: str, x: float, y: float, class_: str, anchor: str = "start", **attributes: object) -> Html:
    return tag("text", content, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_, text_anchor=anchor, **attributes)


def pareto(run: Run, cost: Cost, styles: Mapping[str, Style], width: int, height: int) -> Html:
    """Accuracy against cost: every entry a point, a method's budgets joined, the front labelled."""
    entries = [e for e in run.drawn() if cost.value(e) is not None]
    spots = [(cost.value(e) or 0.0, e.accuracy() or 0.0) for e in entries]
    plain = run.plain
    anchor = (cost.value(plain), plain.accuracy()) if plain else (None, None)
    xs = [x for x, _ in spots] + ([anchor[0]] if anchor[0] is not None else [])
    ys = [y for _, y in spots] + ([anchor[1]] if anchor[1] is not None else [])
    narrow = width < 600
    left, right, top, bottom = (44, width - 14, 22, height - 46) if narrow else (54, width - 28, 24, height - 52)
    x_scale, x_ticks = _abscissa(run, cost, xs, left, right, 4 if narrow else 7)
    low, high = min(ys), max(ys)
    pad = max(0.02, (high - low) * 0.08)
    y_scale = Scale(max(0.0, low - pad), min(1.03, high + pad), bottom, top)
    parts: list[Html | None] = [_grid(x_scale, x_ticks, y_scale, cost.text, (left, top, right, bottom))]
    parts.append(text(cost.title, (left + right) / 2, height - 8, "axis", "middle"))
    parts.append(text("accuracy, %", left, top - 10, "axis", "start"))
    if anchor[1] is not None:
        y = y_scale(anchor[1])
        parts.append(line(left, y, right, y, "plain"))
    best = front(spots, cost.rising)
    seen = [(x_scale(x), y_scale(y)) for x, y in spots]
    if len(best) > 1:
        path = " ".join(f"{seen[i][0]:.1f},{seen[i][1]:.1f}" for i in best)
        parts.append(tag("polyline", points=path, class_="front"))
    parts += [_series(name, entries, seen, set(best), styles[name]) for name in run.names]
    if anchor[0] is not None and anchor[1] is not None:
        parts.append(_diamond(x_scale(anchor[0]), y_scale(anchor[1]), f"plain model: {percent(anchor[1])}% right"))
    parts += _labels(entries, seen, best, anchor, (x_scale, y_scale), (left, top, right, bottom), styles)
    return svg(width, height, *parts, class_="chart", aria_label=f"Accuracy against {cost.title}")


def _labels(
    entries: Sequence[Entry],
    seen: Sequence[tuple[float, float]],
    best: Sequence[int],
    anchor: tuple[float | None, float | None],
    scales: tuple[Scale, Scale],
    frame: Box,
    styles: Mapping[str, Style],
) -> list[Html]:
    """Names of the plain model and of the front, each where there is room."""
    x, y = scales
    lines = along([seen[i] for i in best])
    said = [(words, name, [seen[i] for i in own]) for words, name, own in titles(entries, best)]
    if anchor[1] is not None:
        words, mark = f"plain {percent(anchor[1])}", None if anchor[0] is None else x(anchor[0])
        points, spots = rail(frame[0], frame[2], y(anchor[1]), mark, 6.7 * len(words))
        lines += points
        said.insert(0, (words, "", spots))
    found = []
    placed = place([(words, spots) for words, _, spots in said], seen, frame, letter=6.7, lines=lines)
    for label, (_, name, _) in zip(placed, said, strict=True):
        css = styles[name].css if name else None
        kind = f"label series {css}" if css else "label ref"
        found.append(text(label.text, label.x, label.y, kind, label.anchor, data_s=css))
    return found


def _abscissa(
    run: Run, cost: Cost, values: Sequence[float], left: float, right: float, most: int
) -> tuple[Scale, Sequence[float]]:
    low, high = min(values), max(values)
    if cost.log and low > 0:
        scale = Scale(low / 1.12, high * 1.12, left, right, log=True)
    else:
        pad = max((high - low) * 0.05, 1e-9)
        scale = Scale(low - pad, high + pad, left, right)
    return scale, marks(run, cost, scale.low, scale.high, most)


def _grid(x: Scale, x_ticks: Sequence[float], y: Scale, name: object, frame: tuple[float, float, float, float]) -> Html:
    left, _, right, bottom = frame
    parts = []
    for value in ticks(y.low, y.high, 5):
        parts.append(line(left, y(value), right, y(value), "grid"))
        parts.append(text(percent(value, 0), left - 8, y(value) + 4, "tick", "end"))
    for value in x_ticks:
        parts.append(line(x(value), bottom, x(value), bottom + 4, "grid"))
        parts.append(text(name(value), x(value), bottom + 18, "tick", "middle"))  # type: ignore[operator]
    return tag("g", *parts)


def _series(
    name: str,
    entries: Sequence[Entry],
    seen: Sequence[tuple[float, float]],
    best: set[int],
    style: Style,
) -> Html | None:
    own = [i for i, entry in enumerate(entries) if entry.name == name]
    if not own:
        return None
    own.sort(key=lambda i: seen[i][0])
    parts = []
    if len(own) > 1:
        path = " ".join(f"{seen[i][0]:.1f},{seen[i][1]:.1f}" for i in own)
        parts.append(tag("polyline", points=path, class_="thin", stroke_dasharray=style.dashes or None))
    for i in own:
        x, y = seen[i]
        kind = "dot on" if i in best else "dot base" if style.baseline else "dot"
        mark = tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=5 if i in best else 3.6, class_=kind)
        wide = tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=10, class_="hit")
        parts.append(tag("g", tag("title", told(entries[i])), wide, mark))
    return tag("g", *parts, class_=f"series {style.css}", data_s=style.css)


def told(entry: Entry, task: str | None = None) -> str:
    """What a tooltip says about an entry."""
    score = entry.score(task)
    ci = interval(score, "ci")
    text = f"{entry.name} at {budget(ran_at(entry))}"
    if task:
        text += f", {task}"
    text += f": {percent(entry.accuracy(task))}% right"
    if ci:
        text += f" ({percent(ci[0])} to {percent(ci[1])})"
    if (retention := entry.retention(task)) is not None:
        text += f", {percent(retention)}% of plain"
    difference = entry.number("tasks", task, "difference", "value") if task else entry.number(*_DIFFERENCE)
    if difference is not None:
        p = entry.number("tasks", task, "p_plain") if task else entry.number("overall", "p_plain")
        text += f" ({points(difference)}{stars(p)})"
    if entry.tokens is not None:
        text += f"; {tokens(entry.tokens)} tokens on average"
    if entry.speedup is not None:
        text += f", {times(entry.speedup)} prefill"
    return text if entry.reached else f"{text}. Asked for {budget(entry.keep)}, which it cannot reach"


_DIFFERENCE = ("overall", "difference", "value")


def _diamond(x: float, y: float, title: str) -> Html:
    path = f"{x:.1f},{y - 7:.1f} {x + 7:.1f},{y:.1f} {x:.1f},{y + 7:.1f} {x - 7:.1f},{y:.1f}"
    return tag("g", tag("title", title), tag("polygon", points=path, class_="anchor"))


def curves(run: Run, task: str, styles: Mapping[str, Style], low: float) -> Html | None:
    """Accuracy of a task against tokens, a line a method; ``low`` is where the common ordinate begins."""
    width, height = 300, 190
    left, right, top, bottom = 32, width - 8, 10, height - 24
    entries = [e for e in run.drawn() if e.accuracy(task) is not None and (e.tokens or 0) > 0]
    if not entries:
        return None
    values = [e.tokens or 1.0 for e in entries] + ([run.full] if run.full else [])
    x = Scale(min(values) / 1.08, max(values) * 1.08, left, right, log=True)
    y = Scale(low, 1.0, bottom, top)
    shown = sorted({run.in_tokens(keep) for keep in run.keeps} | ({run.full} if run.full else set()))
    shown = [value for value in shown if value and x.low <= value <= x.high]
    parts = [_grid(x, apart(shown, 1.4), y, tokens, (left, top, right, bottom))]
    for entry, css in ((run.plain, "plain"), (run.blank, "blank")):
        accuracy = entry.accuracy(task) if entry else None
        if accuracy is not None and entry is not None:
            title = tag("title", f"{'plain model' if css == 'plain' else 'empty pictures'}: {percent(accuracy)}%")
            parts.append(tag("g", title, line(left, y(accuracy), right, y(accuracy), css)))
    if (need := run.need(task)) is not None and need.tokens:
        parts.append(line(x(need.tokens), top, x(need.tokens), bottom, "need"))
    for name in sorted(run.names, key=lambda name: not styles[name].baseline):
        own = sorted((e for e in entries if e.name == name), key=lambda e: e.tokens or 0.0)
        if own:
            parts.append(_curve(own, task, styles[name], x, y))
    return svg(width, height, *parts, class_="chart small", aria_label=f"Accuracy of {task} against visual tokens")


def _curve(own: Sequence[Entry], task: str, style: Style, x: Scale, y: Scale) -> Html:
    spots = [(x(e.tokens or 1.0), y(e.accuracy(task) or 0.0)) for e in own]
    parts = []
    if len(own) > 1:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
        kind = "thin random" if style.css == "s-random" else "thin"
        parts.append(tag("polyline", points=path, class_=kind, stroke_dasharray=style.dashes or None))
    for entry, (a, b) in zip(own, spots, strict=True):
        mark = tag("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=2.4, class_="dot base" if style.baseline else "dot")
        wide = tag("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=7, class_="hit")
        parts.append(tag("g", tag("title", told(entry, task)), wide, mark))
    return tag("g", *parts, class_=f"series {style.css}", data_s=style.css)


def whisker(ci: tuple[float, float] | None, middle: float | None, plain: float | None, low: float) -> Html | str:
    """A small bar: the interval, its middle, and the plain model's accuracy as an upright line."""
    if ci is None or middle is None:
        return NONE
    scale = Scale(low, 1.0, 2, 62)
    parts = [line(2, 8, 62, 8, "rail")]
    if plain is not None:
        parts.append(line(scale(plain), 1, scale(plain), 15, "plain"))
    start, end = (max(low, x) for x in ci)
    parts.append(line(scale(start), 8, scale(end), 8, "bar"))
    parts.append(tag("circle", cx=f"{scale(max(low, middle)):.1f}", cy=8, r=2.6, class_="mid"))
    return svg(64, 16, *parts, class_="whisker", aria_hidden="true")


def key(run: Run, styles: Mapping[str, Style]) -> Html:
    """The legend: one entry a series; the page's script lets it pick out a series."""
    items = []
    shown = {entry.name for entry in run.drawn()}
    for name in (name for name in run.names if name in shown):
        style = styles[name]
        swatch = tag("svg", line(0, 5, 22, 5, "thin"), viewBox="0 0 22 10", aria_hidden="true")
        if style.dashes:
            swatch = tag(
                "svg",
                tag("line", x1=0, y1=5, x2=22, y2=5, class_="thin", stroke_dasharray=style.dashes),
                viewBox="0 0 22 10",
                aria_hidden="true",
            )
        items.append(
            tag(
                "button",
                swatch,
                name,
                type="button",
                class_=f"series {style.css}",
                data_s=style.css,
                aria_pressed="false",
            )
        )
    return tag("div", join(items), class_="key")
