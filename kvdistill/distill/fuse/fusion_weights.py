"""Fusion weights of a batch, by the configured method.

``fixed``       given weights; nothing is learned
``similarity``  how close the text, as each teacher represents it in its own hidden space (stored
                with its shards), is to that teacher's prototypes:
                α = softmax_i( max_k sim(query_i, prototype_ik) / τ ); nothing is learned
``mlp``, ``gate``, ``attention``  a router on the student's hidden state, detached: routing must
                not train the student
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdistill.config.distill import FusionConfig
from kvdistill.distill.data.collate import Batch
from kvdistill.distill.fuse.router import Router
from kvdistill.distill.fuse.weights import drop_teachers, fixed_weights, renormalise
from kvdistill.distill.targets import TeacherSpace
from kvdistill.errors import ConfigError
from kvdistill.types import Similarity


class FusionWeights(nn.Module):
    """``alpha [N, B, L, T]`` of a batch, over the teachers that cover each token."""

    def __init__(
        self,
        config: FusionConfig,
        teachers: Sequence[TeacherSpace],
        hidden_size: int,
        num_layers: int,
        num_tasks: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.names = [teacher.name for teacher in teachers]
        self.routing = True
        """False while a router warms up: its weights are then uniform."""
        self.router: Router | None = None
        if config.layers is not None:
            self.register_buffer("serves", _layers_served(config.layers, self.names, num_layers))
        if config.method == "fixed":
            given = config.weights or dict.fromkeys(self.names, 1.0)
            self.register_buffer("fixed", fixed_weights([given[name] for name in self.names]))
        elif config.method == "similarity":
            for i, teacher in enumerate(teachers):
                self.register_buffer(f"prototypes_{i}", teacher.prototypes_KE)
        else:
            self.router = Router(
                config.method,
                len(teachers),
                hidden_size,
                granularity=config.granularity,
                num_layers=num_layers,
                num_tasks=num_tasks if config.task_tag else 0,
            )

    @property
    def needs_hidden(self) -> bool:
        """Whether ``forward`` reads the student's hidden states."""
        return self.router is not None

    def forward(self, batch: Batch, hidden_BTE: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights ``[N, B, L, T]`` (L may be 1), and which teacher counts where ``[N, B, T]``.

        ``hidden_BTE`` is the student's last hidden state, where ``needs_hidden``.
        """
        teachers = [batch["teachers"][name] for name in self.names]
        covered_NBT = torch.stack([teacher["covered"] for teacher in teachers])
        if self.training and self.config.teacher_dropout:
            covered_NBT = drop_teachers(covered_NBT, self.config.teacher_dropout)
        raw = self._raw(batch, teachers, hidden_BTE)
        if self.config.layers is not None:
            raw = raw * self.get_buffer("serves")
        return renormalise(raw, covered_NBT), covered_NBT

    def _raw(self, batch: Batch, teachers: list[Batch], hidden_BTE: Tensor | None) -> Tensor:
        """Weights before coverage and layers are taken into account."""
        if self.config.method == "fixed":
            return self.get_buffer("fixed")
        if self.config.method == "similarity":
            return similarity_weights(
                [teacher["summary"] for teacher in teachers],
                [self.get_buffer(f"prototypes_{i}") for i in range(len(teachers))],
                self.config.similarity,
                self.config.temperature,
            )
        assert self.router is not None and hidden_BTE is not None  # noqa: PT018
        hidden = hidden_BTE.detach()
        if self.config.granularity != "token":
            mask = batch["query_mask"].unsqueeze(-1)
            total = torch.where(mask, hidden.float(), 0.0).sum(1)
            hidden = total / mask.sum(1).clamp_min(1)
        weights: Tensor = self.router(hidden, batch.get("task"))
        if self.routing:
            return weights
        # Multiplied by zero, not left out: DDP waits for a gradient of every parameter.
        return 0.0 * weights + 1 / len(self.names)


def similarity_weights(
    queries_BE: Sequence[Tensor],
    prototypes_KE: Sequence[Tensor],
    similarity: Similarity = "cosine",
    temperature: float = 1.0,
) -> Tensor:
    """Fusion weights per sample, ``[N, B, 1, 1]`` float32.

    Args:
        queries_BE: per teacher, the text in that teacher's space, ``[B, E_i]``.
        prototypes_KE: per teacher, ``[K_i, E_i]``; the nearest counts.
        similarity: ``cosine``, ``dot`` or ``l2`` (negative distance).
        temperature: τ > 0; at a small one, one teacher takes all.
    """
    scores = [
        _nearest_prototype(query.float(), prototypes.float(), similarity)
        for query, prototypes in zip(queries_BE, prototypes_KE, strict=True)
    ]
    return (torch.stack(scores) / temperature).softmax(0)[:, :, None, None]


def _nearest_prototype(query_BE: Tensor, prototypes_KE: Tensor, similarity: Similarity) -> Tensor:
    """Similarity ``[B]`` to the nearest prototype."""
    if similarity == "l2":
        return -torch.cdist(query_BE, prototypes_KE).amin(1)
    if similarity == "cosine":
        query_BE, prototypes_KE = F.normalize(query_BE, dim=1), F.normalize(prototypes_KE, dim=1)
    return (query_BE @ prototypes_KE.T).amax(1)


def _layers_served(
    layers: Mapping[str, Sequence[int]], names: Sequence[str], num_layers: int
) -> Tensor:
    """1 where a teacher teaches a student layer, else 0: ``[N, 1, L, 1]``.

    Raises:
        ConfigError: an unknown teacher, or a layer that the student does not have.
    """
    served = torch.ones(len(names), 1, num_layers, 1)
    for name, wanted in layers.items():
        if name not in names or not set(wanted) <= set(range(num_layers)):
            raise ConfigError(
                f"fusion.layers: {name} {list(wanted)}; the teachers are {sorted(names)}, and the "
                f"student's layers count from 0 to {num_layers - 1}"
            )
        served[names.index(name), 0, :, 0] = 0.0
        served[names.index(name), 0, list(wanted), 0] = 1.0
    return served
