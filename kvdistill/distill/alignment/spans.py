"""Character spans of tokens, made exact where several tokens share one character.

A byte-level tokenizer may cut ``é`` into two tokens, and both then report the whole character.
Taken as they are, such spans overlap their neighbours and no tokenizer would align with itself.
Here the tokens that share a stretch of text divide it, in order: they become ``[i, i + 1/2)``
and ``[i + 1/2, i + 1)``. Spans of one text are then disjoint and ordered, which is all that a
``searchsorted`` needs. Counting is by ``searchsorted`` too, so nothing loops over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from kvdistill.errors import GeometryError


@dataclass(frozen=True)
class Spans:
    """Where the tokens of a padded batch lie in their texts; all tensors are ``[B, T]``.

    ``char_start``, ``char_end`` (long) index the sample's text, ``segment`` (long) is a segment
    id of ``types.py``, ``mask`` (bool) is True for a token that stands for text: special tokens,
    templates and padding are False, and their offsets are never looked at.
    """

    char_start: Tensor
    char_end: Tensor
    segment: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        if len(set(shapes.values())) != 1 or self.mask.dim() != 2:
            raise GeometryError(f"spans: expected four tensors of one shape [B, T], got {shapes}")

    def to(self, device: torch.device | str) -> Self:
        """The same spans on another device."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))

    @property
    def real(self) -> Tensor:
        """Tokens that stand for at least one character, ``[B, T]`` bool."""
        return self.mask & (self.char_end > self.char_start)


@dataclass(frozen=True)
class ExactSpans:
    """Disjoint spans in float32, ``[B, T]``; see ``exact``.

    ``sorted_lower`` and ``sorted_upper`` equal ``lower`` and ``upper`` on real tokens and are
    filled in between so that both rise along T and no masked token is found by a search.
    """

    lower: Tensor
    upper: Tensor
    real: Tensor
    sorted_lower: Tensor
    sorted_upper: Tensor


def exact(spans: Spans) -> ExactSpans:
    """Split every shared stretch of text evenly between the tokens that share it, in order.

    float32 holds offsets exactly up to 16.7 million characters; the thirds of a character
    become coarse beyond a hundred thousand, but stay ordered.
    """
    real = spans.real
    starts, ends = _rising(spans.char_start, spans.char_end, real)
    rank = real.long().cumsum(1)
    begin = spans.char_start.masked_fill(~real, 0)
    final = (spans.char_end - 1).masked_fill(~real, 0)
    end = final + 1

    earlier, sharing, first, _ = _sharing(begin, starts, ends, rank)
    shared_until = ends.gather(1, first)
    lower = begin + (shared_until - begin) * ((rank - 1 - earlier).float() / sharing)

    earlier, sharing, _, last = _sharing(final, starts, ends, rank)
    shared_from = starts.gather(1, last)
    upper = shared_from + (end - shared_from) * ((rank - earlier).float() / sharing)

    sorted_lower, _ = _rising(lower, upper, real)
    following = torch.nn.functional.pad(sorted_lower[:, 1:], (0, 1), value=torch.inf)
    upper = torch.minimum(upper, following)
    _, sorted_upper = _rising(lower, upper, real)
    return ExactSpans(lower, upper, real, sorted_lower, sorted_upper)


def _rising(lower: Tensor, upper: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Fill masked tokens: as starts, with the next real start; as ends, with the last real end."""
    beyond = torch.inf if lower.is_floating_point() else torch.iinfo(lower.dtype).max
    starts = lower.masked_fill(~real, beyond).flip(1).cummin(1).values.flip(1)
    ends = upper.masked_fill(~real, -1).cummax(1).values
    return starts.contiguous(), ends.contiguous()


def _sharing(
    char: Tensor, starts: Tensor, ends: Tensor, rank: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Who covers a character: real tokens that ended before it, tokens on it, first, last."""
    counts = torch.nn.functional.pad(rank, (1, 0))
    first = torch.searchsorted(ends, char, right=True)
    after = torch.searchsorted(starts, char, right=True)
    earlier = counts.gather(1, first)
    sharing = (counts.gather(1, after) - earlier).clamp_min(1)
    top = max(char.shape[1] - 1, 0)
    return earlier, sharing, first.clamp_max(top), (after - 1).clamp(0, top)
