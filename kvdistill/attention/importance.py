"""How much attention every token receives, per layer and key/value head, without full attention.

    I[l, h, i] = mean over queries q of softmax_i( max over the query heads of h of q·k_i · scale )

KaVa: Latent Reasoning via Compressed KV-Cache Distillation (arXiv 2510.02312): queries are the
answer's tokens, and the softmax runs over the rationale's tokens alone. Without segments the
queries are the last 8 tokens (R-KV: Redundancy-aware KV Cache Compression, arXiv 2505.24133).
Scale, soft cap, position bias (ALiBi, T5), window or chunk and the rotation at the text's length
are the model's own (``attention/attention_rule.py``). A sink belongs to no token, and takes no
part; queries that see none of the keys are left out of the mean. Only these few queries are
multiplied with the keys, so the cost is linear in the text's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.attention.attention_rule import AttentionRule
from kvdistill.types import SEGMENT_IDS, SEGMENT_SPECIAL, SegmentName

LAST_QUERIES: Final = 8
CHUNK: Final = 64
"""Queries at a time: bounds the scores in memory to ``[B, H·G, 64, T]``."""


class QueriesAndKeys(NamedTuple):
    """Which tokens of a batch are queries, and which are keys."""

    query_idx_BQ: Tensor
    """Positions of the queries, long, padded with 0."""
    query_mask_BQ: Tensor
    key_mask_BT: Tensor
    key_span: slice
    """The range of tokens that holds the keys of all samples."""


def queries_and_keys(segments: Sequence[NDArray[np.int8]]) -> QueriesAndKeys:
    """Queries and keys of a right-padded batch, from every sample's segments ``[T]``."""
    queries = [np.flatnonzero(_is_query(segment)) for segment in segments]
    query_idx = np.zeros((len(segments), max(1, *map(len, queries))), np.int64)
    query_mask = np.zeros(query_idx.shape, bool)
    key_mask = np.zeros((len(segments), max(1, *map(len, segments))), bool)
    for row, (segment, query) in enumerate(zip(segments, queries, strict=True)):
        query_idx[row, : len(query)] = query
        query_mask[row, : len(query)] = True
        key_mask[row, : len(segment)] = segment_mask(segment)
    columns = np.flatnonzero(key_mask.any(axis=0))
    span = slice(int(columns[0]), int(columns[-1]) + 1) if columns.size else slice(0, 1)
    masks = torch.from_numpy(query_mask), torch.from_numpy(key_mask)
    return QueriesAndKeys(torch.from_numpy(query_idx), *masks, span)


def importance(
    query_BHTD: Tensor, key_BHTD: Tensor, chosen: QueriesAndKeys, rule: AttentionRule
) -> Tensor:
    """Attention received by every token: float32 ``[B, H, T]``; its sum over the keys is at most 1.

    Queries ``[B, H·G, T, D]`` and keys ``[B, H, T, D]`` are unrotated; they are rotated here, in
    float32, at their positions. The mean is over the queries that see a key: samples without such a
    query get zeros, and the sum over the keys is 1 in all others.
    """
    idx_BQ, span, length = chosen.query_idx_BQ, chosen.key_span, key_BHTD.shape[2]
    picked = idx_BQ[:, None, :, None].expand(-1, query_BHTD.shape[1], -1, query_BHTD.shape[3])
    positions = torch.arange(length, device=key_BHTD.device)[span]
    query = rule.rotated(query_BHTD.gather(2, picked), idx_BQ[:, None], length)
    key = rule.rotated(key_BHTD[:, :, span], positions, length)
    received = torch.zeros(key_BHTD.shape[:3], device=key.device)
    num_queries = torch.zeros(len(idx_BQ), device=key.device)
    for start in range(0, idx_BQ.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        query_idx = idx_BQ[:, part]
        scores = rule.scores(query[:, :, part], key, query_idx, positions, length).amax(dim=2)
        visible = chosen.key_mask_BT[:, None, span] & chosen.query_mask_BQ[:, part, None]
        visible = visible & rule.mask.visible(query_idx, positions)
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
        received[:, :, span] += scores.softmax(dim=-1).nan_to_num(0.0).sum(dim=2)
        num_queries += visible.any(dim=2).sum(dim=1)
    return received / num_queries.clamp_min(1)[:, None, None]


def _is_query(segment: NDArray[np.int8]) -> NDArray[np.bool]:
    answer = np.equal(segment, SEGMENT_IDS["answer"])
    if answer.any():
        return answer
    last = np.zeros(segment.shape, bool)
    last[np.flatnonzero(segment != SEGMENT_SPECIAL)[-LAST_QUERIES:]] = True
    return last


def segment_mask(segment: NDArray[np.int8], name: SegmentName = "rationale") -> NDArray[np.bool]:
    """Tokens of a segment; without it, all tokens of text that are not the answer: ``[T]``."""
    named = np.equal(segment, SEGMENT_IDS[name])
    if named.any():
        return named
    return np.isin(segment, (SEGMENT_SPECIAL, SEGMENT_IDS["answer"]), invert=True)
