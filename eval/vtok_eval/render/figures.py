"""``pareto.png`` and ``curves.png``: matplotlib, without a screen, the same bytes every time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtok.errors import VtokError
from vtok_eval.render.axes import COSTS, Cost, along, apart, costs, front, marks, place, rail, titles
from vtok_eval.render.palette import Style, styles
from vtok_eval.render.results import ENOUGH, Entry, Run
from vtok_eval.render.words import count, percent, tokens

INK, SOFT, RULE = "#1b1d22", "#5c6068", "#e3e4e6"
LETTER = 5.2
"""Mean width of a letter of a label, in points."""
RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": "#9a9da4",
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}


def pyplot_of() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise VtokError("pictures of results need matplotlib; pip install vtok[eval]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def pareto(run: Run, path: Path, cost: Cost | None = None) -> Path:
    """Accuracy against cost: speed-up where it was timed, else tokens.

    Raises
    ------
    VtokError
        matplotlib is missing.
    """
    pyplot = pyplot_of()
    cost = cost or next(iter(costs(run)), COSTS[1])
    looks = styles(run.names)
    entries = [e for e in run.drawn() if cost.value(e) is not None]
    with pyplot.rc_context(RC):
        figure, axes = pyplot.subplots(figsize=(8.8, 5.2))
        axes_of(axes)
        if cost.log:
            axes.set_xscale("log", base=2)
        for name in run.names:
            _series(axes, [e for e in entries if e.name == name], cost, looks[name])
        plain = run.plain
        base = plain.accuracy() if plain is not None else None
        start = cost.value(plain) if plain is not None else None
        if base is not None:
            axes.axhline(100 * base, color=INK, lw=1, ls=(0, (5, 4)), alpha=0.7, zorder=1)
        if base is not None and start is not None:
            axes.plot(start, 100 * base, marker="D", ms=7, color=INK, mec="white", zorder=6)
        spots = [(cost.value(e) or 0.0, e.accuracy() or 0.0) for e in entries]
        best = front(spots, cost.rising)
        axes.plot(
            [spots[i][0] for i in best], [100 * spots[i][1] for i in best], color=INK, lw=1.5, alpha=0.75, zorder=2
        )
        axes.set_xlabel(cost.title)
        axes.set_ylabel("accuracy, %")
        axes.margins(x=0.05, y=0.08)
        _cost_ticks(axes, run, cost, [x for x, _ in spots] + ([start] if start is not None else []))
        axes.set_ylim(top=min(axes.get_ylim()[1], 103))
        title = f"{run.model.get('name', '')}: {count(run.samples, 'question')} in {count(len(run.tasks), 'task')}"
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=12)
        figure.tight_layout()
        _labels(figure, axes, run, entries, cost, looks, best)
        return save(pyplot, figure, path)


def _cost_ticks(axes: Any, run: Run, cost: Cost, values: list[float]) -> None:
    if cost.log and values:
        at = marks(run, cost, min(values), max(values), 7)
        axes.set_xticks(at, [cost.text(x) for x in at])
        axes.minorticks_off()
    elif not cost.log:
        axes.xaxis.set_major_formatter(lambda x, _: cost.text(round(x, 6)))


def _series(axes: Any, own: list[Entry], cost: Cost, style: Style) -> None:
    own = sorted(own, key=lambda e: cost.value(e) or 0.0)
    xs, ys = [cost.value(e) for e in own], [100 * (e.accuracy() or 0.0) for e in own]
    axes.plot(xs, ys, color=style.colour, lw=1, alpha=0.35, ls=_dash(style), zorder=3)
    axes.plot(
        xs,
        ys,
        ls="",
        marker="o",
        ms=5,
        color=style.colour,
        mfc="white" if style.baseline else style.colour,
        mec=style.colour if style.baseline else "white",
        mew=1.2 if style.baseline else 0.7,
        zorder=4,
    )


def _dash(style: Style) -> Any:
    return (0, tuple(float(x) for x in style.dashes.split())) if style.dashes else "-"


def _labels(
    figure: Any, axes: Any, run: Run, entries: list[Entry], cost: Cost, looks: Mapping[str, Style], best: list[int]
) -> None:
    """Front points with method and budget, all other methods by name, each where there is room."""
    figure.canvas.draw()
    box, points = axes.get_window_extent(), 72 / figure.dpi
    left, right = box.x0 * points, box.x1 * points
    top, bottom = -box.y1 * points, -box.y0 * points  # texts are placed downwards, as on a page
    seen = [axes.transData.transform((cost.value(e), 100 * (e.accuracy() or 0.0))) * points for e in entries]
    dots = [(float(x), -float(y)) for x, y in seen]
    base = run.plain.accuracy() if run.plain is not None else None
    said = [(words, name, [dots[i] for i in own]) for words, name, own in titles(entries, best, run.names)]
    lines = along([dots[i] for i in best], 6.0)
    if base is not None:
        level = -float(axes.transData.transform((1, 100 * base))[1]) * points
        start = cost.value(run.plain) if run.plain is not None else None
        mark = None if start is None else float(axes.transData.transform((start, 0))[0]) * points
        words = f"plain model {percent(base)}"
        along_it, spots = rail(left, right, level, mark, LETTER * len(words))
        lines += along_it
        said.insert(0, (words, "", spots))
    placed = place(
        [(words, spots) for words, _, spots in said],
        dots,
        (left, top, right, bottom),
        letter=LETTER,
        height=10.5,
        reach=6.5,
        lines=lines,
    )
    for label, (_, name, _) in zip(placed, said, strict=True):
        at = axes.transAxes.inverted().transform((label.x / points, -label.y / points))
        axes.text(
            *at,
            label.text,
            transform=axes.transAxes,
            ha={"start": "left", "middle": "center", "end": "right"}[label.anchor],
            va="baseline",
            fontsize=8,
            color=looks[name].colour if name else INK,
            fontweight="bold" if name and label.text != name else "normal",
            path_effects=_halo(),
            zorder=8,
        )


def _halo() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.2, foreground="white")]


def curves(run: Run, path: Path) -> Path:
    """A small plot a task, accuracy against visual tokens; the upright line is where the task is kept.

    Raises
    ------
    VtokError
        matplotlib is missing.
    """
    pyplot = pyplot_of()
    looks = styles(run.names)
    names = run.by_need()
    across = min(4, max(1, len(names)))
    down = max(1, -(-len(names) // across))
    wide = max(6.4, 2.55 * across)
    least = min((a for e in run.entries for task in names if (a := e.accuracy(task)) is not None), default=0.0)
    with pyplot.rc_context({**RC, "font.size": 8.5}):
        handles = _handles(run, looks)
        columns = min(len(handles), int(wide / 1.4))
        foot = 0.12 + 0.19 * -(-len(handles) // columns)
        figure, grid = pyplot.subplots(
            down, across, figsize=(wide, 2.35 * down + 0.2 + foot), sharex=True, sharey=True, squeeze=False
        )
        for cell, task in zip(grid.flat, names, strict=False):
            _panel(cell, run, task, looks)
            cell.set_ylim(int(least * 10) * 10 - 1, 103)
        for cell in grid.flat[len(names) :]:
            cell.set_visible(False)
        for row in grid:
            row[0].set_ylabel("accuracy, %")
        for cell in grid[-1]:
            cell.set_xlabel("visual tokens, layer average")
        figure.tight_layout(rect=(0, foot / figure.get_figheight(), 1, 1), h_pad=1.4)
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=columns,
            frameon=False,
            fontsize=8.2,
            handlelength=1.8,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
        return save(pyplot, figure, path)


def _panel(axes: Any, run: Run, task: str, looks: Mapping[str, Style]) -> None:
    axes_of(axes)
    axes.set_xscale("log", base=2)
    drawn = [e for e in run.drawn() if e.accuracy(task) is not None and (e.tokens or 0) > 0]
    for name in sorted(run.names, key=lambda name: not looks[name].baseline):
        own = sorted((e for e in drawn if e.name == name), key=lambda e: e.tokens or 0.0)
        style = looks[name]
        xs, ys = [e.tokens for e in own], [100 * (e.accuracy(task) or 0.0) for e in own]
        wide = 2.2 if name == "random" else 1.2
        axes.plot(xs, ys, color=style.colour, lw=wide, alpha=0.8, ls=_dash(style), marker="o", ms=2.2)
    plain = run.plain.accuracy(task) if run.plain else None
    blank = run.blank.accuracy(task) if run.blank else None
    if plain is not None:
        axes.axhline(100 * plain, color=INK, lw=1, ls=(0, (5, 4)), alpha=0.75)
    if blank is not None:
        axes.axhline(100 * blank, color=SOFT, lw=1, ls=(0, (1, 2.5)))
    need = run.need(task)
    axes.set_title(task, loc="left", fontsize=10, fontweight="bold", pad=15)
    said = f"{percent(ENOUGH, 0)}% kept " + (f"from {tokens(need.tokens)} tokens" if need else "by nothing tried")
    axes.text(0, 1.03, said, transform=axes.transAxes, fontsize=7.8, color=SOFT)
    if need is not None:
        axes.axvline(need.tokens, color="#b9bcc3", lw=1, zorder=0)
    shown = sorted({run.in_tokens(keep) for keep in run.keeps} | ({run.full} if run.full else set()))
    shown = apart([x for x in shown if x], 1.4)
    axes.set_xticks(shown, [tokens(x) for x in shown])
    axes.minorticks_off()


def _handles(run: Run, looks: Mapping[str, Style]) -> list[Any]:
    from matplotlib.lines import Line2D

    shown = {entry.name for entry in run.drawn()}
    handles = [
        Line2D([], [], color=looks[name].colour, lw=2.2 if name == "random" else 1.8, ls=_dash(looks[name]), label=name)
        for name in run.names
        if name in shown
    ]
    handles.append(Line2D([], [], color=INK, lw=1, ls=(0, (5, 4)), label="plain model"))
    if run.blank is not None:
        handles.append(Line2D([], [], color=SOFT, lw=1, ls=(0, (1, 2.5)), label="empty pictures"))
    return handles


def axes_of(axes: Any) -> None:
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)


def save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
    return path
