"""Teachers of which only some heads or tokens are stored.

An eviction keeps other tokens in every layer and head, so its shards have *slots* in place of
tokens: slot ``j`` of a sample is, in each layer and head, the ``j``-th token that was kept there,
in time order, and the array ``kept`` holds which token that is. Every head of a sample fills the
same number of slots, so a shard stays packed by ``sample_ptr``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.attention.adapters import QKV
from kvdistill.attention.eviction import Eviction, evict
from kvdistill.attention.importance import segment_mask
from kvdistill.attention.rotary import rotate
from kvdistill.store.manifest import RotarySpec
from kvdistill.store.shard import TokenTable
from kvdistill.types import SEGMENT_IDS, StoredEviction

NO_TOKEN: Final = -1
"""``token_ids`` of a slot: which token it holds depends on layer and head."""


class Slots(NamedTuple):
    """The tokens that a batch's slots are chosen from, and how many slots they fill."""

    spec: StoredEviction
    mask_BT: Tensor
    """Tokens that may be kept."""
    seed_B: Tensor
    """Seed of each sample, for ``random``."""

    @staticmethod
    def of(
        spec: StoredEviction,
        segments: Sequence[NDArray[np.int8]],
        sample_ids: Sequence[str],
        num_tokens: int,
    ) -> Slots:
        """Slots of a right-padded batch of ``num_tokens`` columns, on the CPU."""
        mask = np.zeros((len(segments), num_tokens), bool)
        for row, segment in enumerate(segments):
            mask[row, : len(segment)] = segment_mask(segment, spec.segment)
        seed = torch.tensor([crc32(sample_id.encode()) for sample_id in sample_ids])
        return Slots(spec, torch.from_numpy(mask), seed)

    @property
    def lengths(self) -> Tensor:
        """Slots of each sample, ``[B]`` long."""
        return self.mask_BT.sum(dim=1).clamp_max(self.spec.budget)

    def choose(
        self, key_BHTD: Tensor, importance_BHT: Tensor | None, rotary: RotarySpec | None, layer: int
    ) -> Eviction:
        """The tokens that one layer keeps, per head; R-KV compares *rotated* keys.

        Args:
            key_BHTD: unrotated keys.
            importance_BHT: attention received, where it is extracted.
            rotary: the layer's rotation.
            layer: its index, so that ``random`` differs between layers.
        """
        if rotary is not None:
            position = torch.arange(key_BHTD.shape[2], device=key_BHTD.device)
            key_BHTD = rotate(key_BHTD, position, rotary)
        return evict(
            self.spec.method,
            self.mask_BT,
            1,
            key_BHTD.shape[1],
            self.spec.budget,
            key_BLHTD=key_BHTD.float().unsqueeze(1),
            importance_BLHT=None if importance_BHT is None else importance_BHT.unsqueeze(1),
            mix=self.spec.mix,
            seed_B=(self.seed_B << 16) + layer,
        )


def num_slots(segment: NDArray[np.int8], spec: StoredEviction) -> int:
    """Number of tokens of a sample that are kept in each layer and head."""
    return min(int(segment_mask(segment, spec.segment).sum()), spec.budget)


def slot_table(tokens: TokenTable, spec: StoredEviction) -> TokenTable:
    """The token table of an evicted shard: a row per slot, without token or characters."""
    segments = [tokens.segment[tokens.span(i)] for i in range(tokens.num_samples)]
    counts = [num_slots(segment, spec) for segment in segments]
    wanted = SEGMENT_IDS[spec.segment]
    chosen = [wanted if (segment == wanted).any() else SEGMENT_IDS["text"] for segment in segments]
    total = sum(counts)
    return TokenTable(
        tokens.sample_ids,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.full(total, NO_TOKEN, np.int32),
        np.zeros(total, np.int32),
        np.zeros(total, np.int32),
        np.repeat(np.array(chosen, np.int8), counts),
    )


def keep_heads(qkv: QKV, heads: Sequence[int] | None) -> QKV:
    """Keys and values of some KV heads, and the queries that share them; all if ``None``."""
    if heads is None:
        return qkv
    index = torch.tensor(heads, device=qkv.key.device)
    grouped = qkv.query.unflatten(1, (qkv.key.shape[1], -1))  # type: ignore[no-untyped-call]
    query = grouped.index_select(1, index).flatten(1, 2)
    key, value = (x.index_select(1, index) for x in (qkv.key, qkv.value))
    return qkv._replace(query=query, key=key, value=value)
