"""When an answer is right."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok_eval.samples import Sample
from vtok_eval.tasks import normalise, right, yes_no_f1

QUICK = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Dog.", "dog"),
        ("  a  Dog\n", "dog"),
        ("The top-left", "top left"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("10, 20", "10 20"),
        ("1.5", "1.5"),
        ("costs .5.", "costs .5"),
        ("3.", "3"),
        ("v.2", "v 2"),
        ("don\u2019t", "don't"),
        ("'cat'", "cat"),
        ('"cat"!', "cat"),
        ("A.", "a"),
        ("the", "the"),
        ("+", "+"),
        ("\uff21\uff22", "ab"),
        ("Stra\u00dfe", "strasse"),
        ("", ""),
        (" \n", ""),
        ("?", "?"),
    ],
)
def test_normalise(text, plain):
    assert normalise(text) == plain


@given(st.text())
@QUICK
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text())
@QUICK
def test_no_answer_is_lost(text):
    assert bool(normalise(text)) == bool(text.strip())


@given(st.text("abcdefgh", min_size=2), st.sampled_from(["{}.", " {}!", "the {}", "{}\n", "'{}'", "A {}?"]))
@QUICK
def test_case_marks_and_articles_do_not_matter(word, form):
    assert normalise(form.format(word.upper())) == normalise(word)


@given(st.integers(0, 10**9))
@QUICK
def test_numbers_stay(number):
    assert normalise(str(number)) == normalise(f"{number:,}") == str(number)


def sample(answer, *accepted):
    return Sample("1", "t", ("x.png",), "?", answer, accepted)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("Dog.", sample("dog"), True),
        ("the dog", sample("dog"), True),
        ("dogs", sample("dog"), False),
        ("dog cat", sample("dog"), False),
        ("four", sample("4"), True),
        ("centre", sample("center", "centre"), True),
        ("", sample("dog"), False),
        ("  ", sample("dog"), False),
        ("", sample(""), False),
        ("Yes, there is a dog.", sample("yes"), True),
        ("No", sample("yes"), False),
        ("not sure", sample("no"), False),
        ("yes it is", sample("yes it is not"), False),
        ("B", sample("B"), True),
        ("A", sample("B"), False),
    ],
)
def test_right(answer, truth, expected):
    assert right(answer, truth) is expected


def test_f1():
    assert yes_no_f1([("yes", "yes"), ("Yes, it is", "yes"), ("no", "no")]) == 1
    assert yes_no_f1([("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")]) == 0.5
    assert yes_no_f1([("no", "yes"), ("", "yes")]) == 0
    assert yes_no_f1([("no", "no")]) is None and yes_no_f1([]) is None


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", ""]), st.sampled_from(["yes", "no"])), min_size=1))
@QUICK
def test_f1_is_the_mean_of_precision_and_recall(pairs):
    both = sum(said == true == "yes" for said, true in pairs)
    said, true = (sum(pair[place] == "yes" for pair in pairs) for place in (0, 1))
    value = yes_no_f1(pairs)
    if not true:
        assert value is None
    elif not both:
        assert value == 0
    else:
        precision, recall = both / said, both / true
        assert value == pytest.approx(2 * precision * recall / (precision + recall))
