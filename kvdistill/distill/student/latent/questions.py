"""Samples to a batch for a latent student: question, answer, words, and the teacher's rationale.

What a batch holds beside an ordinary one's ``teachers`` is cut at the segments: a latent student
never reads question and answer as one text. Which teacher tokens latents learn from is decided on
the device; how many there will be follows from the segments alone, so the count that the loss is
divided by is known here.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvdistill.attention.padded_generation import pad_left
from kvdistill.config.distill import LatentConfig
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import (
    Batch,
    Collate,
    Item,
    padded,
    padded_parts,
    student_batch,
    tokenize,
)
from kvdistill.distill.losses.pointwise import IGNORED_LABEL
from kvdistill.distill.targets import TeacherSpace
from kvdistill.errors import CorpusError
from kvdistill.store.shard import EncodedShard
from kvdistill.types import KINDS, SEGMENT_IDS


@dataclass(frozen=True, eq=False)
class LatentCollate(Collate):
    """Makes batches of questions and answers with the teachers' rationales beside them."""

    latent: LatentConfig

    def __call__(self, items: Sequence[Item]) -> Batch:
        """A batch of tensors.

        ``question_ids``, ``question_mask``   ``[B, Q]``, padded on the left
        ``answer_ids``, ``answer_mask``       ``[B, A]``, padded on the right, ending with EOS
        ``labels``         ``[B, 1 + A]``: what eot and the answer's tokens predict, shifted by one
        ``input_ids``, ``attention_mask``, ``rationale_labels``   ``[B, T]``: the whole text, and
                           the labels of what follows the question
        ``task``           ``[B]``: task ids, 0 where a sample has none
        ``teachers``       per teacher ``key`` and ``value`` parts as stored, by group;
                           ``importance`` by group ``[B, L, H, T]``; ``rationale [B, T]``, the
                           tokens to choose from; ``covered [B, M]``, latents that get one;
                           ``seed [B]``; ``cue [B, L + 1, E]`` where the loss needs it

        Raises:
            CorpusError: a sample has no question or no answer.
        """
        samples = [item.sample for item in items]
        batch = self._student(samples)
        batch["task"] = torch.tensor([self.tasks.get(s.task or "", 0) for s in samples])
        batch["teachers"] = {
            space.name: self._rationales(
                space, [item.shards[space.name] for item in items], samples
            )
            for space in self.teachers
        }
        return batch

    def without_weight(self, batch: Batch) -> Batch:
        """The same batch with nothing in it that a loss counts."""
        teachers = {
            name: {**teacher, "covered": torch.zeros_like(teacher["covered"])}
            for name, teacher in batch["teachers"].items()
        }
        ignored = {
            name: torch.full_like(batch[name], IGNORED_LABEL)
            for name in ("labels", "rationale_labels")
        }
        return {**batch, **ignored, "teachers": teachers}

    def _student(self, samples: list[Sample]) -> Batch:
        pad_id = self.tokenizer.pad_token_id or 0
        questions, answers = zip(*(question_and_answer(sample) for sample in samples), strict=True)
        before, after = (
            [] if token is None else [token]
            for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        )
        asked = [before + ids for ids in self._ids(questions)]
        question_ids, question_mask = pad_left([ids[-self.max_length :] for ids in asked], pad_id)
        given = [np.array((ids + after)[: self.max_length], np.int64) for ids in self._ids(answers)]
        answer_ids = padded(given, pad_id)
        answer_mask = padded([np.ones_like(ids) for ids in given], 0).bool()
        labels = torch.cat(
            [
                torch.full_like(answer_ids[:, :1], IGNORED_LABEL),
                answer_ids.masked_fill(~answer_mask, IGNORED_LABEL),
            ],
            dim=1,
        )
        return {
            "question_ids": question_ids,
            "question_mask": question_mask,
            "answer_ids": answer_ids,
            "answer_mask": answer_mask,
            "labels": labels,
            **(self._words(samples, pad_id) if self.losses.rationale else {}),
        }

    def _words(self, samples: list[Sample], pad_id: int) -> Batch:
        """The whole texts, with labels on what follows the question."""
        tokens = tokenize(self.tokenizer, samples, self.max_length)
        batch = student_batch(tokens, pad_id)
        length = batch["input_ids"].shape[1]
        segment = padded([t.segment for t in tokens], -1, length)
        follows = (segment > SEGMENT_IDS["prompt"]).int().cummax(1).values.bool()
        labels = batch["labels"].masked_fill(~follows, IGNORED_LABEL)
        names = ("input_ids", "attention_mask")
        return {name: batch[name] for name in names} | {"rationale_labels": labels}

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _rationales(
        self, space: TeacherSpace, rows: list[tuple[EncodedShard, int]], samples: list[Sample]
    ) -> Batch:
        segment = padded([shard.tokens.segment[shard.tokens.span(idx)] for shard, idx in rows], -1)
        rationale = segment == SEGMENT_IDS["rationale"]
        num_kept = rationale.sum(1, keepdim=True).clamp_max(self.latent.budget)
        batch: Batch = {
            "rationale": rationale,
            "covered": torch.arange(self.latent.positions) < num_kept,
            "seed": torch.tensor([self._seed(sample) for sample in samples]),
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
        if self.losses.codi:
            cues = [shard.arrays["hidden_at_cue"][:, idx] for shard, idx in rows]
            batch["cue"] = torch.from_numpy(np.stack(cues))
        return batch

    def _seed(self, sample: Sample) -> int:
        return zlib.crc32(f"{self.latent.eviction.seed} {sample.sample_id}".encode())


def question_and_answer(sample: Sample) -> tuple[str, str]:
    """The text before the latents and the text after them.

    Raises:
        CorpusError: the sample has no prompt or no answer.
    """
    parts = dict(sample.segments)
    if not parts.get("prompt") or not parts.get("answer"):
        raise CorpusError(
            f"sample {sample.sample_id!r} has the segments {sorted(parts)}; a latent student needs "
            "a prompt and an answer, and a rationale to learn from"
        )
    return parts["prompt"], parts["answer"]


def _padded_importance(
    rows: list[tuple[EncodedShard, int]], name: str, length: int
) -> torch.Tensor:
    """Importance of every row, padded with zeros: ``[B, L, H, T]`` float32."""
    pieces = [shard.arrays[name][:, :, shard.tokens.span(idx)] for shard, idx in rows]
    out = np.zeros((len(pieces), *pieces[0].shape[:2], length), np.float32)
    for row, piece in enumerate(pieces):
        out[row, :, :, : piece.shape[2]] = piece
    return torch.from_numpy(out)
