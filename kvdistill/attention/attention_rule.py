"""What a layer's attention computes from its queries and keys, as measured on the model in hand.

    P = softmax( cap(scaling · R(q) · R(k)) + bias )   over visible keys and a sink, if there is one

``R`` is the layer's rotary embedding, ``cap(s) = c · tanh(s / c)`` (Gemma 2), ``bias`` depends on
positions (ALiBi, T5), a *sink* is a learned score that takes a share of every query and belongs to
no key (gpt-oss). Visible are keys by causality and by a sliding window or a chunk. Importance
(``attention/importance.py``) and ``losses.attention_kl`` both compute with this one description,
and ``AttentionRule.error`` is its largest error in a probability of the model's own attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kvdistill.attention.rotary import rotate
from kvdistill.store.manifest import RotarySpec

ATTENTION_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest error in a probability that the rounding of a model's own attention explains."""
LONG: Final = 2**20
"""Length of the text on which a mask's window or chunk is read."""


class PositionBias(Protocol):
    """A bias on scores by query head and positions."""

    def __call__(self, query_idx: Tensor, key_idx: Tensor, length: int) -> Tensor:
        """``[..., HQ, Q, K]`` float32 of positions ``[..., Q]`` and ``[K]`` in a text of a length.

        Exact up to a constant per query, which a softmax does not see.
        """
        ...


@dataclass(frozen=True, eq=False)
class LinearBias:
    """ALiBi (arXiv 2108.12409): a slope per query head times the distance."""

    slopes: tuple[float, ...]

    def __call__(self, query_idx: Tensor, key_idx: Tensor, length: int) -> Tensor:
        """See ``PositionBias``."""
        slopes = torch.tensor(self.slopes, device=key_idx.device)
        distance = (key_idx - query_idx[..., None]).float()
        return slopes[:, None, None] * distance[..., None, :, :]


@dataclass(frozen=True, eq=False)
class OwnBias:
    """The attention module's own ``compute_bias`` (T5)."""

    attention: Any

    def __call__(self, query_idx: Tensor, key_idx: Tensor, length: int) -> Tensor:
        """See ``PositionBias``."""
        bias_HTT = self.attention.compute_bias(length, length, device=key_idx.device)[0].float()
        picked: Tensor = bias_HTT[:, query_idx][..., key_idx]
        return picked.movedim(0, -3)


class MaskRule(NamedTuple):
    """Which keys a query sees."""

    causal: bool
    sliding_window: int | None = None
    """A query sees keys at distances below this."""
    chunk_size: int | None = None
    """A query sees the keys of its own chunk of this many tokens (Llama 4)."""

    def visible(self, query_idx: Tensor, key_idx: Tensor) -> Tensor:
        """Bool ``[..., Q, K]`` of positions ``[..., Q]`` and ``[K]``."""
        query = query_idx[..., None]
        seen = key_idx <= query if self.causal else torch.ones_like(key_idx - query).bool()
        if self.sliding_window is not None:
            seen = seen & ((query - key_idx).abs() < self.sliding_window)
        if self.chunk_size is not None:
            seen = seen & (query // self.chunk_size == key_idx // self.chunk_size)
        return seen


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionRule:
    """The settings of one layer's attention."""

    rotary: RotarySpec | None
    scaling: float
    """Factor between ``q · k`` of the tapped queries and keys and the attention's scores."""
    mask: MaskRule
    softcap: float | None = None
    """``c`` where scores are soft-capped to ``c · tanh(score / c)`` (Gemma 2)."""
    bias: PositionBias | None = None
    sinks: str | None = None
    """Name of the attention module's parameter that holds a sink's score per query head."""
    attention_error: float = float("inf")
    """Largest error in a probability of the model's own attention; infinite if not observed."""

    def rotated(self, x: Tensor, position_idx: Tensor, length: int) -> Tensor:
        """Queries or keys ``[B, H, T, D]`` as attention multiplies them, in float32."""
        if self.rotary is None:
            return x.float()
        return rotate(x, position_idx, self.rotary, length)

    def scores(
        self, query_BQTD: Tensor, key_BHTD: Tensor, query_idx: Tensor, key_idx: Tensor, length: int
    ) -> Tensor:
        """Scores ``[B, H, G, Tq, Tk]`` of *rotated* queries and keys, before the mask; float32.

        Positions are ``[Tq]`` or ``[B, Tq]``, and ``[Tk]``, in a text of ``length`` tokens.
        """
        groups = (key_BHTD.shape[1], -1)
        query = query_BQTD.float().unflatten(1, groups) * self.scaling  # type: ignore[no-untyped-call]
        with torch.autocast(query.device.type, enabled=False):
            scores: Tensor = query @ key_BHTD.float().unsqueeze(2).mT
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        if self.bias is not None:
            bias = self.bias(query_idx, key_idx, length)
            scores = scores + bias.unflatten(-3, groups)  # type: ignore[no-untyped-call]
        return scores


def with_sink(scores: Tensor, visible: Tensor, sinks_Q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Append a sink as a last key that every query sees; without sinks, the arguments.

    ``scores`` are ``[B, H, G, Tq, Tk]``, ``visible`` broadcasts against them.
    """
    if sinks_Q is None:
        return scores, visible
    sink = sinks_Q.float().reshape(*scores.shape[1:3], 1, 1).expand(*scores.shape[:4], 1)
    return torch.cat([scores, sink], -1), nn.functional.pad(visible, (0, 1), value=True)


def attention_output(
    rule: AttentionRule, query: Tensor, key: Tensor, value: Tensor, sinks_Q: Tensor | None
) -> Tensor:
    """Attention's output by KV head, ``[B, H, G, Tq, D]``, before the output projection.

    Queries ``[B, H·G, Tq, D]``, keys and values ``[B, H, Tk, D]`` are from position 0, unrotated.
    """
    length = key.shape[2]
    query, key = (
        rule.rotated(x, torch.arange(x.shape[2], device=x.device), length) for x in (query, key)
    )
    shares = probabilities(rule, query, key, sinks_Q).unflatten(1, (key.shape[1], -1))  # type: ignore[no-untyped-call]
    output: Tensor = shares @ value.float()[:, :, None]
    return output


def probabilities(
    rule: AttentionRule, query: Tensor, key: Tensor, sinks_Q: Tensor | None
) -> Tensor:
    """Attention ``[B, HQ, Tq, Tk]`` of *rotated* queries and keys from position 0, less a sink."""
    query_idx, key_idx = (torch.arange(x.shape[2], device=key.device) for x in (query, key))
    scores = rule.scores(query, key, query_idx, key_idx, len(key_idx))
    visible = rule.mask.visible(query_idx, key_idx)[None, None, None]
    scores, visible = with_sink(scores, visible, sinks_Q if rule.sinks else None)
    shares = scores.masked_fill(~visible, -torch.inf).softmax(-1).flatten(1, 2)
    return shares[..., : len(key_idx)]


def fit_rule(
    rules: Sequence[AttentionRule],
    query: Tensor,
    key: Tensor,
    weights: Tensor | None,
    *,
    sinks_Q: Tensor | None,
    biases: Sequence[PositionBias],
) -> AttentionRule:
    """The rule, with a bias if it needs one, that best gives a model's own attention ``weights``.

    Queries ``[1, HQ, Tq, D]`` and keys are rotated. ``biases`` are tried on every rule, and ALiBi.
    """
    if weights is None:
        return rules[0]
    found: list[AttentionRule] = []
    for rule in rules:
        plain = _with_error(rule, query, key, weights, sinks_Q)
        if plain.attention_error < ATTENTION_TOLERANCE[torch.float32]:
            return plain
        found.append(plain)
        for bias in (*biases, _fitted_alibi(rule, query, key, weights)):
            biased = replace(rule, bias=bias)
            found.append(_with_error(biased, query, key, weights, sinks_Q))
    return min(found, key=lambda rule: rule.attention_error)


def _with_error(
    rule: AttentionRule, query: Tensor, key: Tensor, weights: Tensor, sinks_Q: Tensor | None
) -> AttentionRule:
    expected = probabilities(rule, query, key, sinks_Q)
    if expected.shape != weights.shape:
        return rule
    error = float((expected - weights.float()).detach().abs().max())
    return replace(rule, attention_error=float("inf") if math.isnan(error) else error)


def _fitted_alibi(rule: AttentionRule, query: Tensor, key: Tensor, weights: Tensor) -> LinearBias:
    """Slopes by least squares: what scores leave unexplained of the logarithm of the weights."""
    query_idx, key_idx = (torch.arange(x.shape[2], device=key.device) for x in (query, key))
    scores = rule.scores(query, key, query_idx, key_idx, len(key_idx)).flatten(1, 2)[0].double()
    seen = (weights[0] > 1e-5).double()
    distance = (key_idx - query_idx[:, None]).double()

    def centred(x: Tensor) -> Tensor:
        mean = (x * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
        return (x - mean) * seen

    rest = centred(weights[0].double().clamp_min(1e-30).log() - scores)
    along = centred(distance.expand_as(rest))
    slopes = (rest * along).sum((1, 2)) / along.square().sum((1, 2)).clamp_min(1e-30)
    return LinearBias(tuple(slopes.tolist()))


def unexplained(layers: Sequence[AttentionRule], dtype: torch.dtype) -> str | None:
    """What keeps attention from being computed from queries and keys; None if nothing does."""
    worst = max(layer.attention_error for layer in layers)
    if worst <= ATTENTION_TOLERANCE[dtype]:
        return None
    if worst == float("inf"):
        return "its attention weights could not be observed"
    return f"its attention weights differ by up to {worst:.1g} from those of its queries and keys"


MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers' description of a mask: (sample, head, query, key) → visible."""


def read_mask_function(
    function: MaskFunction, device: torch.device, length: int = LONG
) -> MaskRule | None:
    """Window and chunk of a mask, read off two queries of a very long text; None if it is neither.

    A few tokens cannot show a window of 4,096; the function that made their mask does.
    """
    key = torch.arange(length, device=device)
    queries = torch.tensor([length // 2 + 1, length // 2 + 2], device=device)
    zero = torch.zeros((), dtype=torch.long, device=device)
    try:
        rows = [function(zero, zero, query, key).expand(length) for query in queries]
    except IndexError:  # a mask of this batch's tokens, such as blocks of images
        return None
    spans = [row.nonzero().flatten() for row in rows]
    if any(len(span) == 0 for span in spans):
        return None
    query, first, last = int(queries[0]), int(spans[0][0]), int(spans[0][-1])
    causal = last == query
    found = [MaskRule(causal, query - first + 1), MaskRule(causal)]
    if first:
        # The end of a chunk is hidden by causality: where a later query sees its start no longer.
        later = key[query:]
        blind = (~function(zero, zero, later, zero + first).expand(len(later))).nonzero()
        found += [MaskRule(causal, chunk_size=query + int(end) - first) for end in blind[:1]]
    for rule in found:
        expected = rule.visible(queries, key)
        if all(torch.equal(row, seen) for row, seen in zip(rows, expected, strict=True)):
            return rule
    return None
