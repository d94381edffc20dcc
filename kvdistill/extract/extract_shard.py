"""One shard of one teacher: samples in, encoded keys and values out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.batches import TeacherBatch, batch_by_tokens, collate_teacher_batch
from kvdistill.extract.encode import ShardPacker, text_mask
from kvdistill.extract.hidden_states import cue, layer_inputs_at, summarise_hidden, take
from kvdistill.extract.teacher import Teacher
from kvdistill.extract.teacher_tokens import Encoded
from kvdistill.store.channel_statistics import ChannelStatistics
from kvdistill.store.shard import EncodedShard, TokenTable

LongText = Literal["error", "truncate", "skip"]


@dataclass(frozen=True, eq=False)
class ExtractedShard:
    """What ``publish_shard`` wants, and what happened on the way."""

    shard: EncodedShard
    statistics: dict[str, ChannelStatistics]
    truncated: tuple[str, ...]
    """Samples that were cut at the teacher's positions."""
    skipped: tuple[str, ...]
    """Samples too long for the teacher, stored without tokens."""
    seconds: float
    """Wall time of reading and encoding."""
    num_read: int
    """Tokens that the teacher read; more than are stored, where an eviction drops some."""


def extract_samples(
    teacher: Teacher,
    samples: Sequence[Sample],
    *,
    batch_tokens: int,
    long_text: LongText = "error",
    on_batch: Callable[[int], None] | None = None,
) -> ExtractedShard:
    """Run a teacher over samples; ``on_batch`` is told the number of tokens of every batch.

    Raises:
        TeacherError: a text is longer than the teacher's positions and the policy is ``error``,
            or a tokenizer's offsets are wrong; names the sample.
        NonFiniteError: NaN or infinity; names layer, head and sample.
    """
    started = time.monotonic()
    own = teacher.own_texts(samples, batch_tokens)
    samples = samples if own is None else own
    encoded, truncated, skipped = _encode_texts(teacher, samples, long_text)
    table = token_table(samples, encoded)
    packer = ShardPacker(teacher.manifest, teacher.layers, table)
    pad_id = teacher.tokenizer.pad_token_id or 0
    for sample_idx in batch_by_tokens([e.num_tokens for e in encoded], batch_tokens):
        batch = collate_teacher_batch(encoded, sample_idx, pad_id, teacher.device)
        _run_batch(teacher, batch, packer)
        if on_batch is not None:
            on_batch(sum(batch.lengths))
    seconds = time.monotonic() - started
    shard = replace(packer.shard(), texts=None if own is None else tuple(own))
    return ExtractedShard(shard, packer.statistics(), truncated, skipped, seconds, table.num_tokens)


def token_table(samples: Sequence[Sample], encoded: Sequence[Encoded]) -> TokenTable:
    """Pack the tokens of a shard's samples."""
    lengths = [e.num_tokens for e in encoded]
    return TokenTable(
        sample_ids=tuple(sample.sample_id for sample in samples),
        sample_ptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_ids=np.concatenate([e.token_ids for e in encoded]),
        char_start=np.concatenate([e.char_start for e in encoded]),
        char_end=np.concatenate([e.char_end for e in encoded]),
        segment=np.concatenate([e.segment for e in encoded]),
    )


def _run_batch(teacher: Teacher, batch: TeacherBatch, packer: ShardPacker) -> None:
    """One forward pass, in halves where memory is too small for the whole."""
    try:
        _run_whole(teacher, batch, packer)
    except torch.OutOfMemoryError:
        if len(batch.sample_idx) == 1:
            raise
    else:
        return
    # Outside the handler: the error's traceback keeps the failed pass's tensors alive.
    torch.cuda.empty_cache()
    for half in batch.halves():
        _run_batch(teacher, half, packer)


def _run_whole(teacher: Teacher, batch: TeacherBatch, packer: ShardPacker) -> None:
    manifest = teacher.manifest
    segments = packer.segments(batch)
    cues = torch.tensor([cue(segment) for segment in segments])
    inputs: list[Tensor] = []
    packed = packer.begin(batch)
    with ExitStack() as hooks:
        if manifest.has_hidden_at_cue:
            hooks.enter_context(layer_inputs_at(teacher.sites, cues, inputs))
        hidden_BTE = teacher.run(batch, packed.add)
    packed.finish()
    rows = list(batch.sample_idx)
    if manifest.has_hidden_at_cue:
        at_cue = [*inputs, take(hidden_BTE, cues)]
        packer.arrays["hidden_at_cue"][:, rows] = torch.stack([x.cpu() for x in at_cue]).numpy()
    if manifest.has_summaries:
        mask = text_mask(segments, batch).to(hidden_BTE.device)
        summary = summarise_hidden(hidden_BTE, mask, batch.real_mask.to(hidden_BTE.device))
        packer.arrays["hidden_summary"][:, rows] = summary.cpu().numpy()


def _encode_texts(
    teacher: Teacher, samples: Sequence[Sample], long_text: LongText
) -> tuple[list[Encoded], tuple[str, ...], tuple[str, ...]]:
    encoded = teacher.read(samples)
    limit = teacher.max_length
    too_long = [i for i, e in enumerate(encoded) if limit is not None and e.longest > limit]
    if not too_long:
        return encoded, (), ()
    ids = tuple(samples[i].sample_id for i in too_long)
    if long_text == "error":
        raise TeacherError(
            f"sample {ids[0]!r} has {encoded[too_long[0]].longest} tokens, but teacher "
            f"{teacher.manifest.name!r} reads at most {limit} ({len(ids)} such samples in this "
            "shard); set extraction.long_text to truncate or skip"
        )
    if long_text == "skip":
        for i in too_long:
            encoded[i] = Encoded.empty()
        return encoded, (), ids
    cut = teacher.read([samples[i] for i in too_long], limit)
    for i, shorter in zip(too_long, cut, strict=True):
        encoded[i] = shorter
    return encoded, ids, ()
