"""Fusion weights by what every teacher thought of the text.

    α = softmax over teachers of −(nats per character) / τ

At τ → 0 the teacher with the lowest cross-entropy takes all, as in FuseLLM (Knowledge Fusion of
Large Language Models, arXiv 2401.10491); per character, because tokens differ between teachers.
Encoders, which predict no text, share what is set aside for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.config.distill import FusionConfig
from kvdistill.distill.align.character_iou import Spans
from kvdistill.errors import ConfigError
from kvdistill.store.confidence import likelihoods
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.shard import EncodedShard
from kvdistill.types import SEGMENT_IDS, Granularity

LEAST, COLDEST = 1e-6, 1e-30
"""Characters that are no rounding error of none; a temperature that float32 divides by."""


@dataclass(frozen=True)
class Likelihood:
    """A teacher's nats per character of a text, over the unit that is weighted separately."""

    granularity: Granularity
    smoothing: int
    """Characters on either side of a token, for ``token``."""
    own_text: bool

    def __call__(self, rows: Sequence[tuple[EncodedShard, int]], student: Spans | None) -> Tensor:
        """Float32 ``[B, 1]`` for ``sample``, else ``[B, T_s]``.

        A segment or token of which nothing is predicted has its sample's; NaN is a sample of which
        nothing is. ``student`` are the spans of the student's tokens, which ``sample`` needs not.
        """
        found = []
        for row, (shard, idx) in enumerate(rows):
            tokens, span = shard.tokens, shard.tokens.span(idx)
            counted = likelihoods(tokens, shard.arrays["nll"], own_text=self.own_text, span=span)
            rate = _rate(counted.sum(1, keepdims=True), np.nan)
            if student is not None and self.granularity == "segment":
                of_segment = counted @ (tokens.segment[span, None] == np.arange(len(SEGMENT_IDS)))
                rate = _rate(of_segment[:, student.segment[row].clamp_min(0)], rate[0])
            elif student is not None and self.granularity == "token":
                bounds = torch.stack([student.char_start[row], student.char_end[row]]).numpy()
                bounds += np.array([[-self.smoothing], [self.smoothing]])
                before = _up_to(bounds, counted, tokens.char_end[span])
                rate = _rate(before[:, 1] - before[:, 0], rate[0])
            found.append(torch.from_numpy(rate))
        return torch.stack(found).float()


def _rate(sums: NDArray[np.float64], otherwise: float) -> NDArray[np.float64]:
    """Nats per character of ``[2, N]`` nats and characters."""
    rate = np.full(sums.shape[1], otherwise)
    np.divide(sums[0], sums[1], out=rate, where=sums[1] > LEAST)
    return rate


def _up_to(
    position: NDArray[np.int64], counted: NDArray[np.float64], end: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Nats and characters before positions, ``[2, *position]``; a token's are spread evenly."""
    order = np.argsort(end, kind="stable")
    counted, end = counted[:, order], end[order]
    sums, knots = counted.cumsum(1), np.stack([end - counted[1], end], axis=1).ravel()
    steps = np.stack([sums - counted, sums], axis=2).reshape(2, -1)
    return np.stack([np.interp(position, knots, step) for step in steps])


def likelihood_of(manifest: TeacherManifest, fusion: FusionConfig) -> Likelihood | None:
    """How a teacher's likelihood is read; None for an encoder.

    Raises:
        ConfigError: none is stored, or it is of another text than the student's tokens.
    """
    if not manifest.predicts_text:
        return None
    if not manifest.has_confidence:
        raise ConfigError(
            f"fusion.method confidence: the store has none of teacher {manifest.name!r}; extract "
            "it with extraction.confidence: true under another name"
        )
    if manifest.own_text and fusion.granularity == "token":
        raise ConfigError(
            f"fusion.granularity token: teacher {manifest.name!r} generated its own rationales; "
            "set it to segment or sample"
        )
    return Likelihood(fusion.granularity, fusion.smoothing, manifest.own_text)


def confidence_weights(
    nats_BT: Sequence[Tensor | None],
    encoders_N111: Tensor,
    temperature: float,
    encoder_share: float,
    serves_NBLT: Tensor,
) -> Tensor:
    """Weights ``[N, B, L, T]`` of the teachers that serve, at temperature τ > 0.

    ``nats_BT`` are each teacher's nats per character, ``[B, 1]`` or ``[B, T]``, NaN where unknown
    and None for an encoder. All encoders together have ``encoder_share`` where a decoder serves.
    """
    unknown = torch.full((1, 1), torch.inf, device=serves_NBLT.device)
    found = [unknown if x is None else x.nan_to_num(torch.inf) for x in nats_BT]
    pairs = zip(found, serves_NBLT, strict=True)
    nats = torch.stack([torch.where(serves, x[:, None], torch.inf) for x, serves in pairs])
    gap = nats - nats.amin(0, keepdim=True)
    weight = torch.where(nats.isfinite(), (-gap / max(temperature, COLDEST)).exp(), 0.0)
    weight = (1 - encoder_share) * weight / weight.sum(0, keepdim=True).clamp_min(1.0)
    encoders = serves_NBLT & encoders_N111
    return weight + encoder_share * encoders / encoders.sum(0, keepdim=True).clamp_min(1)
