"""Samples in a teacher's tokens, each token mapped back to characters of the sample's own text.

Tokens that stand for no character (BOS, template words, padding) have segment -1 and an empty
span. A token across two segments belongs to the one that its first character is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.prompt_template import AS_IT_IS, PromptTemplate, RenderedPrompt
from kvdistill.types import SEGMENT_SPECIAL

Bos = Literal["keep", "add", "remove"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One sample in one teacher's tokens. All arrays are ``[T]``."""

    token_ids: NDArray[np.int32]
    char_start: NDArray[np.int32]
    char_end: NDArray[np.int32]
    segment: NDArray[np.int8]
    source_ids: NDArray[np.int32] | None = None
    """What an encoder-decoder's encoder reads, where these are its decoder's tokens."""

    @property
    def num_tokens(self) -> int:
        """How many tokens, special ones included."""
        return int(self.token_ids.shape[0])

    @property
    def longest(self) -> int:
        """Tokens of the longer side: an encoder's input counts where it is apart."""
        return max(self.num_tokens, 0 if self.source_ids is None else len(self.source_ids))

    @staticmethod
    def empty() -> Encoded:
        """A sample without tokens."""
        none = np.zeros(0, np.int32)
        return Encoded(none, none, none, np.zeros(0, np.int8))


@dataclass(frozen=True, eq=False)
class Reader:
    """A tokenizer, a view, and the rules for special tokens."""

    tokenizer: Any
    view: PromptTemplate = AS_IT_IS
    add_special_tokens: bool = True
    """False where the view, a chat template, brings them."""
    bos: Bos = "keep"
    """Whether the first token is made, or made not, to be the begin-of-sequence token."""

    def read(self, samples: Sequence[Sample], max_length: int | None = None) -> list[Encoded]:
        """Tokenise; ``max_length`` truncates, and keeps the special tokens at the end.

        Raises:
            TeacherError: the tokenizer's offsets are wrong, or the view does not fit a sample;
                names the sample.
        """
        if not samples:
            return []
        rendered = [self.view.render(sample) for sample in samples]
        room = None if max_length is None else max_length - (self.bos == "add")
        output = self.tokenizer(
            [r.text for r in rendered],
            add_special_tokens=self.add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=room is not None,
            max_length=room,
            verbose=False,
        )
        return [
            self._begin(_map_back(ids, np.asarray(at, np.int32).reshape(-1, 2), source, sample))
            for ids, at, source, sample in zip(
                output["input_ids"], output["offset_mapping"], rendered, samples, strict=True
            )
        ]

    def _begin(self, encoded: Encoded) -> Encoded:
        if self.bos == "keep":
            return encoded
        bos = self.tokenizer.bos_token_id
        if bos is None:
            raise TeacherError(
                f"{type(self.tokenizer).__name__} has no begin-of-sequence token; set the "
                "teacher's `bos` to auto"
            )
        has = encoded.num_tokens > 0 and int(encoded.token_ids[0]) == bos
        if has == (self.bos == "add"):
            return encoded
        return _with_token(encoded, bos, position=0) if self.bos == "add" else _without(encoded)


def _with_token(encoded: Encoded, token_id: int, position: int) -> Encoded:
    """Insert a special token."""
    before = int(encoded.char_end[position - 1]) if position else 0
    return replace(
        encoded,
        token_ids=np.insert(encoded.token_ids, position, token_id),
        char_start=np.insert(encoded.char_start, position, before),
        char_end=np.insert(encoded.char_end, position, before),
        segment=np.insert(encoded.segment, position, SEGMENT_SPECIAL),
    )


def _without(encoded: Encoded) -> Encoded:
    """Drop the first token."""
    return Encoded(
        encoded.token_ids[1:], encoded.char_start[1:], encoded.char_end[1:], encoded.segment[1:]
    )


def with_start(encoded: Encoded, token_id: int, source: Encoded) -> Encoded:
    """A decoder's tokens after its start token, beside what its encoder reads."""
    return replace(_with_token(encoded, token_id, position=0), source_ids=source.token_ids)


def _map_back(
    ids: Sequence[int], offsets: NDArray[np.int32], source: RenderedPrompt, sample: Sample
) -> Encoded:
    starts, ends = offsets[:, 0], offsets[:, 1]
    _check_offsets(starts, ends, source, sample)
    char_start, char_end = np.zeros_like(starts), np.zeros_like(starts)
    for start, end, origin in source.ranges:
        inside = (np.maximum(starts, start) < np.minimum(ends, end)) & (char_start == char_end)
        char_start[inside] = np.maximum(starts[inside], start) - start + origin
        char_end[inside] = np.minimum(ends[inside], end) - start + origin
    special = char_start == char_end
    segment = np.where(special, SEGMENT_SPECIAL, _token_segments(char_start, sample)).astype(
        np.int8
    )
    # An empty span sits where the text before it ended, so that positions stay in order.
    before = np.maximum.accumulate(np.where(special, 0, char_end)) if len(starts) else char_end
    return Encoded(
        np.asarray(ids, np.int32),
        np.where(special, before, char_start).astype(np.int32),
        np.where(special, before, char_end).astype(np.int32),
        segment,
    )


def _token_segments(char_start: NDArray[np.int32], sample: Sample) -> NDArray[np.int8]:
    spans = [span for span in sample.spans if span[0] < span[1]]
    if not spans:
        return np.zeros(char_start.shape, np.int8)
    owner = np.searchsorted([start for start, _, _ in spans], char_start, side="right") - 1
    return np.asarray([segment for _, _, segment in spans], np.int8)[np.maximum(owner, 0)]


def _check_offsets(
    starts: NDArray[np.int32], ends: NDArray[np.int32], source: RenderedPrompt, sample: Sample
) -> None:
    real = starts < ends
    sane = bool((starts >= 0).all() and (starts <= ends).all() and (ends <= len(source.text)).all())
    if not sane or bool((np.diff(starts[real]) < 0).any()):
        raise TeacherError(
            f"sample {sample.sample_id!r}: the tokenizer's offsets leave the text of "
            f"{len(source.text)} characters or run backwards; set the teacher's `tokenizer` to "
            "a fast tokenizer with correct offsets"
        )
