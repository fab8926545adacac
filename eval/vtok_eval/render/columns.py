"""The columns of the summary table: what each shows, how it sorts, and what it means. Pages, markdown and glossary
take them from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vtok_eval.render.results import Entry, Run, interval
from vtok_eval.render.words import NONE, TO, chance, percent, points, significant, stars, times, tokens


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes
    ----------
    key, head, group : str
        Short name, heading and the heading above it.
    help : str
        What it means, for the glossary.
    value : callable
        Entry to number, for sorting; a column without any number is left out.
    text : callable
        Entry to text.
    rising : bool
        Sorts the smallest first.
    """

    key: str
    head: str
    group: str
    help: str
    value: Callable[[Entry], float | None]
    text: Callable[[Entry], str]
    rising: bool = False


def columns(run: Run) -> list[Column]:
    """Those of a run, without the ones that have no number in it."""
    found = [*_answers(run), *_costs()]
    return [column for column in found if any(column.value(entry) is not None for entry in run.entries)]


def against_random(entry: Entry) -> float | None:
    """McNemar's p against random pruning; none where the entry ran at a larger budget than random did."""
    return entry.number("overall", "p_random") if entry.reached else None


def _answers(run: Run) -> list[Column]:
    def difference(entry: Entry) -> float | None:
        return None if entry is run.plain else entry.number("overall", "difference", "value")

    def hard(entry: Entry) -> float | None:
        return entry.number("overall", "hard", "accuracy") if entry.reached else None

    def span(entry: Entry) -> str:
        ci = interval(entry.score(), "ci")
        return f"{percent(ci[0])}{TO}{percent(ci[1])}" if ci else NONE

    def marked(entry: Entry) -> str:
        return points(difference(entry)) + stars(entry.number("overall", "p_plain"))

    group = "answers, %"
    return [
        Column(
            "accuracy",
            "accuracy",
            group,
            "Share of right answers, each task counting the same"
            + (f"; only samples of group “{run.groups[0]}”." if run.groups else "."),
            lambda e: e.accuracy(),
            lambda e: percent(e.accuracy()),
        ),
        Column(
            "interval",
            "95% interval",
            group,
            "Where the accuracy would lie with other samples of the same kind (bootstrap). In the page the bar shows "
            "it against the plain model's accuracy, the upright line.",
            lambda e: (ci := interval(e.score(), "ci")) and ci[0],
            span,
        ),
        Column(
            "retention",
            "kept",
            group,
            "Accuracy as a share of the plain model's.",
            lambda e: e.retention(),
            lambda e: percent(e.retention()),
        ),
        Column(
            "difference",
            "vs plain",
            group,
            "Accuracy minus the plain model's, in percentage points. Stars: McNemar's exact test on the same samples, "
            "p < 0.05 (*), 0.01 (**), 0.001 (***), each comparison by itself: of twenty comparisons without any "
            "difference one gets a star.",
            difference,
            marked,
        ),
        Column(
            "p_random",
            "vs random",
            group,
            "McNemar's exact p-value against pruning at random to the same budget. An arrow says which of the two was "
            "right more often, where p < 0.05.",
            against_random,
            lambda e: chance(against_random(e)),
            rising=True,
        ),
        Column(
            "hard",
            "hard",
            group,
            "Accuracy on the samples that need detail: the plain model gets them right, and merely shrinking the "
            "picture to the same budget gets them wrong.",
            hard,
            lambda e: percent(hard(e)),
        ),
    ]


def _whole(share: float | None) -> str:
    return NONE if share is None else percent(share, 0) + "%"


def _costs() -> list[Column]:
    def timed(key: str, head: str, text: str) -> Column:
        return Column(
            key,
            head,
            "time, ms",
            text,
            lambda e: e.number("timing", key, "median"),
            lambda e: significant(e.number("timing", key, "median")),
            rising=True,
        )

    return [
        Column(
            "tokens_in",
            "in",
            "visual tokens",
            "Visual tokens per image that enter the decoder.",
            lambda e: e.number("counts", "tokens_in"),
            lambda e: tokens(e.number("counts", "tokens_in")),
            rising=True,
        ),
        Column(
            "average",
            "average",
            "visual tokens",
            "Visual tokens per image, averaged over the decoder's layers. Budgets are set in this number, whatever the "
            "method, so that one that cuts late gets no credit for layers that ran in full.",
            lambda e: e.tokens,
            lambda e: tokens(e.tokens),
            rising=True,
        ),
        Column(
            "macs",
            "MACs, %",
            "visual tokens",
            "Multiply-accumulates that the decoder's prefill spends on visual tokens, as a share of the plain model's.",
            lambda e: e.number("counts", "mac_ratio"),
            lambda e: percent(e.number("counts", "mac_ratio")),
            rising=True,
        ),
        timed("encode", "encode", "Median time from pixels to visual features; a part of the prefill."),
        timed("select", "select", "Median time that the method itself takes; a part of the prefill."),
        timed("prefill", "prefill", "Median time from pixels to the first answer token."),
        timed("decode", "decode", "Median time of each further token."),
        Column(
            "speedup",
            "speed-up",
            "gain",
            "Of the prefill, over the plain model; the median of ratios taken within a round.",
            lambda e: e.speedup,
            lambda e: times(e.speedup),
        ),
        Column(
            "share",
            "of random",
            "gain",
            "Share of the random ceiling: speed as a share of what pruning at random with the very same cuts reaches. "
            "100% is a selection that costs nothing.",
            lambda e: e.number("timing", "share", "median"),
            lambda e: _whole(e.number("timing", "share", "median")),
        ),
        Column(
            "peak",
            "peak MB",
            "gain",
            "Memory that the prefill needs at its peak, on top of weights and inputs.",
            lambda e: e.number("peak_mb"),
            lambda e: significant(e.number("peak_mb")),
            rising=True,
        ),
    ]
