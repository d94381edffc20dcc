r"""Grading of generated answers: GSM8K's exact match, and its analogue for answers in words.

The corpus defines how an answer is announced: in ``\n#### 72`` the marker is ``####`` and the
value 72, in ``The answer is 72.`` the marker is the words before the number. A generated text has
to announce its answer in the same way, and the first announcement counts, since a model that does
not stop may continue with a question of its own. Where the corpus has no marker, the last number
(or, for words, the last line) counts. Numbers are compared as numbers: ``$1,200.00`` is 1200.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Final

from kvdistill.corpus.samples import Sample
from kvdistill.errors import CorpusError

# A minus after a digit or a bracket is a subtraction.
NUMBER: Final = re.compile(r"(?:(?<![\w)])[-−])?(?:\$\s?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")

WORDS: Final = re.compile(r"^(?P<marker>.*?(?:#{2,}|\banswer is\b|:\s))\s*(?P<value>\S.*)$", re.S)


@dataclass(frozen=True)
class Target:
    """The right answer of a sample, and the marker that announces it (may be empty)."""

    marker: str
    value: str
    is_number: bool


@dataclass(frozen=True)
class Answer:
    """A student's graded answer to one sample."""

    sample_id: str
    correct: bool
    expected: str
    predicted: str | None
    """None where the text announces no answer."""
    text: str
    """All generated text."""
    num_new_tokens: int
    num_forwards: int
    """Forward passes for this sample alone, including the one over its prompt."""


@dataclass(frozen=True)
class ExactMatch:
    """Graded answers to a set of samples, in their order."""

    answers: tuple[Answer, ...]

    @property
    def share(self) -> float:
        """Share of right answers, 0 to 1."""
        return sum(answer.correct for answer in self.answers) / max(len(self.answers), 1)

    def to_dict(self) -> dict[str, float]:
        """Figures for logs and JSON; tokens and forward passes are means per sample."""
        number = max(len(self.answers), 1)
        return {
            "exact_match": self.share,
            "answered": sum(a.predicted is not None for a in self.answers) / number,
            "new_tokens": sum(a.num_new_tokens for a in self.answers) / number,
            "forward_passes": sum(a.num_forwards for a in self.answers) / number,
            "num_answers": len(self.answers),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready object per sample."""
        return [asdict(answer) for answer in self.answers]


def is_gradable(sample: Sample) -> bool:
    """Whether a sample has a prompt to generate from and an answer to compare with."""
    parts = dict(sample.segments)
    is_last = bool(sample.segments) and sample.segments[-1][0] == "answer"
    return is_last and bool(parts.get("prompt", "").strip() and parts["answer"].strip())


def target(sample: Sample) -> Target:
    """Parse the right answer from the sample's ``answer`` segment.

    Raises:
        CorpusError: no answer, or no prompt.
    """
    if not is_gradable(sample):
        raise CorpusError(
            f"sample {sample.sample_id!r}: expected a prompt and an answer for exact match, got "
            f"the segments {sorted(dict(sample.segments))}; use rows of prompt/rationale/answer, "
            "or GSM8K's form"
        )
    answer = dict(sample.segments)["answer"].strip()
    last = next(reversed(list(NUMBER.finditer(answer))), None)
    if last is not None and _is_plain(answer, last):
        marker = answer[: last.start()].strip()
        return Target(marker, normalise_number(last.group()), is_number=True)
    announced = WORDS.match(answer)
    if announced is None:
        return Target("", normalise_words(answer), is_number=False)
    return Target(announced["marker"].strip(), normalise_words(announced["value"]), is_number=False)


def grade(sample: Sample, text: str, *, num_new_tokens: int, num_forwards: int) -> Answer:
    """Compare a generated text with the sample's answer.

    Raises:
        CorpusError: as ``target``.
    """
    expected = target(sample)
    predicted = _announced_answer(text, expected)
    correct = predicted == expected.value
    counts = (num_new_tokens, num_forwards)
    return Answer(sample.sample_id, correct, expected.value, predicted, text, *counts)


def normalise_number(text: str) -> str:
    """A number without currency, thousands separators, trailing zeros: ``$1,200.00`` → 1200."""
    value = Decimal(re.sub(r"[$,\s]", "", text).replace("−", "-"))
    return f"{value:f}" if value == 0 else f"{value.normalize():f}"


def normalise_words(text: str) -> str:
    """Words in lower case, without surrounding punctuation and runs of white space."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*()[]")


def _announced_answer(text: str, expected: Target) -> str | None:
    """The answer that a generated text announces, normalised, or None if it announces none."""
    if expected.marker:
        _, found, text = text.partition(expected.marker)
        if not found:
            return None
    lines = [line for line in text.splitlines() if line.strip()]
    candidates: list[str] = NUMBER.findall(text) if expected.is_number else lines
    if not candidates:
        return None
    normalise = normalise_number if expected.is_number else normalise_words
    return normalise(candidates[0] if expected.marker else candidates[-1])


def _is_plain(answer: str, last: re.Match[str]) -> bool:
    """Whether an answer is its last number: no words follow, and it is no fraction or time."""
    before, after = answer[: last.start()], answer[last.end() :]
    return not re.search(r"\w{3,}", after) and not re.search(r"\d\s*[/:-]$", before)
