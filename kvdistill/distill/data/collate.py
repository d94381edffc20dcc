"""Samples to one padded batch of tensors: the student's tokens, the teachers' codes, the bands.

Codes stay codes and are dequantised on the device: a quarter to a half of the bytes to move.
Alignment is computed here, on the CPU, from offsets alone, so the number of tokens that losses are
divided by is known before the step starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.attention.prompt_template import RenderedPrompt, own_prompt
from kvdistill.attention.tokens import with_ends
from kvdistill.config.distill import AlignmentConfig, LossConfig
from kvdistill.corpus.samples import Sample
from kvdistill.distill.align.character_iou import Spans, align_tokens
from kvdistill.distill.align.resample import align_global, align_segments
from kvdistill.distill.losses.pointwise import IGNORED_LABEL
from kvdistill.distill.student.injection import following
from kvdistill.distill.targets import TeacherSpace
from kvdistill.errors import CorpusError
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.shard import EncodedShard
from kvdistill.types import SEGMENT_IDS, SEGMENT_SPECIAL, CodecSpec, Kind

Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Item:
    """One sample of a batch: its text, and where it is in each teacher's shard."""

    sample: Sample
    shards: Mapping[str, tuple[EncodedShard, int]]
    """Per teacher: the shard, and the sample's index in it."""


@dataclass(frozen=True, eq=False)
class StudentTokens:
    """One sample tokenised for the student; all arrays are int64 ``[T]``.

    ``segment`` is -1 for tokens that stand for no character (BOS, EOS, a chat template's).
    """

    input_ids: NDArray[np.int64]
    char_start: NDArray[np.int64]
    char_end: NDArray[np.int64]
    segment: NDArray[np.int64]
    is_label: NDArray[np.bool_]
    """False for a chat template's tokens but the one after an answer, by which a turn ends."""


@dataclass(frozen=True, eq=False)
class Collate:
    """Makes batches. ``tokenizer`` is the student's; its ``pad_token_id`` pads input_ids."""

    tokenizer: Any
    max_length: int
    alignment: AlignmentConfig
    losses: LossConfig
    teachers: Sequence[TeacherSpace]
    tasks: Mapping[str, int]
    """Task ids from 1 on, by tag."""

    def __call__(self, items: Sequence[Item]) -> Batch:
        """A batch of tensors.

        ``input_ids``, ``attention_mask``, ``labels``  ``[B, T_s]`` (labels -100 where ignored)
        ``text_mask``   ``[B, T_s]``: True for tokens that stand for characters
        ``query_mask``  ``[B, T_s]``: what a router pools, the prompt or else the text
        ``inject_mask``, ``inject_labels``  ``[B, T_s]``: where KV is injected, what follows it
        ``task``        ``[B]``: task ids, 0 where a sample has none
        ``teacher``     ``[B]``, where a sample of the batch names its teacher: from 1 on, 0 where
                        it names none, -1 for a teacher that does not take part
        ``teachers``    per teacher the parts of each kind ``[B, L, H, T_t, D]`` as stored, by
                        group, the band ``start``, ``weight``, ``covered`` of the alignment,
                        and ``summary [B, E]`` where it is kept; ``nats`` per character
                        (``by_confidence.py``) for fusion by confidence; ``predictions``
                        (``vocabulary.py``) for ``losses.logits``
        """
        samples = [item.sample for item in items]
        tokens = tokenize(self.tokenizer, samples, self.max_length)
        batch = student_batch(tokens, self.tokenizer.pad_token_id or 0)
        length = batch["input_ids"].shape[1]
        spans = Spans(
            padded([t.char_start for t in tokens], 0, length),
            padded([t.char_end for t in tokens], 0, length),
            padded([t.segment for t in tokens], SEGMENT_SPECIAL, length),
            batch["text_mask"],
        )
        prompt = spans.segment == SEGMENT_IDS["prompt"]
        unlearned = prompt & torch.tensor(
            [[sample.chat or not self.losses.cross_entropy_prompt] for sample in samples]
        )
        batch["labels"] = batch["labels"].masked_fill(unlearned, IGNORED_LABEL)
        batch |= injection(spans, batch["labels"], self.losses)
        batch["query_mask"] = torch.where(prompt.any(1, keepdim=True), prompt, spans.mask)
        batch |= self.labels(samples)
        batch["teachers"] = {
            space.name: self._teacher(space, [item.shards[space.name] for item in items], spans)
            for space in self.teachers
        }
        return batch

    def labels(self, samples: Sequence[Sample]) -> Batch:
        """``task`` and ``teacher``."""
        batch: Batch = {"task": torch.tensor([self.tasks.get(s.task or "", 0) for s in samples])}
        if any(sample.teacher for sample in samples):
            number = {None: 0} | {space.name: i for i, space in enumerate(self.teachers, start=1)}
            batch["teacher"] = torch.tensor([number.get(s.teacher, -1) for s in samples])
        return batch

    def without_weight(self, batch: Batch) -> Batch:
        """The same batch with nothing in it that a loss counts.

        A rank without a sample in an epoch's last batch still has to take part in the step.
        """
        teachers = {
            name: {**teacher, "covered": torch.zeros_like(teacher["covered"])}
            for name, teacher in batch["teachers"].items()
        }
        ignored: Batch = {
            name: torch.full_like(batch[name], IGNORED_LABEL)
            for name in batch.keys() & {"labels", "inject_labels", "rationale_labels"}
        }
        return {**batch, **ignored, "teachers": teachers}

    def _teacher(
        self, space: TeacherSpace, rows: list[tuple[EncodedShard, int]], student: Spans
    ) -> Batch:
        tables = [(shard.tokens, shard.tokens.span(idx)) for shard, idx in rows]
        segment = padded([table.segment[span] for table, span in tables], SEGMENT_SPECIAL)
        teacher = Spans(
            padded([table.char_start[span] for table, span in tables], 0),
            padded([table.char_end[span] for table, span in tables], 0),
            segment,
            segment >= 0,
        )
        match self.alignment.time:
            case "segments":
                band = align_segments(student, teacher)
            case "global":
                band = align_global(student.mask, teacher.mask)
            case _:
                method, causal = self.alignment.tokens, self.alignment.causal
                band = align_tokens(student, teacher, method, causal)
        batch: Batch = {"start": band.start, "weight": band.weight, "covered": band.covered}
        for kind in self.losses.kinds:
            batch[kind] = {
                group.prefix: padded_parts(rows, group.prefix, kind, space.codec)
                for group in space.groups
            }
        if space.prototypes_KE is not None:
            batch["summary"] = summaries(rows)
        if space.likelihood is not None:
            batch["nats"] = space.likelihood(rows, student)
        if space.vocabulary is not None:
            batch["predictions"] = space.vocabulary.predictions(rows, student, teacher)
        return batch


def tokenize(tokenizer: Any, samples: Sequence[Sample], max_length: int) -> list[StudentTokens]:
    """Tokenise whole texts as ``BOS text EOS``, or in a chat template of their own, truncated.

    Args:
        tokenizer: a fast tokenizer; see ``with_ends`` and ``own_prompt``.
        samples: texts; an empty one gives only the special tokens.
        max_length: tokens kept per sample, special ones included. A truncated text loses its EOS,
            since it does not end there.
    """
    prompts = [own_prompt(tokenizer, sample) for sample in samples]
    encoded = tokenizer(
        [(prompt or sample).text for prompt, sample in zip(prompts, samples, strict=True)],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    rows = zip(samples, prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [_student_tokens(tokenizer, *row, limit=max_length) for row in rows]


def require_text(tokenizer: Any, samples: Sequence[Sample], max_length: int) -> None:
    """Raise CorpusError where no text has a token to predict: nothing to learn or to score."""
    for start in range(0, len(samples), 64):  # the first few decide, unless all are empty
        some = samples[start : start + 64]
        pairs = zip(some, tokenize(tokenizer, some, max_length), strict=True)
        if any(scored_tokens(*pair)[1:].any() for pair in pairs):
            return
    raise CorpusError(
        f"none of the {len(samples)} texts from {samples[0].sample_id!r} on has a token to predict "
        f"within {max_length} tokens; raise the maximum length, or give other texts"
    )


def scored_tokens(sample: Sample, tokens: StudentTokens) -> NDArray[np.int64]:
    """1 for tokens of text whose likelihood counts, ``[T]``: of a conversation the assistant's."""
    is_prompt = sample.chat & (tokens.segment == SEGMENT_IDS["prompt"])
    return np.asarray((tokens.segment >= 0) & ~is_prompt, np.int64)


def _student_tokens(
    tokenizer: Any,
    sample: Sample,
    prompt: RenderedPrompt | None,
    ids: list[int],
    offsets: list[tuple[int, int]],
    *,
    limit: int,
) -> StudentTokens:
    whole, num_before = (ids, 0) if prompt else with_ends(tokenizer, ids)
    text = slice(num_before, num_before + len(ids))
    spans = np.zeros((len(whole), 2), np.int64)
    spans[text] = np.reshape(offsets, (-1, 2))
    if prompt:
        spans = prompt.characters(spans)
    char_start, char_end = spans.T
    segment = np.full(len(whole), SEGMENT_SPECIAL, np.int64)
    segment[text] = sample.segments_at(char_start[text])
    is_label = np.ones(len(whole), bool)
    if prompt:
        segment[char_start == char_end] = SEGMENT_SPECIAL
        before = np.append(SEGMENT_SPECIAL, segment[:-1])
        is_label = (segment >= 0) | (before > SEGMENT_IDS["prompt"])
    kept = slice(limit)
    columns = np.array(whole, np.int64)[kept], char_start[kept], char_end[kept], segment[kept]
    return StudentTokens(*columns, is_label[kept])


def token_counts(tokenizer: Any, samples: Sequence[Sample], max_length: int) -> NDArray[np.int64]:
    """Tokens of every sample as ``tokenize`` gives them: ``[N]``. Costs a pass over the texts."""
    counts, per_call = [], 1000  # a call spreads its texts over the cores
    for start in range(0, len(samples), per_call):
        some = samples[start : start + per_call]
        counts += [len(tokens.input_ids) for tokens in tokenize(tokenizer, some, max_length)]
    return np.array(counts, np.int64)


def student_batch(tokens: Sequence[StudentTokens], pad_id: int) -> Batch:
    """Right-padded student tensors of a batch, without teachers."""
    # A row without a single token would leave attention nothing to attend to.
    longest = max((len(t.input_ids) for t in tokens), default=1) or 1
    input_ids = padded([t.input_ids for t in tokens], pad_id, longest)
    present = padded([np.ones_like(t.input_ids) for t in tokens], 0, longest).bool()
    segment = padded([t.segment for t in tokens], SEGMENT_SPECIAL, longest)
    labels = [t.is_label for t in tokens]
    attention_mask = present.clone()
    attention_mask[:, 0] = True
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask.long(),
        "labels": input_ids.masked_fill(~padded(labels, 0, longest).bool(), IGNORED_LABEL),
        "text_mask": segment >= 0,
    }


def injection(student: Spans, labels: Tensor, losses: LossConfig) -> Batch:
    """Where a fused KV is injected (``inject_mask``), and the labels after it (``inject_labels``).

    On the configured segments; on the first ``inject_fraction`` of a sample that has none of them.
    """
    wanted = torch.tensor([SEGMENT_IDS[name] for name in losses.inject_segments])
    named = torch.isin(student.segment, wanted) & student.mask
    rank = student.mask.long().cumsum(1)
    first = student.mask & (rank <= (losses.inject_fraction * rank[:, -1:]).long())
    mask = torch.where(named.any(1, keepdim=True), named, first)
    after = following(mask, labels != IGNORED_LABEL)
    return {"inject_mask": mask, "inject_labels": labels.masked_fill(~after, IGNORED_LABEL)}


def padded(arrays: Sequence[np.ndarray], fill: int, length: int | None = None) -> Tensor:
    """Stack ragged 1-D integer arrays to ``[B, T]`` long."""
    if length is None:
        length = max((len(array) for array in arrays), default=0)
    out = np.full((len(arrays), length), fill, np.int64)
    for row, array in enumerate(arrays):
        out[row, : len(array)] = array
    return torch.from_numpy(out)


def summaries(rows: list[tuple[EncodedShard, int]]) -> Tensor:
    """The teacher's mean hidden state of every sample, ``[B, E]``."""
    means = [shard.arrays["hidden_summary"][0, idx] for shard, idx in rows]
    return torch.from_numpy(np.stack(means))


def padded_parts(
    rows: list[tuple[EncodedShard, int]], prefix: str, kind: Kind, spec: CodecSpec
) -> dict[str, Tensor]:
    """Codes and scales of one kind, padded with zeros to ``[B, L, H, T or blocks, width]``.

    Quantisation blocks restart at every sample, so block ``t // 64`` is valid in a padded row too.
    """
    codec = CODECS[getattr(spec, kind)]
    out = {}
    for part in codec.parts(kind):
        name = part_name(f"{prefix}{kind}", part.suffix)
        pieces = [
            shard.arrays[name][:, :, shard.tokens.span_of(part.per, idx)] for shard, idx in rows
        ]
        num_layers, num_heads, _, width = pieces[0].shape
        longest = max(piece.shape[2] for piece in pieces)
        stacked = np.zeros((len(pieces), num_layers, num_heads, longest, width), pieces[0].dtype)
        for row, piece in zip(stacked, pieces, strict=True):
            row[:, :, : piece.shape[2]] = piece
        out[part.suffix] = torch.from_numpy(stacked)
    return out
