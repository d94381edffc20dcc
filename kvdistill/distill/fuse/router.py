"""Learned fusion weights: a router on the student's hidden state.

``mlp``        softmax over teachers of a small network's logits
``gate``       an independent sigmoid per teacher, then normalised: several may be fully open
``attention``  softmax of a query against one learned key per teacher

A router trained on the K/V loss alone picks the teacher that is easiest to imitate, not the one
that helps; the injected cross-entropy (``inject``) trains it for the latter. Every router starts
near uniform weights.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from kvdistill.types import Granularity


class Router(nn.Module):
    """Weights ``alpha [N, B, L, T]`` from hidden states; L or T is 1 unless it is routed by."""

    def __init__(
        self,
        method: Literal["mlp", "gate", "attention"],
        num_teachers: int,
        hidden_size: int,
        *,
        granularity: Granularity = "sample",
        num_layers: int = 1,
        num_tasks: int = 0,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.method, self.granularity = method, granularity
        self.num_teachers = num_teachers
        self.num_outputs = num_layers if granularity == "layer" else 1
        self.norm = nn.LayerNorm(hidden_size)
        self.task = nn.Embedding(num_tasks + 1, hidden_size) if num_tasks else None
        if self.task is not None:
            nn.init.zeros_(self.task.weight)
        self.enter = nn.Linear(hidden_size, width)
        # Small, not zero: at exactly uniform weights no gradient would reach ``enter``.
        leave = torch.randn(num_teachers * self.num_outputs, width) * (0.02 / math.sqrt(width))
        self.key_OW = nn.Parameter(leave)

    def forward(self, hidden: Tensor, task_B: Tensor | None = None) -> Tensor:
        """Fusion weights, summing to one over teachers, float32.

        Args:
            hidden: the student's hidden state: the prompt's mean ``[B, E]``, or every token's
                ``[B, T, E]`` for granularity ``token``; not detached here.
            task_B: task ids ``[B]``, 0 where a sample has none; for a router with tasks.

        Returns:
            ``[N, B, 1, 1]`` (sample), ``[N, B, L, 1]`` (layer) or ``[N, B, 1, T]`` (token).
        """
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self._logits(hidden.float(), task_B)
        if self.method == "gate":
            logits = nn.functional.logsigmoid(logits)  # softmax of log g is g / Σ g, stably
        return logits.softmax(0)

    def _logits(self, hidden: Tensor, task_B: Tensor | None) -> Tensor:
        query = self.norm(hidden)
        if self.task is not None and task_B is not None:
            tag = self.task(task_B)
            query = query + (tag.unsqueeze(1) if hidden.dim() == 3 else tag)
        inner = self.enter(query)
        scores: Tensor
        if self.method == "attention":
            scores = inner @ self.key_OW.T / math.sqrt(inner.shape[-1])
        else:
            scores = nn.functional.gelu(inner) @ self.key_OW.T
        scores = scores.view(*scores.shape[:-1], self.num_teachers, self.num_outputs)
        if self.granularity == "token":
            return scores.squeeze(-1).permute(2, 0, 1).unsqueeze(2)
        return scores.permute(1, 0, 2).unsqueeze(-1)
