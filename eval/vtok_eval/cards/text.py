"""The text of a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtok_eval.cards.facts import PICTURE, Facts, compressions, entry_of, label, options
from vtok_eval.render.markdown import table
from vtok_eval.render.results import Entry, Run, interval
from vtok_eval.render.words import NONE, TO, budget, percent, points, significant, times, tokens

LOAD = {
    "hf": 'import vtok\n\nmodel = vtok.load("{folder}")',
    "onnx": 'import vtok\n\nanswer = vtok.OnnxVLM("{folder}").generate(image, question)',
    "openvino": 'import vtok\n\nanswer = vtok.OpenVinoVLM("{folder}").generate(image, question)',
    "pt2": 'import vtok\n\nanswer = vtok.Pt2VLM("{folder}").generate(image, question)',
}
AUTO = """\
Wherever vtok is installed, so does transformers' own
`AutoModelForImageTextToText.from_pretrained("{folder}", trust_remote_code=True)`. Without `trust_remote_code` it is the
plain model."""


def render(facts: Facts) -> str:
    """The text of a card: the same facts give the same text.

    Parameters
    ----------
    facts : Facts
        As they are committed beside it.
    """
    run = None if facts.results is None else Run(facts.results)
    settings = compressions(facts)
    parts = [
        front(facts),
        f"# {facts.name}",
        f"`{facts.source['name']}` ({facts.source['class']}, {facts.source['parameters']:,} parameters) with fewer "
        f"visual tokens, by vtok. Weights are those of the model, {_trained(settings)}.",
        *([facts.about] if facts.about else []),
        "## What was done",
        "\n".join(table(["method", "keep", "options", "positions"], [_done(one) for one in settings])),
        "keep is the number of visual tokens per image, or their share, averaged over the decoder layers; "
        "`vtok methods` says what each method does.",
        "## Use",
        *_use(facts),
        *([f"![kept tokens]({PICTURE})", facts.picture] if facts.picture else []),
        *([] if run is None else _accuracy(run, settings)),
        *([] if run is None else _cost(run, settings)),
        "## Exports",
        "\n".join(table(HEADS, [_parity(export) for export in facts.exports])),
        "Each folder was loaded again by a fresh process and asked; the model it was made of answered the same "
        "questions. Logits: largest difference of the first new token's, and their range.",
        "\n\n".join(_commands(facts)),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(facts, run, settings)),
        "## Licences",
        facts.licences or "The licence of the model holds for its weights; vtok itself is under Apache-2.0.",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _trained(settings: Sequence[Mapping[str, Any]]) -> str:
    methods = [method for one in settings for method in one["methods"]]
    found = dict.fromkeys(method["name"] for method in methods if method["options"].get("weights"))
    return f"as they were; beside them stands what was trained for {', '.join(found)}" if found else "no training"


def front(facts: Facts) -> str:
    """Front matter as the Hugging Face hub reads it."""
    names = sorted({method["name"] for one in compressions(facts) for method in one["methods"]})
    tags = "\n".join(f"- {tag}" for tag in ("vtok", "visual-token-compression", *names))
    return (
        f"---\nlicense: {facts.licence}\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n"
        f"base_model: {facts.source['name']}\ntags:\n{tags}\n---"
    )


def _done(one: Mapping[str, Any]) -> list[str]:
    chosen = ", ".join(f"{key}={value}" for key, value in options(one).items())
    return [label(one), budget(one["keep"]), chosen or "defaults", str(one["positions"])]


def _use(facts: Facts) -> list[str]:
    found: list[str] = []
    for export in {export["target"]: export for export in reversed(facts.exports)}.values():
        found.insert(0, f"```python\n{LOAD[export['target']].format(folder=export['folder'])}\n```")
        if export["target"] == "hf":
            found.insert(1, AUTO.format(folder=export["folder"]))
    return found


def _rows(run: Run, settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Entry]]:
    plain = [] if run.plain is None else [("plain", NONE, run.plain)]
    found = [(label(one), budget(one["keep"]), entry_of(run, one)) for one in settings]
    return plain + [(name, keep, entry) for name, keep, entry in found if entry is not None]


def _accuracy(run: Run, settings: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [name, keep, *(_share(entry, task) for task in (*run.task_names, None))]
        for name, keep, entry in _rows(run, settings)
    ]
    return [
        "## Accuracy",
        f"Right answers in percent, with bootstrap intervals; {run.samples:,} questions.",
        "\n".join(table(["method", "keep", *run.task_names, "all"], rows)),
    ]


def _share(entry: Entry, task: str | None) -> str:
    ends = interval(entry.score(task), "ci")
    return percent(entry.accuracy(task)) + (f" ({percent(ends[0])}{TO}{percent(ends[1])})" if ends else "")


def _cost(run: Run, settings: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            name,
            keep,
            tokens(entry.number("counts", "tokens_kept")),
            tokens(entry.tokens),
            times(entry.number("counts", "mac_ratio")),
            _spread(entry),
            times(entry.speedup),
            significant(entry.number("peak_mb")),
        ]
        for name, keep, entry in _rows(run, settings)
    ]
    heads = ["method", "keep", "tokens kept", "layer average", "MACs", "prefill, ms", "speed-up", "peak, MB"]
    machine = run.results["machine"]
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    return [
        "## Speed and memory",
        "\n".join(table(heads, rows)),
        f"{where}, transformers {machine['transformers']}, vtok {run.results['vtok']}, {run.model['dtype']}. Prefill: "
        "pixels to the first logits, median and range. Peak: what a prefill needs beside the weights.",
        f"```\n{run.results['command']}\n```",
    ]


def _spread(entry: Entry) -> str:
    low, middle, high = (entry.number("timing", "prefill", key) for key in ("low", "median", "high"))
    if middle is None:
        return NONE
    return f"{significant(middle)} ({significant(low)}{TO}{significant(high)})"


HEADS = ["folder", "format", "precision", "MB", "answers equal", "same tokens kept", "logits", "right, %"]


def _parity(export: Mapping[str, Any]) -> list[str]:
    found = export["parity"]
    right = NONE
    if found["accuracy"] is not None:
        right = f"{percent(found['accuracy'])} (model {percent(found['reference_accuracy'])})"
    return [
        export["folder"],
        export["target"],
        export["precision"],
        f"{export['megabytes']:.1f}",
        f"{found['answers_equal']} of {found['samples']}",
        f"{found['kept_equal']} of {found['samples']}",
        f"{found['max_logit_difference']:.2e} of {found['logit_range']:.1f}",
        right,
    ]


def _commands(facts: Facts) -> list[str]:
    lines = [export["command"] for export in facts.exports if export["command"]]
    return ["```\n" + "\n".join(lines) + "\n```"] if lines else []


def _steadiness(parity: Mapping[str, Any]) -> str:
    """What that does to answers, where it does anything."""
    equal, itself, samples = (parity.get(key) for key in ("answers_equal", "answers_equal_to_itself", "samples"))
    if itself is None or equal == samples:
        return ""
    return f" Of {samples} answers {itself} are then its own, and {equal} the export's."


def _limits(facts: Facts, run: Run | None, settings: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [] if run is None else [_first(run, name, keep, entry) for name, keep, entry in _rows(run, settings)]
    lines = [line for line in lines if line]
    if run is None:
        lines.append("Accuracy was not measured. What suffers first is usually small text.")
    lines += list(dict.fromkeys(s for export in facts.exports for s in (export["plan"] or {}).get("left_out", ())))
    for export in facts.exports:
        own = export["parity"].get("shared_with_itself")
        if own is not None:
            lines.append(
                f"{label(export['compression'])} chooses between tokens that are all but equal: with pixels changed in "
                f"their last bit, the model shares {percent(own)}% of its kept tokens with itself, "
                f"with the {export['target']} export {percent(export['parity']['kept_shared'])}%."
                + _steadiness(export["parity"])
            )
    if any(export["plan"] for export in facts.exports):
        lines.append("Graphs have a fixed budget and take pictures of one layout; there are no videos.")
    lines.append("What was measured was measured on these questions; other data may need more tokens.")
    return lines


def _first(run: Run, name: str, keep: str, entry: Entry) -> str:
    """What an entry loses most of."""
    if entry is run.plain:
        return ""
    losses = {task: entry.number("tasks", task, "difference", "value") for task in run.task_names}
    known = {task: loss for task, loss in losses.items() if loss is not None}
    if not known:
        return ""
    task = min(known, key=lambda task: known[task])
    if known[task] >= 0:
        return f"{name} at {keep}: no task loses."
    ends = interval(entry.score(task), "difference", "ci")
    between = f" ({points(ends[0])} to {points(ends[1])})" if ends else ""
    return f"{name} at {keep}: what suffers first is {task}, {points(known[task])} points{between}."
