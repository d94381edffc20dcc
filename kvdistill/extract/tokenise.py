"""Samples in a teacher's tokens, and batches of them.

Every token is mapped back to characters of the sample's own text. A token that stands for no
character (BOS, words of the prompt template) has segment -1 and an empty span; a token across two
segments belongs to the one that its first character is in. Batches are filled by token budget,
with samples of similar length, and padded on the right.

**Windows**: texts longer than a teacher's positions, read in overlapping windows and stitched.

    text     p a b c d e f g h i      p: special tokens at the beginning (BOS)
    windows  p a b c d                limit 5, overlap 2
             p     c d e f
             p           f g h i      the last one ends with the text
    from     0 0 0 0 0 1 1 2 2 2

Every window begins with the text's special tokens, which models expect there, and is read at
positions from 0; keys are stored before rotation, so those of all windows are alike. A token comes
from the first window that holds it, where it has at least ``overlap`` tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.attention.adapters import QKV
from kvdistill.attention.hooks import OnLayer
from kvdistill.attention.prompt_template import PLAIN_TEXT, PromptTemplate, RenderedPrompt
from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.types import SEGMENT_SPECIAL

Bos = Literal["keep", "add", "remove"]


@dataclass(frozen=True, eq=False)
class TokenisedSample:
    """One sample in one teacher's tokens. All arrays are ``[T]``."""

    token_ids: NDArray[np.int32]
    char_start: NDArray[np.int32]
    char_end: NDArray[np.int32]
    segment: NDArray[np.int8]
    source_ids: NDArray[np.int32] | None = None
    """Input of an encoder-decoder's encoder, where the other fields are its decoder's tokens."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens, special ones included."""
        return int(self.token_ids.shape[0])

    @property
    def max_tokens(self) -> int:
        """Number of tokens, or of the encoder's input where that is separate and longer."""
        return max(self.num_tokens, 0 if self.source_ids is None else len(self.source_ids))

    @staticmethod
    def empty() -> TokenisedSample:
        """A sample without tokens."""
        none = np.zeros(0, np.int32)
        return TokenisedSample(none, none, none, np.zeros(0, np.int8))

    def part(self, span: slice) -> TokenisedSample:
        """The tokens in ``span``, without the encoder's input."""
        start, end = self.char_start[span], self.char_end[span]
        return TokenisedSample(self.token_ids[span], start, end, self.segment[span])

    def with_first(self, token_id: int) -> TokenisedSample:
        """The same after a special token."""
        return replace(
            self,
            token_ids=np.insert(self.token_ids, 0, token_id),
            char_start=np.insert(self.char_start, 0, 0),
            char_end=np.insert(self.char_end, 0, 0),
            segment=np.insert(self.segment, 0, SEGMENT_SPECIAL),
        )


@dataclass(frozen=True, eq=False)
class PromptTokenizer:
    """A fast tokenizer, a prompt template, and the rules for special tokens."""

    tokenizer: Any
    template: PromptTemplate = PLAIN_TEXT
    add_special_tokens: bool = True
    """False where the prompt template is a chat template, which contains them."""
    bos: Bos = "keep"
    """Whether the begin-of-sequence token is made, or kept from being, the first token."""
    is_continued: bool = False
    """More text follows: the special tokens that the tokenizer adds at the end are dropped."""

    def tokenise(
        self, samples: Sequence[Sample], max_length: int | None = None
    ) -> list[TokenisedSample]:
        """Tokenise; ``max_length`` truncates and keeps the special tokens at the end.

        Raises:
            TeacherError: the tokenizer's offsets are wrong, or the prompt template does not fit a
                sample; names the sample.
        """
        if not samples:
            return []
        rendered = [self.template.render(sample) for sample in samples]
        limit = None if max_length is None else max_length - (self.bos == "add")
        output = self.tokenizer(
            [prompt.text for prompt in rendered],
            add_special_tokens=self.add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=limit is not None,
            max_length=limit,
            verbose=False,
        )
        offsets = [np.asarray(pairs, np.int32).reshape(-1, 2) for pairs in output["offset_mapping"]]
        rows = zip(output["input_ids"], offsets, rendered, samples, strict=True)
        return [self._read(*row) for row in rows]

    def _read(
        self, ids: list[int], offsets: NDArray[np.int32], prompt: RenderedPrompt, sample: Sample
    ) -> TokenisedSample:
        """One tokenised prompt under the rules for special tokens."""
        special = {*getattr(self.tokenizer, "all_special_ids", ())}
        stop = len(ids)
        while self.is_continued and stop > 1 and ids[stop - 1] in special:
            if offsets[stop - 1, 0] < offsets[stop - 1, 1]:
                break  # spelled out in the prompt template
            stop -= 1
        tokens = _map_back(ids[:stop], offsets[:stop], prompt, sample)
        # A template or a text may spell out what the tokenizer or the template adds.
        first, last = 0, stop - 1
        while (
            first < last and tokens.segment[first] < 0 and ids[first] == ids[first + 1] in special
        ):
            first += 1
        while first < last and tokens.segment[last] < 0 and ids[last] == ids[last - 1] in special:
            last -= 1
        return self._apply_bos(tokens.part(slice(first, last + 1)))

    def _apply_bos(self, tokens: TokenisedSample) -> TokenisedSample:
        if self.bos == "keep":
            return tokens
        bos = self.tokenizer.bos_token_id
        if bos is None:
            raise TeacherError(
                f"{type(self.tokenizer).__name__} has no begin-of-sequence token; set the "
                "teacher's `bos` to auto"
            )
        has_bos = tokens.num_tokens > 0 and int(tokens.token_ids[0]) == bos
        if has_bos == (self.bos == "add"):
            return tokens
        return tokens.with_first(bos) if self.bos == "add" else tokens.part(slice(1, None))


def _map_back(
    ids: Sequence[int], offsets: NDArray[np.int32], prompt: RenderedPrompt, sample: Sample
) -> TokenisedSample:
    starts = offsets[:, 0]
    _check_offsets(starts, offsets[:, 1], prompt, sample)
    char_start, char_end = prompt.characters(offsets).T
    is_special = char_start == char_end
    segment = np.where(is_special, SEGMENT_SPECIAL, sample.segments_at(char_start))
    # An empty span lies where the text before it ends, so that positions stay in order.
    before = np.maximum.accumulate(np.where(is_special, 0, char_end)) if len(starts) else char_end
    return TokenisedSample(
        np.asarray(ids, np.int32),
        np.where(is_special, before, char_start).astype(np.int32),
        np.where(is_special, before, char_end).astype(np.int32),
        segment.astype(np.int8),
    )


def _check_offsets(
    starts: NDArray[np.int32], ends: NDArray[np.int32], prompt: RenderedPrompt, sample: Sample
) -> None:
    length, is_text = len(prompt.text), starts < ends
    inside = bool((starts >= 0).all() and (starts <= ends).all() and (ends <= length).all())
    if not inside or bool((np.diff(starts[is_text]) < 0).any()):
        raise TeacherError(
            f"sample {sample.sample_id!r}: expected ascending token offsets in a text of {length} "
            f"characters, got {list(zip(starts.tolist(), ends.tolist(), strict=True))[:8]}; set "
            "the teacher's `tokenizer` to a fast tokenizer with correct offsets"
        )


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """Samples of a shard, right-padded to the longest of them."""

    sample_idx: tuple[int, ...]
    """Positions of the samples in their shard."""
    lengths: tuple[int, ...]
    input_ids: Tensor
    """``[B, T]`` long."""
    source_lengths: tuple[int, ...] = ()
    source_ids: Tensor | None = None
    """``[B, T_source]`` long: the encoder's input, where ``input_ids`` are the decoder's."""

    @property
    def real_mask(self) -> Tensor:
        """``[B, T]`` bool, True on real tokens."""
        return _length_mask(self.input_ids, self.lengths)

    @property
    def attention_mask(self) -> Tensor:
        """``[B, T]`` long, 1 on real tokens."""
        return self.real_mask.long()

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        """What the model reads: as its own text, or as the encoder's and the decoder's."""
        own = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.source_ids is None:
            return {**own}
        source = {"input_ids": self.source_ids, "attention_mask": self.source_mask}
        return source | {f"decoder_{name}": x for name, x in own.items()}

    @property
    def source_mask(self) -> Tensor | None:
        """``[B, T_source]`` long, 1 on real tokens of the encoder's input."""
        if self.source_ids is None:
            return None
        return _length_mask(self.source_ids, self.source_lengths).long()


def batch_by_tokens(
    lengths: Sequence[int], batch_tokens: int, padded_to: int | None = None
) -> Iterator[list[int]]:
    """Positions of samples per batch, longest first; at most ``batch_tokens`` with padding.

    Longest first, so that running out of memory happens at once and not after an hour. Samples
    without tokens are in no batch; one that exceeds the budget is a batch of its own. Samples of
    more than ``padded_to`` tokens share a batch with samples of their own length only.
    """
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        batch = order[start : start + max(1, batch_tokens // longest)]
        if padded_to is not None and longest > padded_to:
            batch = [i for i in batch if lengths[i] == longest]
        yield batch
        start += len(batch)


def collate_teacher_batch(
    tokenised: Sequence[TokenisedSample],
    sample_idx: Sequence[int],
    pad_id: int,
    device: torch.device,
) -> TeacherBatch:
    """Pad the chosen samples into one batch on ``device``."""
    chosen = [tokenised[i] for i in sample_idx]
    lengths, ids = _pad_right([sample.token_ids for sample in chosen], pad_id)
    sources = [sample.source_ids for sample in chosen if sample.source_ids is not None]
    if not sources:
        return TeacherBatch(tuple(sample_idx), lengths, ids.to(device))
    source_lengths, source_ids = _pad_right(sources, pad_id)
    return TeacherBatch(
        tuple(sample_idx), lengths, ids.to(device), source_lengths, source_ids.to(device)
    )


def _pad_right(rows: Sequence[NDArray[np.int32]], pad_id: int) -> tuple[tuple[int, ...], Tensor]:
    lengths = tuple(len(row) for row in rows)
    ids = np.full((len(rows), max(1, *lengths)), pad_id, np.int64)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = row
    return lengths, torch.from_numpy(ids)


def _length_mask(ids: Tensor, lengths: Sequence[int]) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device)
    return positions < torch.tensor(lengths, device=ids.device)[:, None]


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of one text, and where each of its tokens is taken from."""

    batch: TeacherBatch
    """All windows, equally long, as samples of one batch."""
    row_T: Tensor
    place_T: Tensor

    @staticmethod
    def of(sample: TokenisedSample, limit: int, overlap: int, device: torch.device) -> Windows:
        """Cut a text of more than ``limit`` tokens.

        Raises:
            TeacherError: special tokens and ``overlap`` leave no room for others.
        """
        num_first = int(np.argmax(np.append(sample.segment != SEGMENT_SPECIAL, True)))
        size, body = limit - num_first, sample.num_tokens - num_first
        if size <= overlap:
            raise TeacherError(
                f"windows of {limit} tokens begin with {num_first} special tokens and overlap by "
                f"{overlap}, which leaves none to advance by; lower extraction.window_overlap"
            )
        starts = np.append(np.arange(0, body - size, size - overlap), body - size)
        place_WT = np.concatenate(
            [
                np.broadcast_to(np.arange(num_first), (len(starts), num_first)),
                num_first + starts[:, None] + np.arange(size),
            ],
            axis=1,
        )
        row_T = np.zeros(sample.num_tokens, np.int64)
        row_T[num_first:] = np.searchsorted(starts + size, np.arange(body), side="right")
        place_T = np.arange(sample.num_tokens) - starts[row_T]
        place_T[:num_first] = np.arange(num_first)
        ids = torch.from_numpy(sample.token_ids[place_WT].astype(np.int64))
        batch = TeacherBatch(tuple(range(len(ids))), (limit,) * len(ids), ids.to(device))
        return Windows(batch, torch.from_numpy(row_T), torch.from_numpy(place_T))

    def stitch(self, x_WTE: Tensor) -> Tensor:
        """``[windows, limit, …]`` → ``[1, T, …]``."""
        rows, places = self.row_T.to(x_WTE.device), self.place_T.to(x_WTE.device)
        return x_WTE[rows, places][None]

    def find(self, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Window, and place in it, of some of the text's tokens."""
        return self.row_T[positions_B], self.place_T[positions_B]

    def run(self, model: Callable[[TeacherBatch, OnLayer], Tensor], on_layer: OnLayer) -> Tensor:
        """One pass over all windows, as if it were one over the text: final hidden ``[1, T, E]``.

        ``on_layer`` receives queries, keys and values ``[1, H, T, D]``.
        """

        def stitched(layer_idx: int, qkv: QKV) -> None:
            states = [self.stitch(x.transpose(1, 2)).transpose(1, 2) for x in qkv]
            on_layer(layer_idx, type(qkv)(*states))

        return self.stitch(model(self.batch, stitched))
