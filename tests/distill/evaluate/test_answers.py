"""What counts as the right answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.corpus.readers import gsm8k_segments
from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.answers import (
    ExactMatch,
    Target,
    grade,
    is_gradable,
    normalise_number,
    target,
)
from kvdistill.errors import CorpusError


def sample(answer: str, prompt: str = "How many?") -> Sample:
    return Sample("s", (("prompt", prompt), ("rationale", "\nSo."), ("answer", answer)))


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("\n#### 72", Target("####", "72", is_number=True)),
        ("\n#### $1,200.50", Target("####", "1200.5", is_number=True)),
        ("\n#### -3", Target("####", "-3", is_number=True)),
        ("\nThe answer is 5%.", Target("The answer is", "5", is_number=True)),
        ("\n72", Target("", "72", is_number=True)),
        ("\n#### 10:30", Target("####", "10:30", is_number=False)),
        ("\n#### (B)", Target("####", "b", is_number=False)),
        ("\nAnswer: New  York.", Target("Answer:", "new york", is_number=False)),
        ("\nParis", Target("", "paris", is_number=False)),
        ("\n3 blind mice", Target("", "3 blind mice", is_number=False)),
    ],
)
def test_the_corpus_says_how_answers_are_announced(answer: str, wanted: Target) -> None:
    assert target(sample(answer)) == wanted


@pytest.mark.parametrize(
    ("answer", "text", "correct"),
    [
        ("\n#### 72", "\n48+24=72\n#### 72", True),
        ("\n#### 72", "\n48+24=72\n#### 72.00", True),
        ("\n#### 72", "\n48+24=72", False),  # never announced
        ("\n#### 72", "\n#### 71\nQuestion: …\n#### 72", False),  # the first one counts
        ("\n#### 1200", "\n#### $1,200 a year", True),
        ("\n#### 5", "\n#### 16-11", False),
        ("\n72", "48 + 24 makes 72", True),
        ("\n-72", "16-72", False),  # a subtraction is no negative number
        ("\n#### (B)", "\n#### B\nmore", True),
        ("\nParis", "It is in France.\nparis.\n", True),
        ("\nParis", "Paris is in France", False),
        ("\n#### 72", "", False),
        ("\nParis", " \n", False),
    ],
)
def test_grading(answer: str, text: str, correct: bool) -> None:
    assert grade(sample(answer), text, num_new_tokens=1, num_forwards=1).correct is correct


@given(st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_numbers_are_compared_as_numbers(value: int, zeros: int) -> None:
    shown = f"{value:,}" + ("." + "0" * zeros if zeros else "")
    assert normalise_number(shown) == str(value)
    segments = gsm8k_segments("How many?", f"So.\n#### {shown}", "here")
    given_back = grade(Sample("s", segments), f"#### {value}", num_new_tokens=1, num_forwards=1)
    assert given_back.correct


@pytest.mark.parametrize("segments", [(("text", "plain"),), (("prompt", "Why?"),)])
def test_a_sample_without_an_answer_is_refused_by_name(segments: tuple) -> None:
    plain = Sample("plain-7", segments)
    assert not is_gradable(plain)
    with pytest.raises(CorpusError, match="plain-7"):
        target(plain)


def test_figures_are_means_over_samples() -> None:
    right = grade(sample("\n#### 7"), "#### 7", num_new_tokens=2, num_forwards=2)
    wrong = grade(sample("\n#### 7"), "seven", num_new_tokens=4, num_forwards=10)
    figures = ExactMatch((right, wrong)).to_dict()
    assert figures == {
        "exact_match": 0.5, "answered": 0.5, "new_tokens": 3, "forward_passes": 6, "num_answers": 2,
    }  # fmt: skip
