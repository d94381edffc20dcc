"""Weights by likeness: a teacher counts as much as the text resembles what it stands for.

    α = softmax_i( max_k sim(query, prototype_ik) / τ )

Nothing is learned. ``sim`` is the cosine, the dot product or the negative Euclidean distance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.errors import ConfigError, GeometryError
from kvdistill.types import Similarity


def similarity_weights(
    queries_BE: Sequence[Tensor],
    prototypes_KE: Sequence[Tensor],
    similarity: Similarity = "cosine",
    temperature: float = 1.0,
) -> Tensor:
    """Fusion weights per sample, ``[N, B, 1, 1]`` float32.

    Args:
        queries_BE: per teacher, the text in that teacher's space, ``[B, E_i]``. Where all spaces
            are one (the student's), this is the student's mean hidden state N times.
        prototypes_KE: per teacher, ``[K_i, E_i]``; of several the nearest counts.
        similarity: ``cosine``, ``dot`` or ``l2`` (negative distance).
        temperature: τ; small means one teacher takes all.

    Raises:
        ConfigError: τ is not positive.
        GeometryError: a teacher's query and prototypes differ in width, or are not N of each.
    """
    if temperature <= 0:
        raise ConfigError(f"fusion.temperature: expected > 0, got {temperature}")
    if len(queries_BE) != len(prototypes_KE):
        raise GeometryError(
            f"fusion: {len(queries_BE)} queries for {len(prototypes_KE)} teachers' prototypes"
        )
    scores = [
        _likeness(query.float(), prototype.float(), similarity)
        for query, prototype in zip(queries_BE, prototypes_KE, strict=True)
    ]
    return (torch.stack(scores) / temperature).softmax(0)[:, :, None, None]


def _likeness(query_BE: Tensor, prototype_KE: Tensor, similarity: Similarity) -> Tensor:
    if query_BE.shape[1] != prototype_KE.shape[1]:
        raise GeometryError(
            f"fusion: a query of width {query_BE.shape[1]} and prototypes of width "
            f"{prototype_KE.shape[1]}; bring the query into the teacher's space first"
        )
    if similarity == "l2":
        return -torch.cdist(query_BE, prototype_KE).amin(1)
    if similarity == "cosine":
        query_BE, prototype_KE = F.normalize(query_BE, dim=1), F.normalize(prototype_KE, dim=1)
    return (query_BE @ prototype_KE.T).amax(1)
