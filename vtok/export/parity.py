"""The parity check: an exported folder answers as the model does, or it is not there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtok.errors import VtokError
from vtok.export.answers import Answer
from vtok.export.manifest import Parity
from vtok.export.probes import Probe

#: of kept tokens that both must share in fp32: two tokens of equal score may change places in another runtime. A model
#: that changes more of them itself, when pixels change in their last bit, may differ by that and one hundredth, and in
#: as many answers as change with them
SHARED = 0.99
#: of logits in fp32, relative to their range
CLOSE = 1e-3
#: accuracy that half precision and int8 may lose
POINTS = 0.02
#: relative difference of logits that they may have where nothing tells right from wrong
LOOSE = {"fp16": 0.05, "bf16": 0.1, "int8": 0.3}

RULES = {
    "fp32": "{answers} equal; at least {shared:.2%} of the kept tokens shared; first logits within 0.1 % of "
    "their range",
    "judged": "accuracy within 2 points",
    "loose": "first logits within {share:.0%} of their range",
}


def compare(
    reference: Sequence[Answer],
    found: Sequence[Answer],
    questions: Sequence[Probe],
    *,
    precision: str,
    source: str,
    new_tokens: int,
    processor: Any = None,
    fresh: bool = True,
    itself: Sequence[Answer] | None = None,
) -> Parity:
    """What the check found, and whether it holds.

    Exact where the arithmetic is (fp32, and half-precision files of a model in that precision, which ``precision``
    then calls fp32). Otherwise accuracy where the questions have truths, else the logits.

    Parameters
    ----------
    reference, found : sequence of Answer
        Of the model and of the folder.
    questions : sequence of Probe
        What was asked.
    precision : str
        Of the arithmetic that differs: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"int8"``.
    source : str
        Where the questions are from.
    new_tokens : int
        Most tokens of an answer.
    processor : ProcessorMixin, optional
        To turn tokens into words for the judges.
    fresh : bool
        Whether ``found`` comes from a process of its own.
    itself : sequence of Answer, optional
        Of the model, where pixels differ in their last bit: what it does not share with itself, nothing can.
    """
    pairs = list(zip(reference, found, strict=True))
    same = [ours.kept == theirs.kept for ours, theirs in pairs]
    ranges = [float(ours.logits.max() - ours.logits.min()) for ours, _ in pairs]
    differences = [float((ours.logits - theirs.logits).abs().max()) for ours, theirs in pairs]
    # other tokens, other logits: those samples say nothing on the arithmetic, unless there are no others
    told = [difference for difference, kept in zip(differences, same, strict=True) if kept] or differences
    shared = share(reference, found)
    own = steady = None
    if itself is not None:
        own = share(reference, itself)
        steady = sum(one.tokens == other.tokens for one, other in zip(reference, itself, strict=True))
    accuracy, before = (_accuracy(given, questions, processor) for given in (found, reference))
    span = sum(ranges) / len(ranges)
    equal = sum(ours.tokens == theirs.tokens for ours, theirs in pairs)
    if precision == "fp32":
        wanted = SHARED if own is None else min(SHARED, own - (1 - SHARED))
        least = len(pairs) if steady is None else steady
        answers = "every greedy answer" if least == len(pairs) else f"{least} of {len(pairs)} greedy answers"
        rule = RULES["fp32"].format(answers=answers, shared=wanted)
        passed = equal >= least and shared >= wanted and max(told) <= CLOSE * span
    elif accuracy is not None and before is not None:
        rule, passed = RULES["judged"], accuracy >= before - POINTS - 1e-9
    else:
        bound = LOOSE[precision]
        rule, passed = RULES["loose"].format(share=bound), max(told) <= bound * span
    return Parity(
        samples=len(pairs),
        source=source,
        new_tokens=new_tokens,
        answers_equal=equal,
        kept_equal=sum(same),
        kept_shared=shared,
        max_logit_difference=max(told),
        logit_range=span,
        accuracy=accuracy,
        reference_accuracy=before,
        fresh_process=fresh,
        rule=rule,
        passed=passed,
        shared_with_itself=own,
        answers_equal_to_itself=steady,
    )


def share(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """Of the kept tokens of the first, those that the second kept as well."""
    kept = sum(len(one.kept) for one in ours)
    both = sum(len({*one.kept} & {*other.kept}) for one, other in zip(ours, theirs, strict=True))
    return both / kept if kept else 1.0


def unsteady(parity: Parity) -> bool:
    """Whether other tokens were kept, so that it matters whether the model itself would keep them."""
    return not parity.passed and parity.kept_shared < SHARED and parity.shared_with_itself is None


def demand(parity: Parity, target: str) -> None:
    """Refuse an export that answers otherwise.

    Raises
    ------
    VtokError
        With all that was found.
    """
    if parity.passed:
        return
    right = ""
    if parity.accuracy is not None and parity.reference_accuracy is not None:
        right = f", {100 * parity.accuracy:.1f} % right instead of {100 * parity.reference_accuracy:.1f} %"
    raise VtokError(
        f"the {target} export does not answer as the model does, so nothing was written: {parity.answers_equal} of "
        f"{parity.samples} answers equal{right}, the same tokens kept in {parity.kept_equal} ({parity.kept_shared:.2%} "
        f"of all shared), logits off by {parity.max_logit_difference:.3g} of {parity.logit_range:.3g} (wanted: "
        f"{parity.rule}); try fp32, or another method, and please report a pair that fails in fp32"
    )


def _accuracy(answers: Sequence[Answer], questions: Sequence[Probe], processor: Any) -> float | None:
    if processor is None or any(question.judge is None for question in questions):
        return None
    decode = processor.tokenizer.decode
    right = 0
    for answer, question in zip(answers, questions, strict=True):
        assert question.judge is not None
        right += question.judge(decode(list(answer.tokens), skip_special_tokens=True).strip())
    return right / len(questions)
