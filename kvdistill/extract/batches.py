"""Batches by token budget, of samples of like length, right-padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.extract.teacher_tokens import Encoded


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """Some samples of a shard, padded at the end to the longest of them."""

    sample_idx: tuple[int, ...]
    """Positions of the samples in their shard."""
    lengths: tuple[int, ...]
    input_ids: Tensor
    """``[B, T]`` long."""
    source_lengths: tuple[int, ...] = ()
    source_ids: Tensor | None = None
    """``[B, T_source]`` long: what the encoder reads, where ``input_ids`` are the decoder's."""

    @property
    def real_mask(self) -> Tensor:
        """``[B, T]`` bool, True on real tokens."""
        return _mask(self.input_ids, self.lengths)

    @property
    def attention_mask(self) -> Tensor:
        """``[B, T]`` long, 1 on real tokens."""
        return self.real_mask.long()

    @property
    def source_mask(self) -> Tensor | None:
        """``[B, T_source]`` long, 1 on real tokens of the encoder's input."""
        if self.source_ids is None:
            return None
        return _mask(self.source_ids, self.source_lengths).long()

    def halves(self) -> tuple[TeacherBatch, TeacherBatch]:
        """The same samples in two batches, for when one does not fit into memory."""
        middle = len(self.sample_idx) // 2
        return self._part(slice(None, middle)), self._part(slice(middle, None))

    def _part(self, part: slice) -> TeacherBatch:
        lengths, source_lengths = self.lengths[part], self.source_lengths[part]
        source_ids = self.source_ids
        if source_ids is not None:
            source_ids = source_ids[part, : max(source_lengths)]
        return TeacherBatch(
            self.sample_idx[part],
            lengths,
            self.input_ids[part, : max(lengths)],
            source_lengths,
            source_ids,
        )


def batch_by_tokens(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Positions of samples per batch, longest first; at most ``batch_tokens`` with padding.

    Longest first: what does not fit into memory fails at once and not after an hour. Samples
    without tokens are in no batch; one longer than the budget is a batch of its own.
    """
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // lengths[order[start]])
        yield order[start : start + count]
        start += count


def collate_teacher_batch(
    encoded: Sequence[Encoded], sample_idx: Sequence[int], pad_id: int, device: torch.device
) -> TeacherBatch:
    """Pad the chosen samples into one batch on ``device``."""
    chosen = [encoded[i] for i in sample_idx]
    lengths, ids = _padded([sample.token_ids for sample in chosen], pad_id)
    sources = [sample.source_ids for sample in chosen if sample.source_ids is not None]
    if not sources:
        return TeacherBatch(tuple(sample_idx), lengths, ids.to(device))
    source_lengths, source_ids = _padded(sources, pad_id)
    return TeacherBatch(
        tuple(sample_idx), lengths, ids.to(device), source_lengths, source_ids.to(device)
    )


def _padded(rows: Sequence[NDArray[np.int32]], pad_id: int) -> tuple[tuple[int, ...], Tensor]:
    lengths = tuple(len(row) for row in rows)
    ids = np.full((len(rows), max(1, *lengths)), pad_id, np.int64)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = row
    return lengths, torch.from_numpy(ids)


def _mask(ids: Tensor, lengths: Sequence[int]) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device)
    return positions < torch.tensor(lengths, device=ids.device)[:, None]
