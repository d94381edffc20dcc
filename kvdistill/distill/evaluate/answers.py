r"""What counts as the right answer: GSM8K's exact match, and its like for answers in words.

The corpus itself says how answers are announced: of ``\n#### 72`` the marker is ``####`` and the
value 72, of ``The answer is 72.`` the marker is the words before the number. A generated text
must announce its answer in the same way, and the first announcement counts, since a model that
does not stop may go on to a question of its own. Where the corpus has no marker, the last number
(or, for words, the last line) counts. Numbers are compared as numbers: ``$1,200.00`` is 1200.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    """The right answer of a sample, and the words that announce it (may be empty)."""

    marker: str
    value: str
    is_number: bool


@dataclass(frozen=True)
class Answer:
    """What a student made of one sample."""

    sample_id: str
    correct: bool
    expected: str
    predicted: str | None
    """None where no answer was announced."""
    text: str
    """Everything that was generated."""
    num_new_tokens: int
    num_forwards: int
    """Forward passes that this sample took, the one over its prompt included."""


@dataclass(frozen=True)
class ExactMatch:
    """Answers to a set of samples, in the samples' order."""

    answers: tuple[Answer, ...]

    @property
    def share(self) -> float:
        """Share of right answers, 0 to 1."""
        return self._mean([float(answer.correct) for answer in self.answers])

    def to_dict(self) -> dict[str, float]:
        """Figures for logs and JSON; tokens and forward passes are means per sample."""
        return {
            "exact_match": self.share,
            "answered": self._mean([float(a.predicted is not None) for a in self.answers]),
            "new_tokens": self._mean([float(a.num_new_tokens) for a in self.answers]),
            "forward_passes": self._mean([float(a.num_forwards) for a in self.answers]),
            "num_answers": len(self.answers),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready object per sample."""
        return [asdict(answer) for answer in self.answers]

    @staticmethod
    def _mean(values: Sequence[float]) -> float:
        return sum(values) / max(len(values), 1)


def target(sample: Sample) -> Target:
    """The right answer, from the sample's ``answer`` segment.

    Raises:
        CorpusError: no answer, or no prompt to put to a student.
    """
    parts = dict(sample.segments)
    answer = parts.get("answer", "").strip()
    if not answer or not parts.get("prompt", "").strip():
        raise CorpusError(
            f"sample {sample.sample_id!r} has the segments {sorted(parts)}; exact match needs a "
            "prompt and an answer (rows of prompt/rationale/answer, or GSM8K's form)"
        )
    last = next(reversed(list(NUMBER.finditer(answer))), None)
    if last is not None and _is_plain(answer, last):
        return Target(
            answer[: last.start()].strip(), normalise_number(last.group()), is_number=True
        )
    announced = WORDS.match(answer)
    if announced is None:
        return Target("", normalise_words(answer), is_number=False)
    return Target(announced["marker"].strip(), normalise_words(announced["value"]), is_number=False)


def is_gradable(sample: Sample) -> bool:
    """Whether a sample has a prompt to put and an answer to compare with."""
    parts = dict(sample.segments)
    return bool(parts.get("prompt", "").strip() and parts.get("answer", "").strip())


def predicted(text: str, wanted: Target) -> str | None:
    """The answer that a generated text announces, normalised, or None if it announces none."""
    if wanted.marker:
        _, found, text = text.partition(wanted.marker)
        if not found:
            return None
    if wanted.is_number:
        numbers = NUMBER.findall(text)
        if not numbers:
            return None
        return normalise_number(numbers[0] if wanted.marker else numbers[-1])
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    return normalise_words(lines[0] if wanted.marker else lines[-1])


def grade(sample: Sample, text: str, *, num_new_tokens: int, num_forwards: int) -> Answer:
    """Compare a generated text with the sample's answer; any way of generating may use it.

    Raises:
        CorpusError: as ``target``.
    """
    wanted = target(sample)
    found = predicted(text, wanted)
    return Answer(
        sample.sample_id,
        found == wanted.value,
        wanted.value,
        found,
        text,
        num_new_tokens,
        num_forwards,
    )


def _is_plain(answer: str, last: re.Match[str]) -> bool:
    """Whether an answer is its last number: no words follow, and it is no fraction or time."""
    before, after = answer[: last.start()], answer[last.end() :]
    return not re.search(r"\w{3,}", after) and not re.search(r"\d\s*[/:-]$", before)


def normalise_number(text: str) -> str:
    """A number without currency, thousands' separators, trailing zeros: ``$1,200.00`` → 1200."""
    value = Decimal(re.sub(r"[$,\s]", "", text).replace("−", "-"))
    return f"{value:f}" if value == 0 else f"{value.normalize():f}"


def normalise_words(text: str) -> str:
    """Words without case, surrounding punctuation and runs of white space."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*()[]")
