"""Fusion weights of a batch, by the configured method.

``fixed``       given weights, per task of the corpus if ``by_task``; nothing is learned
``similarity``  how close the text, as each teacher represents it in its own hidden space (stored
                with its shards), is to that teacher's prototypes:
                α = softmax_i( max_k sim(query_i, prototype_ik) / τ ); nothing is learned
``confidence``  how likely each teacher found the text (``by_confidence.py``); nothing is learned
``mlp``, ``gate``, ``attention``  a router on the student's hidden state, detached: routing must
                not train the student
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdistill.config.distill import FusionConfig
from kvdistill.distill.data.collate import Batch
from kvdistill.distill.fuse.balance import TeacherBalance
from kvdistill.distill.fuse.by_confidence import confidence_weights
from kvdistill.distill.fuse.router import Router
from kvdistill.distill.fuse.weights import ServedWeights, fixed_weights
from kvdistill.distill.targets import TeacherSpace
from kvdistill.errors import ConfigError
from kvdistill.types import Similarity


class FusionWeights(nn.Module):
    """Which teachers serve what in a batch, and with which weights."""

    def __init__(
        self,
        config: FusionConfig,
        teachers: Sequence[TeacherSpace],
        hidden_size: int,
        num_layers: int,
        tasks: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.config = config
        self.names = [teacher.name for teacher in teachers]
        self.balance = TeacherBalance(config.balance, self.names, num_layers)
        self.routing = True
        """False while a router warms up: its weights are then uniform."""
        self.router: Router | None = None
        teaches = _layers_served(config.layers or {}, self.names, num_layers)
        # Batches are counted before they are moved: that reads the copies on the CPU.
        self._on_cpu: dict[str, Tensor] = {}
        if config.by_task:
            self._on_cpu["of_task"] = _weights_of_tasks(config, self.names, tasks)
            self.register_buffer("of_task", self._on_cpu["of_task"].clone())
        elif config.method == "fixed":
            given = config.weights or dict.fromkeys(self.names, 1.0)
            self.register_buffer("fixed", fixed_weights([given[name] for name in self.names]))
            teaches &= self.get_buffer("fixed") > 0
        elif config.method == "similarity":
            for i, teacher in enumerate(teachers):
                self.register_buffer(f"prototypes_{i}", teacher.prototypes_KE)
        elif config.method == "confidence":
            encoders = torch.tensor([teacher.likelihood is None for teacher in teachers])
            if bool(encoders.all()):
                raise ConfigError("fusion.method confidence: no teacher predicts text; use fixed")
            self.register_buffer("encoders", encoders.view(-1, 1, 1, 1), persistent=False)
            self.encoder_share = float(encoders.float().mean())
            if self.encoder_share and config.encoder_share is not None:
                self.encoder_share = config.encoder_share
        else:
            self.router = Router(
                config.method,
                len(teachers),
                hidden_size,
                granularity=config.granularity,
                num_layers=num_layers,
                num_tasks=len(tasks) if config.task_tag else 0,
            )
        self._on_cpu["serves"] = teaches
        self.register_buffer("serves", teaches.clone(), persistent=config.layers is not None)

    @property
    def needs_hidden(self) -> bool:
        """Whether ``forward`` reads the student's hidden states."""
        return self.router is not None

    def forward(self, batch: Batch, hidden_BTE: Tensor | None) -> ServedWeights:
        """The weights of a batch. ``hidden_BTE``: the last hidden state, where ``needs_hidden``."""
        serves, kept = self.serving(batch), None
        if self.training and self.config.teacher_dropout:
            draw = torch.rand(serves.shape[:2], device=serves.device)
            kept = draw >= self.config.teacher_dropout
        teachers = [batch["teachers"][name] for name in self.names]
        return ServedWeights(self._raw(batch, teachers, hidden_BTE), serves, kept)

    def serving(self, batch: Batch) -> Tensor:
        """Where each teacher serves, before any dropout: ``[N, B, L, T]`` bool."""
        covered = torch.stack([batch["teachers"][name]["covered"] for name in self.names])
        teaches = self._beside("serves", covered)
        if self.config.by_task:
            teaches = teaches & (self._by_task(batch) > 0)
        if "teacher" in batch:  # a text that names its teacher has no other
            number = torch.arange(1, len(self.names) + 1, device=covered.device)[:, None]
            is_named = (batch["teacher"] == 0) | (batch["teacher"] == number)
            teaches = teaches & is_named[:, :, None, None]
        return covered.unsqueeze(2) & teaches

    def _by_task(self, batch: Batch) -> Tensor:
        """Weights by the tasks of the samples: ``[N, B, 1, 1]``."""
        task_B = batch["task"]
        return self._beside("of_task", task_B)[task_B].T[:, :, None, None]

    def _beside(self, name: str, other: Tensor) -> Tensor:
        """A buffer, or its copy on the CPU: whichever is on the device of ``other``."""
        copy = self._on_cpu[name]
        return copy if copy.device == other.device else self.get_buffer(name)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Pairs of a layer and a token: ``num_served`` by any teacher, ``num_contested`` by two."""
        num_teachers = self.serving(batch).sum(0)
        return {
            "num_served": (num_teachers > 0).sum(),
            "num_contested": (num_teachers > 1).sum(),
        }

    def _raw(
        self, batch: Batch, teachers: list[Batch], hidden_BTE: Tensor | None
    ) -> Tensor | Callable[[Tensor], Tensor]:
        """Weights before coverage and layers are taken into account."""
        if self.config.by_task:
            return self._by_task(batch)
        if self.config.method == "fixed":
            return self.get_buffer("fixed")
        if self.config.method == "similarity":
            return similarity_weights(
                [teacher["summary"] for teacher in teachers],
                [self.get_buffer(f"prototypes_{i}") for i in range(len(teachers))],
                self.config.similarity,
                self.config.temperature,
            )
        if self.config.method == "confidence":
            settings = self.config.temperature, self.encoder_share
            found = [teacher.get("nats") for teacher in teachers]
            return partial(confidence_weights, found, self.get_buffer("encoders"), *settings)
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


def _weights_of_tasks(
    config: FusionConfig, names: Sequence[str], tasks: Mapping[str, int]
) -> Tensor:
    """Weights by task id, ``[K + 1, N]``; row 0 is that of a text without a task.

    Raises:
        ConfigError: the corpus has no such task.
    """
    by_task = config.by_task or {}
    if unknown := sorted(by_task.keys() - tasks.keys()):
        raise ConfigError(
            f"fusion.by_task: no text of the corpus has task {unknown[0]!r}; its tasks are "
            f"{sorted(tasks) or 'none'}"
        )
    others = config.weights or dict.fromkeys(names, 1.0)
    rows = [others, *(by_task.get(task, others) for task in sorted(tasks, key=lambda t: tasks[t]))]
    weights = [[row.get(name, 0.0) for name in names] for row in rows]
    return torch.cat([fixed_weights(row).view(1, -1) for row in weights])


def _layers_served(
    layers: Mapping[str, Sequence[int]], names: Sequence[str], num_layers: int
) -> Tensor:
    """Whether a teacher teaches a student layer: ``[N, 1, L, 1]`` bool.

    Raises:
        ConfigError: an unknown teacher, or a layer that the student does not have.
    """
    served = torch.ones(len(names), 1, num_layers, 1, dtype=torch.bool)
    for name, wanted in layers.items():
        if name not in names or not set(wanted) <= set(range(num_layers)):
            raise ConfigError(
                f"fusion.layers: {name} {list(wanted)}; the teachers are {sorted(names)}, and the "
                f"student's layers count from 0 to {num_layers - 1}"
            )
        served[names.index(name)] = False
        served[names.index(name), 0, list(wanted)] = True
    return served
