"""One shard of one teacher: samples in, encoded keys and values out.

Besides keys and values a shard may hold hidden states. ``hidden_at_cue`` is every kept layer's
*input* and the model's final output at the last token before the answer, counted as transformers'
``hidden_states``: the target of CODI's loss (CODI: Compressing Chain-of-Thought into Continuous
Space via Self-Distillation, arXiv 2502.21074). ``hidden_summary`` is the mean of the final output
over a sample's text, and its first token; router prototypes are made of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvdistill.attention.hooks import Site, attached
from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.encode import BatchPacker, ShardPacker, start_copy, text_mask
from kvdistill.extract.generate import generate_rationales
from kvdistill.extract.predictions import predictions
from kvdistill.extract.teacher import Teacher
from kvdistill.extract.tokenise import (
    TeacherBatch,
    TokenisedSample,
    Windows,
    collate_teacher_batch,
)
from kvdistill.store.channel_statistics import ChannelStatistics
from kvdistill.store.shard import EncodedShard, TokenTable
from kvdistill.types import SEGMENT_IDS, SEGMENT_SPECIAL


@dataclass(frozen=True, eq=False)
class ExtractedShard:
    """The input of ``publish_shard``, and what the report counts."""

    shard: EncodedShard
    statistics: dict[str, ChannelStatistics]
    truncated: tuple[str, ...]
    """Samples that were truncated to the teacher's positions."""
    windowed: tuple[str, ...]
    """Samples that were read in windows of them."""
    skipped: tuple[str, ...]
    """Samples too long for the teacher, stored without tokens."""
    seconds: float
    """Wall time of reading and encoding."""
    num_read: int
    """Tokens that the teacher read; more than are stored where an eviction drops some."""


def extract_samples(
    teacher: Teacher,
    samples: Sequence[Sample],
    *,
    batch_tokens: int,
    on_batch: Callable[[int], None] | None = None,
) -> ExtractedShard:
    """Run a teacher over samples; ``on_batch`` receives the number of tokens of every batch.

    Samples of parts that the teacher does not read are stored without tokens.

    Raises:
        TeacherError: a text exceeds the teacher's positions and the teacher's ``long_text`` is
            ``error``, or a tokenizer's offsets are wrong; names the sample.
        NonFiniteError: NaN or infinity; names layer, head and sample.
    """
    started = time.monotonic()
    read_idx = [i for i, sample in enumerate(samples) if sample.is_of(teacher.manifest.parts)]
    own_texts = None
    if teacher.generate is not None:
        chosen = [samples[i] for i in read_idx]
        written = generate_rationales(teacher, chosen, teacher.generate, batch_tokens)
        own = dict(zip(read_idx, written, strict=True))
        samples = own_texts = [own.get(i, sample) for i, sample in enumerate(samples)]
    tokenised, too_long, windows = _tokenise(teacher, samples, read_idx)
    table = token_table(samples, tokenised)
    packer = ShardPacker(teacher.manifest, teacher.layers, table, teacher.transforms)
    place: Callable[[], None] | None = None
    for sample_idx in teacher.batches([sample.num_tokens for sample in tokenised], batch_tokens):
        for place_next in _passes(teacher, tokenised, sample_idx, packer, windows):
            if place is not None:  # the pass before, while the device computes this one
                place()
            place = place_next
        if on_batch is not None:
            on_batch(sum(tokenised[i].num_tokens for i in sample_idx))
    if place is not None:
        place()
    seconds = time.monotonic() - started
    texts = None if own_texts is None else tuple(own_texts)
    shard = EncodedShard(packer.tokens, packer.arrays, texts=texts)
    return ExtractedShard(
        shard,
        packer.statistics(),
        truncated=too_long if teacher.long_text == "truncate" else (),
        windowed=too_long if teacher.long_text == "window" else (),
        skipped=too_long if teacher.long_text == "skip" else (),
        seconds=seconds,
        num_read=table.num_tokens,
    )


def token_table(samples: Sequence[Sample], tokenised: Sequence[TokenisedSample]) -> TokenTable:
    """Pack the tokens of a shard's samples."""
    lengths = [sample.num_tokens for sample in tokenised]
    return TokenTable(
        sample_ids=tuple(sample.sample_id for sample in samples),
        sample_ptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_ids=np.concatenate([sample.token_ids for sample in tokenised]),
        char_start=np.concatenate([sample.char_start for sample in tokenised]),
        char_end=np.concatenate([sample.char_end for sample in tokenised]),
        segment=np.concatenate([sample.segment for sample in tokenised]),
    )


def _tokenise(
    teacher: Teacher, samples: Sequence[Sample], read_idx: Sequence[int]
) -> tuple[list[TokenisedSample], tuple[str, ...], dict[int, Windows]]:
    """Tokens of all samples, as they are to be read, the ids of those that were too long, and the
    windows of those that are read in such, by position.
    """
    windows = dict[int, Windows]()
    tokenised = [TokenisedSample.empty()] * len(samples)
    for i, found in zip(read_idx, teacher.tokenise([samples[i] for i in read_idx]), strict=True):
        tokenised[i] = found
    too_long = [i for i, sample in enumerate(tokenised) if teacher.is_too_long(sample)]
    ids = tuple(samples[i].sample_id for i in too_long)
    if too_long and teacher.long_text == "error":
        name = teacher.manifest.name
        raise TeacherError(
            f"sample {ids[0]!r} has {tokenised[too_long[0]].max_tokens} tokens, but teacher "
            f"{name!r} reads at most {teacher.max_length} ({len(ids)} such samples in this "
            f"shard); set teachers.{name}.long_text to truncate, window or skip"
        )
    if teacher.long_text == "window":
        windows = {i: teacher.windows(tokenised[i]) for i in too_long}
    elif teacher.long_text == "skip":
        for i in too_long:
            tokenised[i] = TokenisedSample.empty()
    elif too_long:
        shorter = teacher.tokenise([samples[i] for i in too_long], teacher.max_length)
        for i, sample in zip(too_long, shorter, strict=True):
            tokenised[i] = sample
    return tokenised, ids, windows


def _passes(
    teacher: Teacher,
    tokenised: Sequence[TokenisedSample],
    sample_idx: Sequence[int],
    packer: ShardPacker,
    windows: Mapping[int, Windows],
) -> Iterator[Callable[[], None]]:
    """One forward pass, or several of parts of a batch that does not fit into memory.

    A pass is yielded once it is launched: a function that waits for it and places its results.
    """
    try:
        batch = collate_teacher_batch(tokenised, sample_idx, teacher.pad_id, teacher.device)
        place = _launch(teacher, batch, packer, windows.get(sample_idx[0]))
    except torch.OutOfMemoryError:
        if len(sample_idx) == 1 or teacher.is_sharded:  # other processes wait for this batch
            raise
    else:
        yield place
        return
    # Outside the handler: the error's traceback keeps the failed pass's tensors alive.
    torch.cuda.empty_cache()
    middle = len(sample_idx) // 2
    for half in (sample_idx[:middle], sample_idx[middle:]):
        yield from _passes(teacher, tokenised, half, packer, windows)


def _launch(
    teacher: Teacher, batch: TeacherBatch, packer: ShardPacker, windows: Windows | None
) -> Callable[[], None]:
    manifest = teacher.manifest
    segments = packer.segments(batch)
    cues_B = torch.tensor([cue(segment) for segment in segments])
    rows_B = torch.arange(len(segments))
    at_cue = (rows_B, cues_B) if windows is None else windows.find(cues_B)
    inputs_LBE: list[Tensor] = []
    packed = BatchPacker(packer, batch)
    with ExitStack() as hooks:
        if manifest.has_hidden_at_cue:
            hooks.enter_context(_layer_inputs(teacher.sites, at_cue, inputs_LBE))
        if windows is None:
            hidden_BTE = teacher.run(batch, packed.add)
        else:
            hidden_BTE = windows.run(teacher.run, packed.add)
    states, summary, found = list[Tensor](), None, dict[str, Tensor]()
    if manifest.has_hidden_at_cue:
        states = [start_copy(x) for x in (*inputs_LBE, _token_at(hidden_BTE, (rows_B, cues_B)))]
    if manifest.has_summaries:
        mask = text_mask(segments, batch).to(hidden_BTE.device)
        summary = start_copy(_summarise(hidden_BTE, mask, batch.real_mask.to(hidden_BTE.device)))
    if teacher.head is not None:  # these wait for the device
        confidence, num_logits = manifest.has_confidence, manifest.num_logits
        found = predictions(
            teacher.head, hidden_BTE, batch, confidence=confidence, num_logits=num_logits
        )
    packed.end_pass()

    def place() -> None:
        packed.finish()
        rows = list(batch.sample_idx)
        if states:
            packer.arrays["hidden_at_cue"][:, rows] = torch.stack(states).numpy()
        if summary is not None:
            packer.arrays["hidden_summary"][:, rows] = summary.numpy()
        if found:
            packer.place(batch, found)

    return place


def cue(segment: NDArray[np.int8]) -> int:
    """Position of the last token before the answer; without an answer, of the last text token.

    0 for a sample without text.
    """
    answer = np.flatnonzero(segment == SEGMENT_IDS["answer"])
    if answer.size:
        return max(int(answer[0]) - 1, 0)
    text = np.flatnonzero(segment != SEGMENT_SPECIAL)
    return int(text[-1]) if text.size else 0


@contextmanager
def _layer_inputs(
    sites: Sequence[Site], at_B: tuple[Tensor, Tensor], inputs_LBE: list[Tensor]
) -> Iterator[None]:
    """While inside, append ``[B, E]`` for every site: its layer's input at rows and positions."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.ndim != 3:
            raise TeacherError(
                f"extraction.hidden_at_cue: {type(module).__name__} reads several hidden states a "
                f"token ({list(hidden.shape)}); set it to false"
            )
        inputs_LBE.append(_token_at(hidden, at_B))

    with attached(site.layer.register_forward_pre_hook(hook, with_kwargs=True) for site in sites):
        yield


def _token_at(hidden_BTE: Tensor, at_B: tuple[Tensor, Tensor]) -> Tensor:
    """``[B, T, E]`` at some rows and positions → float32 ``[B, E]``."""
    row_B, position_B = (x.to(hidden_BTE.device) for x in at_B)
    return hidden_BTE[row_B, position_B].float()


def _summarise(hidden_BTE: Tensor, text_mask_BT: Tensor, real_mask_BT: Tensor) -> Tensor:
    """Mean over the text, and first token: float32 ``[2, B, E]``.

    The mean of a sample without text is taken over its special tokens.
    """
    has_no_text = ~text_mask_BT.any(dim=1, keepdim=True)
    mask = text_mask_BT | (has_no_text & real_mask_BT)
    weight = mask.float() / mask.sum(dim=1, keepdim=True).clamp_min(1)
    mean = torch.einsum("bte,bt->be", hidden_BTE.float(), weight.to(hidden_BTE.device))
    return torch.stack([mean, hidden_BTE[:, 0].float()])
