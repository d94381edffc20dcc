"""Collation for a latent student: question, answer, full text, and the teachers' rationales.

A batch is cut at the segments, because a latent student never reads question and answer as one
text. Which teacher tokens an eviction keeps is decided on the device; how many there are follows
from the segments, so the count that the loss is divided by is computed here.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.attention.padded_generation import pad_left
from kvdistill.attention.tokens import with_ends
from kvdistill.config.distill import LatentConfig
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import (
    Batch,
    Collate,
    Item,
    padded,
    padded_parts,
    student_batch,
    summaries,
    tokenize,
)
from kvdistill.distill.losses.pointwise import IGNORED_LABEL
from kvdistill.distill.student.build import prompt_ids, token_ids
from kvdistill.distill.targets import TeacherSpace
from kvdistill.errors import CorpusError
from kvdistill.store.shard import EncodedShard
from kvdistill.types import KINDS, SEGMENT_IDS


@dataclass(frozen=True, eq=False)
class LatentCollate(Collate):
    """Collates questions and answers together with the teachers' rationales."""

    latent: LatentConfig

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Collate samples into a batch.

        ``question_ids``, ``question_mask``   ``[B, Q]``, left-padded
        ``answer_ids``, ``answer_mask``       ``[B, A]``, right-padded, ending with EOS
        ``labels``         ``[B, 1 + A]``: labels of eot and the answer's tokens, shifted by one
        ``input_ids``, ``attention_mask``, ``rationale_labels``   ``[B, T]``: the full text, and
                           labels after the question; only with ``losses.rationale``
        ``task``           ``[B]``: task ids, 0 where a sample has none
        ``teachers``       per teacher ``key`` and ``value`` parts as stored, by group;
                           ``importance`` by group ``[B, L, H, T]``; ``rationale [B, T]``, tokens
                           that an eviction chooses from; ``covered [B, M]``, latents with a target;
                           ``seed [B]``; ``cue [B, L + 1, E]`` with ``losses.codi``

        Raises:
            CorpusError: a sample has no question or no answer.
        """
        samples = [item.sample for item in items]
        batch = self._student(samples)
        batch |= self.labels(samples)
        batch["teachers"] = {
            space.name: self._rationales(
                space, [item.shards[space.name] for item in items], samples
            )
            for space in self.teachers
        }
        return batch

    def longest(self, samples: Sequence[Sample]) -> int:
        """Positions of the longest sample: question, bot, latents, eot and answer."""
        batch = self._student(list(samples))
        tokens = batch["question_mask"].sum(1) + batch["answer_mask"].sum(1)
        return int(tokens.max()) + self.latent.positions + 2

    def _student(self, samples: list[Sample]) -> Batch:
        pad_id = self.tokenizer.pad_token_id or 0
        questions, answers = zip(*(question_and_answer(sample) for sample in samples), strict=True)
        prompts = [ids[-self.max_length :] for ids in prompt_ids(self.tokenizer, questions)]
        question_ids, question_mask = pad_left(prompts, pad_id)
        rows = [
            np.array(with_ends(self.tokenizer, ids, bos=False)[0][: self.max_length], np.int64)
            for ids in token_ids(self.tokenizer, answers)
        ]
        answer_ids = padded(rows, pad_id)
        answer_mask = padded([np.ones_like(ids) for ids in rows], 0).bool()
        labels = answer_ids.masked_fill(~answer_mask, IGNORED_LABEL)
        return {
            "question_ids": question_ids,
            "question_mask": question_mask,
            "answer_ids": answer_ids,
            "answer_mask": answer_mask,
            "labels": F.pad(labels, (1, 0), value=IGNORED_LABEL),
            **(self._full_text(samples, pad_id) if self.losses.rationale else {}),
        }

    def _full_text(self, samples: list[Sample], pad_id: int) -> Batch:
        """Question, rationale and answer as one text, with labels after the question."""
        tokens = tokenize(self.tokenizer, samples, self.max_length)
        batch = student_batch(tokens, pad_id)
        length = batch["input_ids"].shape[1]
        segment = padded([t.segment for t in tokens], -1, length)
        follows = (segment > SEGMENT_IDS["prompt"]).int().cummax(1).values.bool()
        labels = batch["labels"].masked_fill(~follows, IGNORED_LABEL)
        names = ("input_ids", "attention_mask")
        return {name: batch[name] for name in names} | {"rationale_labels": labels}

    def _rationales(
        self, space: TeacherSpace, rows: list[tuple[EncodedShard, int]], samples: list[Sample]
    ) -> Batch:
        segment = padded([shard.tokens.segment[shard.tokens.span(idx)] for shard, idx in rows], -1)
        rationale = segment == SEGMENT_IDS["rationale"]
        num_kept = rationale.sum(1, keepdim=True).clamp_max(self.latent.budget)
        keys = [f"{self.latent.eviction.seed} {sample.sample_id}" for sample in samples]
        batch: Batch = {
            "rationale": rationale,
            "length": torch.tensor([len(sh.tokens.segment[sh.tokens.span(i)]) for sh, i in rows]),
            "covered": torch.arange(self.latent.positions) < num_kept,
            "seed": torch.tensor([zlib.crc32(key.encode()) for key in keys]),
        }
        for kind in KINDS if self.losses.of_kv else ():
            batch[kind] = {
                group.prefix: padded_parts(rows, group.prefix, kind, space.codec)
                for group in space.groups
            }
        batch["importance"] = {
            group.prefix: _padded_importance(rows, f"{group.prefix}importance", segment.shape[1])
            for group in space.groups
            if f"{group.prefix}importance" in rows[0][0].arrays
        }
        if space.prototypes_KE is not None:
            batch["summary"] = summaries(rows)
        if space.likelihood is not None:
            batch["nats"] = space.likelihood(rows, None)
        if self.losses.codi:
            cues = [shard.arrays["hidden_at_cue"][:, idx] for shard, idx in rows]
            batch["cue"] = torch.from_numpy(np.stack(cues))
        return batch


def question_and_answer(sample: Sample) -> tuple[str, str]:
    """The text before the latents and the text after them.

    Raises:
        CorpusError: the sample has no prompt or no answer.
    """
    parts = dict(sample.segments)
    is_one_turn = len(parts) == len(sample.segments)
    if not (parts.get("prompt") and parts.get("answer") and is_one_turn):
        found = [name for name, _ in sample.segments][:9]
        raise CorpusError(
            f"sample {sample.sample_id!r}: expected a prompt and an answer, once, of a latent "
            f"student, got the segments {found}; use rows of prompt/rationale/answer"
        )
    return parts["prompt"], parts["answer"]


def _padded_importance(rows: list[tuple[EncodedShard, int]], name: str, length: int) -> Tensor:
    """Importance of every row, zero-padded: ``[B, L, H, T]`` float32."""
    pieces = [shard.arrays[name][:, :, shard.tokens.span(idx)] for shard, idx in rows]
    out = np.zeros((len(pieces), *pieces[0].shape[:2], length), np.float32)
    for row, piece in zip(out, pieces, strict=True):
        row[:, :, : piece.shape[2]] = piece
    return torch.from_numpy(out)
