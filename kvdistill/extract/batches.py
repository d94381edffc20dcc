"""Batches by token budget, of samples of like length, right-padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvdistill.extract.text import Encoded


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples of a shard, padded at the end to the longest of them."""

    sample_idx: tuple[int, ...]
    """Positions of the samples in their shard."""
    lengths: tuple[int, ...]
    input_ids: Tensor
    """``[B, T]`` long."""

    @property
    def attention_mask(self) -> Tensor:
        """``[B, T]`` long, 1 on real tokens."""
        return self.real_mask.long()

    @property
    def real_mask(self) -> Tensor:
        """``[B, T]`` bool, True on real tokens."""
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return positions < torch.tensor(self.lengths, device=self.input_ids.device)[:, None]

    def halves(self) -> tuple[Batch, Batch]:
        """The same samples in two batches, for when one does not fit into memory."""
        middle = len(self.sample_idx) // 2
        return self._part(slice(None, middle)), self._part(slice(middle, None))

    def _part(self, part: slice) -> Batch:
        lengths = self.lengths[part]
        return Batch(self.sample_idx[part], lengths, self.input_ids[part, : max(lengths)])


def plan(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
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


def collate(
    encoded: Sequence[Encoded], sample_idx: Sequence[int], pad_id: int, device: torch.device
) -> Batch:
    """Pad the chosen samples into one batch on ``device``."""
    lengths = tuple(encoded[i].num_tokens for i in sample_idx)
    ids = np.full((len(lengths), max(lengths)), pad_id, np.int64)
    for row, i in enumerate(sample_idx):
        ids[row, : lengths[row]] = encoded[i].token_ids
    return Batch(tuple(sample_idx), lengths, torch.from_numpy(ids).to(device))
