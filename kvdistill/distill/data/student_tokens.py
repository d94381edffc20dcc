"""The student's view of a text: its tokens, and which characters each stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvdistill.corpus.samples import Sample
from kvdistill.types import SEGMENT_SPECIAL

COUNTED_TOGETHER: Final = 1000
"""Texts per call of the tokenizer, which spreads them over the cores."""


@dataclass(frozen=True, eq=False)
class StudentTokens:
    """One sample for the student; all arrays are int64 ``[T]``.

    ``segment`` is -1 for tokens that stand for no character (BOS, EOS).
    """

    input_ids: NDArray[np.int64]
    char_start: NDArray[np.int64]
    char_end: NDArray[np.int64]
    segment: NDArray[np.int64]


def tokenize(tokenizer: Any, samples: list[Sample], max_length: int) -> list[StudentTokens]:
    """Tokenise whole texts as ``BOS text EOS`` (where the tokenizer has them), cut to a length.

    Args:
        tokenizer: a fast tokenizer.
        samples: texts; an empty one gives only the special tokens.
        max_length: tokens kept per sample, special ones included; the EOS of a text that was
            cut is dropped, since the text does not end there.
    """
    encoded = tokenizer(
        [sample.text for sample in samples],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    rows = zip(samples, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [
        _encode_sample(tokenizer, sample, ids, offsets, max_length) for sample, ids, offsets in rows
    ]


def token_counts(tokenizer: Any, samples: Sequence[Sample], max_length: int) -> NDArray[np.int64]:
    """Tokens of every sample as ``tokenize`` gives them: ``[N]``. Costs a pass over the texts."""
    special = sum(i is not None for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    counts = []
    for start in range(0, len(samples), COUNTED_TOGETHER):
        texts = [sample.text for sample in samples[start : start + COUNTED_TOGETHER]]
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        counts += [min(len(row) + special, max_length) for row in ids["input_ids"]]
    return np.array(counts, np.int64)


def segments_of(sample: Sample, char_start: NDArray[np.int64]) -> NDArray[np.int64]:
    """Segment id of every token, by the segment that its first character lies in."""
    spans = [span for span in sample.spans if span[1] > span[0]]
    if not spans:
        return np.full(char_start.shape, SEGMENT_SPECIAL, np.int64)
    starts = np.array([start for start, _, _ in spans])
    ids = np.array([segment for _, _, segment in spans])
    return np.asarray(ids[np.searchsorted(starts, char_start, side="right") - 1])


def _encode_sample(
    tokenizer: Any, sample: Sample, ids: list[int], offsets: list[tuple[int, int]], limit: int
) -> StudentTokens:
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    spans = np.array(offsets, np.int64).reshape(-1, 2)
    segment = segments_of(sample, spans[:, 0])
    edges = ((0, 0),) * len(before), ((0, 0),) * len(after)
    spans = np.array([*edges[0], *offsets, *edges[1]], np.int64).reshape(-1, 2)
    segment = np.pad(segment, (len(before), len(after)), constant_values=SEGMENT_SPECIAL)
    input_ids = np.array([*before, *ids, *after], np.int64)
    return StudentTokens(input_ids[:limit], spans[:limit, 0], spans[:limit, 1], segment[:limit])
