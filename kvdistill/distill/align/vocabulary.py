"""What a teacher predicted, in terms of the student's tokens: where, and as which words.

Where: a prediction belongs to the place in the text at which its token starts, so a teacher's and
a student's are of the same thing where tokens of both start at one character. Which: tokens are the
same that stand for the same text (exact matching, FuseLLM, arXiv 2401.10491). What a teacher's
token has no counterpart for joins the mass of all others, so nothing is invented.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from kvdistill.attention.tokens import num_token_ids
from kvdistill.distill.align.character_iou import Spans, exact
from kvdistill.store.shard import EncodedShard

UNREADABLE: Final = "\ufffd"
"""In the text of a token that is a part of a character."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Where a teacher's token ids are in the student's vocabulary."""

    student_id_V: Tensor
    """Long; -1 for a token that the student does not have."""
    is_shared: bool
    """Whether both have one vocabulary."""
    num_logits: int | None = None
    """Most likely tokens that are read; all that are stored if not given."""

    def predictions(
        self, rows: Sequence[tuple[EncodedShard, int]], student: Spans, teacher: Spans
    ) -> dict[str, Tensor]:
        """What the teacher predicted at the student's tokens, from stored ``logits``.

        Returns:
            ``ids [B, T_s, k]`` (long, of the student; -1 where it has no such token), their
            ``logprob``, and ``rest [B, T_s]``, the log of the others' mass, both float32; and
            ``mask [B, T_s]``: where there is any. A text's first token is left out unless
            vocabularies are shared, since some tokenizers put a space before it.
        """
        length = teacher.mask.shape[1]
        ids = _padded(rows, "top_ids", length, -1).long()
        logprob, rest = (_padded(rows, x, length, 0) for x in ("top_logprobs", "rest_logprob"))
        index, mask = starts_together(student, teacher)
        if not self.is_shared:
            mask &= student.char_start > 0
        place = index[..., None].expand(-1, -1, ids.shape[2])
        ids, logprob = (x.gather(1, place) for x in (ids, logprob))
        ids = torch.where(ids >= 0, self.student_id_V[ids.clamp_min(0)], -1)
        rest = rest.gather(1, index)
        # They were rounded to float16, so they do not sum to one.
        whole = torch.logaddexp(logprob.logsumexp(-1), rest)
        logprob, rest = logprob - whole[..., None], rest - whole
        known = (ids >= 0) & mask[..., None]
        if self.num_logits is not None:
            known[..., self.num_logits :] = False
        unknown = torch.where(known, -torch.inf, logprob).logsumexp(-1)
        return {
            "ids": torch.where(known, ids, -1)[..., : self.num_logits],
            "logprob": torch.where(known, logprob, 0.0)[..., : self.num_logits],
            "rest": torch.logaddexp(rest, unknown),
            "mask": known.any(-1),
        }


def _padded(rows: Sequence[tuple[EncodedShard, int]], name: str, length: int, fill: int) -> Tensor:
    """Predictions of a batch, ``[B, T_t, …]``; float16 becomes float32."""
    found = [shard.arrays[name][shard.tokens.span(idx)] for shard, idx in rows]
    dtype = np.int64 if name == "top_ids" else np.float32
    out = np.full((len(found), length, *found[0].shape[1:]), fill, dtype)
    for row, own in zip(out, found, strict=True):
        row[: len(own)] = own
    return torch.from_numpy(np.nan_to_num(out, copy=False))


_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")


def starts_together(student: Spans, teacher: Spans) -> tuple[Tensor, Tensor]:
    """The teacher's token that starts where a student's token does: index and mask ``[B, T_s]``."""
    rows, columns = exact(student), exact(teacher)
    if not teacher.mask.shape[1]:
        return torch.zeros_like(student.char_start), torch.zeros_like(student.mask)
    # The last of equals: a masked token has the start of the next real one.
    found = torch.searchsorted(columns.sorted_lower, rows.lower.contiguous(), right=True) - 1
    index = found.clamp_min(0)
    same = columns.lower.gather(1, index) == rows.lower
    return index, same & columns.real.gather(1, index) & rows.real & (found >= 0)


def vocabulary_between(teacher: Any, student: Any) -> Vocabulary:
    """Pair the tokens of two tokenizers that stand for the same text.

    Special tokens, and parts of a character, are paired only where the vocabularies are the same.
    A token has at most one counterpart, or its probability would count twice.
    """
    if teacher.get_vocab() == student.get_vocab():
        return Vocabulary(torch.arange(num_token_ids(student)), is_shared=True)
    theirs, ours = _ids_by_text(teacher), _ids_by_text(student)
    student_id_V = torch.full((num_token_ids(teacher),), -1)
    common = theirs.keys() & ours.keys()
    student_id_V[[theirs[text] for text in common]] = torch.tensor([ours[text] for text in common])
    return Vocabulary(student_id_V, is_shared=False)


def _ids_by_text(tokenizer: Any) -> dict[str, int]:
    """The token id of every text that one token stands for, inside a text.

    Decoded behind another token, because decoders strip a leading space. Of several, bytes such as
    ``<0x2C>``, which only write what has no other token, come last.
    """
    backend, special = tokenizer.backend_tokenizer, {*tokenizer.all_special_ids}
    tokens = {i: backend.id_to_token(i) or "" for i in range(num_token_ids(tokenizer))}
    ids = sorted(tokens.keys() - special, key=lambda i: (bool(_BYTE.fullmatch(tokens[i])), i))
    texts = [tokens[i] for i in ids]
    if backend.decoder is not None:
        anchor = backend.encode("a", add_special_tokens=False).ids[-1]
        before = backend.decode([anchor])
        pairs = backend.decode_batch([[anchor, i] for i in ids], skip_special_tokens=False)
        texts = [pair.removeprefix(before) for pair in pairs]
    found: dict[str, int] = {}
    for idx, text in zip(ids, texts, strict=True):
        if text and UNREADABLE not in text:
            found.setdefault(text, idx)
    return found
