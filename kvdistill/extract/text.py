r"""Samples as a teacher reads them: rendered, tokenised, and mapped back to their own characters.

A view is a template such as ``"Question: {prompt}\nAnswer:{rationale}{answer}"``; without one a
teacher reads the sample's text as it is. Every token keeps the characters of the *sample* that
it stands for, so views and tokenizers differ freely and still align. Tokens that stand for none
(BOS, template words, padding) have segment -1 and an empty span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvdistill.corpus import Sample
from kvdistill.errors import TeacherError
from kvdistill.types import SEGMENT_SPECIAL

PLACEHOLDERS: Final = ("text", "prompt", "rationale", "answer")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One sample in one teacher's tokens. All arrays are ``[T]``."""

    token_ids: NDArray[np.int32]
    char_start: NDArray[np.int32]
    char_end: NDArray[np.int32]
    segment: NDArray[np.int8]

    @property
    def num_tokens(self) -> int:
        """How many tokens, special ones included."""
        return int(self.token_ids.shape[0])

    @staticmethod
    def empty() -> Encoded:
        """A sample without tokens."""
        none = np.zeros(0, np.int32)
        return Encoded(none, none, none, np.zeros(0, np.int8))


@dataclass(frozen=True)
class View:
    """A parsed template: literals, and names of segments to fill in."""

    pieces: tuple[tuple[str, str | None], ...] = (("", "text"),)

    @staticmethod
    def parse(template: str | None) -> View:
        """Read a template.

        Raises:
            TeacherError: an unknown placeholder, an unbalanced brace, or no placeholder at all.
        """
        if template is None:
            return View()
        try:
            parsed = [(literal, name) for literal, name, _, _ in Formatter().parse(template)]
        except ValueError as error:
            raise TeacherError(f"template {template!r}: {error}; double a literal brace") from None
        names = [name for _, name in parsed if name is not None]
        unknown = [name for name in names if name not in PLACEHOLDERS]
        if unknown or not names:
            raise TeacherError(
                f"template {template!r}: expected one or more of "
                f"{', '.join('{' + name + '}' for name in PLACEHOLDERS)}; got {unknown or 'none'}"
            )
        return View(tuple(parsed))

    def render(self, sample: Sample) -> Rendered:
        """The string a teacher reads, and which parts of it are which part of the sample.

        Raises:
            TeacherError: the template names segments, but the sample is plain text.
        """
        parts: list[str] = []
        ranges: list[tuple[int, int, int]] = []
        length = 0
        spans = _named_spans(sample)
        for literal, name in self.pieces:
            parts.append(literal)
            length += len(literal)
            if name is None:
                continue
            if name not in spans and "text" in dict(sample.segments):
                raise TeacherError(
                    f"sample {sample.sample_id!r} is plain text, but the template asks for "
                    f"{{{name}}}; use {{text}} in the template"
                )
            start, end = spans.get(name, (0, 0))
            parts.append(sample.text[start:end])
            _append(ranges, (length, length + end - start, start))
            length += end - start
        return Rendered("".join(parts), tuple(ranges))


@dataclass(frozen=True)
class Rendered:
    """Text for the tokenizer; ``ranges`` are ``(start, end, start in the sample's text)``."""

    text: str
    ranges: tuple[tuple[int, int, int], ...]


def encode(
    tokenizer: Any,
    samples: Sequence[Sample],
    view: View,
    add_special_tokens: bool = True,
    max_length: int | None = None,
) -> list[Encoded]:
    """Tokenise samples; ``max_length`` truncates, and keeps the special tokens at the end.

    Raises:
        TeacherError: the tokenizer has no offsets, or wrong ones; names the sample.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TeacherError(
            f"{type(tokenizer).__name__} gives no character offsets, and alignment needs them; "
            "set the teacher's `tokenizer` to one with a tokenizer.json"
        )
    if not samples:
        return []
    rendered = [view.render(sample) for sample in samples]
    output = tokenizer(
        [r.text for r in rendered],
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=max_length is not None,
        max_length=max_length,
        verbose=False,
    )
    return [
        _map_back(ids, np.asarray(offsets, np.int32).reshape(-1, 2), source, sample)
        for ids, offsets, source, sample in zip(
            output["input_ids"], output["offset_mapping"], rendered, samples, strict=True
        )
    ]


def _map_back(
    ids: Sequence[int], offsets: NDArray[np.int32], source: Rendered, sample: Sample
) -> Encoded:
    starts, ends = offsets[:, 0], offsets[:, 1]
    _check_offsets(starts, ends, source, sample)
    char_start = np.zeros_like(starts)
    char_end = np.zeros_like(starts)
    for start, end, origin in source.ranges:
        # A token across two parts belongs to the one that its first character is in.
        inside = (np.maximum(starts, start) < np.minimum(ends, end)) & (char_start == char_end)
        char_start[inside] = np.maximum(starts[inside], start) - start + origin
        char_end[inside] = np.minimum(ends[inside], end) - start + origin
    special = char_start == char_end
    segment = np.where(special, SEGMENT_SPECIAL, _segments(char_start, sample)).astype(np.int8)
    # An empty span sits where the text before it ended, so that positions stay in order.
    before = np.maximum.accumulate(np.where(special, 0, char_end)) if len(starts) else char_end
    return Encoded(
        np.asarray(ids, np.int32),
        np.where(special, before, char_start).astype(np.int32),
        np.where(special, before, char_end).astype(np.int32),
        segment,
    )


def _append(ranges: list[tuple[int, int, int]], new: tuple[int, int, int]) -> None:
    """Join parts that follow each other both as read and in the sample."""
    if ranges:
        start, end, origin = ranges[-1]
        if end == new[0] and origin + end - start == new[2]:
            ranges[-1] = (start, new[1], origin)
            return
    ranges.append(new)


def _segments(char_start: NDArray[np.int32], sample: Sample) -> NDArray[np.int8]:
    spans = [span for span in sample.spans if span[0] < span[1]]
    if not spans:
        return np.zeros(char_start.shape, np.int8)
    owner = np.searchsorted([start for start, _, _ in spans], char_start, side="right") - 1
    return np.asarray([segment for _, _, segment in spans], np.int8)[np.maximum(owner, 0)]


def _named_spans(sample: Sample) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {"text": (0, len(sample.text))}
    for (name, _), (start, end, _) in zip(sample.segments, sample.spans, strict=True):
        spans[name] = (start, end)
    return spans


def _check_offsets(
    starts: NDArray[np.int32], ends: NDArray[np.int32], source: Rendered, sample: Sample
) -> None:
    real = starts < ends
    sane = bool((starts >= 0).all() and (starts <= ends).all() and (ends <= len(source.text)).all())
    if not sane or bool((np.diff(starts[real]) < 0).any()):
        raise TeacherError(
            f"sample {sample.sample_id!r}: the tokenizer's offsets leave the text of "
            f"{len(source.text)} characters or run backwards; set the teacher's `tokenizer` to "
            "a fast tokenizer with correct offsets"
        )
