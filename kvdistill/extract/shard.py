"""One shard of one teacher: text in, encoded keys and values out.

Layers are encoded where and when they are computed, inside the forward pass, so that the
largest thing in memory is one layer of one batch besides the codes themselves. A batch is
encoded in one go with every sample's last token repeated as its padding; that is exactly what a
codec does to fill a sample's last block, so the codes do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvdistill.corpus import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.adapters import QKV
from kvdistill.extract.batches import Batch, collate, plan
from kvdistill.extract.capture import capture
from kvdistill.extract.moments import SampleMoments
from kvdistill.extract.teacher import Teacher
from kvdistill.extract.text import Encoded, encode
from kvdistill.store.codecs import CODECS, part_name
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.schema import Counts, group_prefix, shard_arrays
from kvdistill.store.shard import EncodedShard, TokenTable, block_ptr
from kvdistill.store.statistics import ChannelStatistics
from kvdistill.types import KINDS, SEGMENT_SPECIAL


@dataclass(frozen=True, eq=False)
class ExtractedShard:
    """What ``publish_shard`` wants, and what happened on the way."""

    shard: EncodedShard
    statistics: dict[str, ChannelStatistics]
    truncated: tuple[str, ...]
    """Samples that were cut at the teacher's positions."""
    skipped: tuple[str, ...]
    """Samples too long for the teacher, stored without tokens."""


@dataclass(frozen=True, eq=False)
class _Texts:
    encoded: list[Encoded]
    truncated: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def extract_samples(
    teacher: Teacher,
    samples: Sequence[Sample],
    *,
    batch_tokens: int,
    long_text: str = "error",
    on_batch: Callable[[int], None] | None = None,
) -> ExtractedShard:
    """Run a teacher over samples; ``on_batch`` is told the number of tokens of every batch.

    Raises:
        TeacherError: a text is longer than the teacher's positions and the policy is ``error``,
            or a tokenizer's offsets are wrong; names the sample.
    """
    texts = _encode(teacher, samples, long_text)
    writer = _ShardWriter(teacher, _token_table(samples, texts.encoded))
    pad_id = teacher.tokenizer.pad_token_id or 0
    for sample_idx in plan([e.num_tokens for e in texts.encoded], batch_tokens):
        batch = collate(texts.encoded, sample_idx, pad_id, teacher.device)
        _run(teacher, batch, writer)
        if on_batch is not None:
            on_batch(sum(batch.lengths))
    return ExtractedShard(writer.shard(), writer.statistics(), texts.truncated, texts.skipped)


def _run(teacher: Teacher, batch: Batch, writer: _ShardWriter) -> None:
    """One forward pass, in halves where memory is too small for the whole."""
    try:
        with capture(teacher.sites, lambda idx, qkv: writer.add(batch, idx, qkv)):
            teacher.forward(batch.input_ids, batch.attention_mask)
    except torch.OutOfMemoryError:
        if len(batch.sample_idx) == 1:
            raise
    else:
        return
    torch.cuda.empty_cache()
    for half in batch.halves():
        _run(teacher, half, writer)


def _encode(teacher: Teacher, samples: Sequence[Sample], long_text: str) -> _Texts:
    encoded = encode(teacher.tokenizer, samples, teacher.view)
    limit = teacher.max_length
    too_long = [i for i, e in enumerate(encoded) if limit is not None and e.num_tokens > limit]
    if not too_long:
        return _Texts(encoded)
    ids = tuple(samples[i].sample_id for i in too_long)
    if long_text == "skip":
        for i in too_long:
            encoded[i] = Encoded.empty()
        return _Texts(encoded, skipped=ids)
    if long_text == "truncate":
        cut = encode(teacher.tokenizer, [samples[i] for i in too_long], teacher.view, True, limit)
        for i, shorter in zip(too_long, cut, strict=True):
            encoded[i] = shorter
        return _Texts(encoded, truncated=ids)
    raise TeacherError(
        f"sample {ids[0]!r} has {encoded[too_long[0]].num_tokens} tokens, but teacher "
        f"{teacher.manifest.name!r} reads at most {limit} ({len(ids)} such samples in this "
        "shard); set extraction.long_text to truncate or skip"
    )


def _token_table(samples: Sequence[Sample], encoded: Sequence[Encoded]) -> TokenTable:
    lengths = [e.num_tokens for e in encoded]
    return TokenTable(
        sample_ids=tuple(sample.sample_id for sample in samples),
        sample_ptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_ids=np.concatenate([e.token_ids for e in encoded]),
        char_start=np.concatenate([e.char_start for e in encoded]),
        char_end=np.concatenate([e.char_end for e in encoded]),
        segment=np.concatenate([e.segment for e in encoded]),
    )


class _ShardWriter:
    """Collects the encoded layers of a shard's batches into its packed arrays."""

    def __init__(self, teacher: Teacher, tokens: TokenTable) -> None:
        self._tokens = tokens
        self._blocks = block_ptr(tokens.sample_ptr)
        self._manifest = teacher.manifest
        counts = Counts(tokens.num_samples, tokens.num_tokens, tokens.num_blocks)
        specs = shard_arrays(teacher.manifest, counts)
        self._arrays = {
            name: np.zeros(spec.shape, spec.dtype)
            for name, spec in specs.items()
            if spec.group is not None
        }
        self._place = _places(teacher.manifest)
        codec = teacher.manifest.codec
        self._codecs = {"key": CODECS[codec.key], "value": CODECS[codec.value]}
        self._moments = SampleMoments(teacher.manifest.groups, tokens.num_samples)

    def add(self, batch: Batch, layer_idx: int, qkv: QKV) -> None:
        """Encode one layer of one batch and put it where it belongs."""
        group_idx, row = self._place[layer_idx]
        prefix = group_prefix(self._manifest, group_idx)
        counted = self._counted(batch)
        for kind in KINDS:
            x_BHTD = qkv.key if kind == "key" else qkv.value
            self._moments.add(
                group_idx, row, kind, sample_idx=batch.sample_idx, x_BHTD=x_BHTD, mask_BT=counted
            )
            codec = self._codecs[kind]
            encoded = codec.encode(_hold_last(x_BHTD, batch), kind)
            for part in codec.parts(kind):
                target = self._arrays[part_name(prefix + kind, part.suffix)][row]
                codes = encoded[part.suffix].cpu().numpy()
                self._scatter(batch, codes, target, per_block=part.per == "block")

    def shard(self) -> EncodedShard:
        """The finished shard."""
        return EncodedShard(self._tokens, self._arrays)

    def statistics(self) -> dict[str, ChannelStatistics]:
        """Channel statistics over the tokens that stand for text, by array prefix and kind."""
        return {
            f"{group_prefix(self._manifest, group_idx)}{kind}": self._moments.merged(
                group_idx, kind
            )
            for group_idx in range(len(self._manifest.groups))
            for kind in KINDS
        }

    def _scatter(
        self, batch: Batch, part_BHTD: np.ndarray, target_HTD: np.ndarray, *, per_block: bool
    ) -> None:
        ptr = self._blocks if per_block else self._tokens.sample_ptr
        for row, sample_idx in enumerate(batch.sample_idx):
            start, end = int(ptr[sample_idx]), int(ptr[sample_idx + 1])
            target_HTD[:, start:end] = part_BHTD[row, :, : end - start]

    def _counted(self, batch: Batch) -> Tensor:
        """``[B, T]`` bool: tokens that stand for text; an attention sink would drown them."""
        mask = np.zeros(tuple(batch.input_ids.shape), bool)
        for row, sample_idx in enumerate(batch.sample_idx):
            segment = self._tokens.segment[self._tokens.span(sample_idx)]
            mask[row, : len(segment)] = segment != SEGMENT_SPECIAL
        return torch.from_numpy(mask).to(batch.input_ids.device)


def _hold_last(x_BHTD: Tensor, batch: Batch) -> Tensor:
    """Replace padding by each sample's last real token."""
    if min(batch.lengths) == x_BHTD.shape[2]:
        return x_BHTD
    positions = torch.arange(x_BHTD.shape[2], device=x_BHTD.device)
    last = torch.tensor(batch.lengths, device=x_BHTD.device)[:, None] - 1
    idx_BHTD = torch.minimum(positions, last)[:, None, :, None].expand_as(x_BHTD)
    return x_BHTD.gather(2, idx_BHTD)


def _places(manifest: TeacherManifest) -> dict[int, tuple[int, int]]:
    return {
        layer_idx: (group_idx, row)
        for group_idx, group in enumerate(manifest.groups)
        for row, layer_idx in enumerate(group.layers)
    }
