"""One teacher's shard in memory: a token table and the stored arrays, packed along tokens.

Samples are ragged: ``sample_ptr`` delimits them in every array with a token axis.
Quantisation blocks restart at every sample, so a sample's codes never depend on its neighbours:
extraction encodes sample by sample, and a padded batch decodes with ``block = token // 64``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from kvdistill.corpus.samples import Sample

BLOCK_TOKENS: Final = 64
"""Tokens that share one scale per key channel."""


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The tokens of a shard.

    ``sample_ids``  one per sample, in the order of the corpus
    ``sample_ptr``  int64 ``[num_samples + 1]``: sample ``i`` owns tokens ``ptr[i]:ptr[i+1]``
    ``token_ids``   int32 ``[T]``
    ``char_start``, ``char_end``  int32 ``[T]``, offsets into the sample's own text
    ``segment``     int8 ``[T]``, see ``types.SEGMENT_IDS``; -1 for a token without text
    """

    sample_ids: tuple[str, ...]
    sample_ptr: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    char_start: NDArray[np.int32]
    char_end: NDArray[np.int32]
    segment: NDArray[np.int8]

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all samples."""
        return int(self.token_ids.shape[0])

    @property
    def num_blocks(self) -> int:
        """Number of quantisation blocks of all samples."""
        return int(block_ptr(self.sample_ptr)[-1])

    def span(self, sample_idx: int) -> slice:
        """The tokens of one sample."""
        return slice(int(self.sample_ptr[sample_idx]), int(self.sample_ptr[sample_idx + 1]))

    def span_of(self, per: Literal["token", "block", "sample"], sample_idx: int) -> slice:
        """Where one sample is on an axis that counts these."""
        if per == "sample":
            return slice(sample_idx, sample_idx + 1)
        return self.span(sample_idx) if per == "token" else self.block_span(sample_idx)

    def block_span(self, sample_idx: int) -> slice:
        """The quantisation blocks of one sample."""
        blocks = block_ptr(self.sample_ptr)
        return slice(int(blocks[sample_idx]), int(blocks[sample_idx + 1]))


@dataclass(frozen=True, eq=False)
class EncodedShard:
    """A shard as it is stored: codes, scales and importance, not yet decoded.

    ``arrays`` holds the arrays that ``format.shard_arrays`` describes, by name. When only some
    layers or heads were read, the layer and head axes hold those, ascending.
    ``texts`` is the teacher's own text if it generated its rationales, otherwise None.
    """

    tokens: TokenTable
    arrays: Mapping[str, np.ndarray]
    texts: tuple[Sample, ...] | None = None


def block_ptr(sample_ptr: NDArray[np.int64]) -> NDArray[np.int64]:
    """Block boundaries of samples: int64 ``[num_samples + 1]``, ``ceil(len / 64)`` each."""
    blocks = -(-np.diff(sample_ptr) // BLOCK_TOKENS)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks, dtype=np.int64)])


def block_idx(sample_ptr: NDArray[np.int64]) -> NDArray[np.int64]:
    """The block of every token of a packed shard: int64 ``[T]``."""
    lengths = np.diff(sample_ptr)
    within = np.arange(int(sample_ptr[-1])) - np.repeat(sample_ptr[:-1], lengths)
    return np.repeat(block_ptr(sample_ptr)[:-1], lengths) + within // BLOCK_TOKENS
