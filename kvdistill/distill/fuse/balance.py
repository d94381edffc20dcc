"""A balance between teachers: how strongly each one's regression moves the student.

The error of teacher ``i`` has a gradient ``g_i`` at the student's keys and values, one layer and
kind at a time. Into the student goes ``Σ_i s_i g_i``, with ``s_i = factor · m_i`` within the
teacher's span of the training, and 0 outside it:

``none``       m_i = 1
``explained``  m_i = e_i / mean(e),  e_i = max(1 − Σ α‖r_i‖² / Σ α‖y_i‖², FLOOR), of residual and
               target: what a regression cannot explain, it cannot teach either
``gradnorm``   m_i = mean(n) / n_i,  n_i² = Σ‖g_i‖² / Σ α²: equal norms per token and unit of
               fusion weight. The fixed point of *GradNorm*, arXiv 1711.02257, with equal rates
``pcgrad``     m_i = 1, and in every sample where g_i·g_j < 0, g_i loses its part along g_j
               (*Gradient Surgery for Multi-Task Learning*, arXiv 2001.06782); j in a fixed order

Heads keep their own gradients: they belong to one teacher each and compete for nothing. A teacher
that moves the student little therefore still fits its head, and can gain weight later.

Sums ``Σ`` are over the tokens of whole steps, all micro-batches and ranks, and averaged over steps;
a step uses those of the steps before it. ``pcgrad`` never looks beyond a sample. So no method
depends on how a step is cut into micro-batches and ranks, and losses are the same with all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from kvdistill.config.distill import BalanceConfig
from kvdistill.distill.losses.fused_residual import Residual
from kvdistill.types import KINDS, Kind

FLOOR: Final = 0.05
"""Explained share that every teacher is credited with: at random heads, none explains anything."""

MAX_FACTOR: Final = 10.0
"""Bound on a factor of ``gradnorm`` and its inverse: a useless teacher's gradient is mere noise."""


@dataclass(frozen=True, eq=False)
class Balancing:
    """The balance of one kind in one pass; what it measures is added to ``sums``."""

    method: str
    scale_NL: Tensor
    sums: Tensor
    """``[2, N, L]``: numerators and denominators of a teacher's figure."""

    @property
    def measures(self) -> bool:
        """Whether squares of residuals and targets are needed."""
        return self.method == "explained"

    def measure(self, layer: int, teacher: int, alpha_N: Tensor, found: Residual) -> None:
        """Add one teacher's tokens in one layer; N tokens, ``alpha`` their weights."""
        if found.squared_N is not None and found.energy_N is not None and self.measures:
            self.sums[0, teacher, layer] += torch.dot(alpha_N, found.squared_N)
            self.sums[1, teacher, layer] += torch.dot(alpha_N, found.energy_N)
        elif self.method == "gradnorm":
            self.sums[1, teacher, layer] += alpha_N.square().sum()

    def combine(self, layer: int, gradients: Mapping[int, Tensor], num_samples: int) -> Tensor:
        """What goes into the student of the teachers' gradients ``[tokens, H·D]``."""
        stacked_GBX = torch.stack([g.view(num_samples, -1) for g in gradients.values()])
        scale_G = torch.stack([self.scale_NL[teacher, layer] for teacher in gradients])
        scale_GB = scale_G.to(stacked_GBX)[:, None].expand(-1, num_samples)
        if self.method == "gradnorm":
            self._add(0, layer, gradients, stacked_GBX.square().sum(dim=(1, 2)))
        elif self.method == "pcgrad":
            gram_BGG = torch.einsum("gbx,hbx->bgh", stacked_GBX, stacked_GBX)
            scale_GB = torch.einsum("gb,bgh->hb", scale_GB, without_conflicts(gram_BGG))
            # Samples in which a teacher conflicts with another, and in which it meets one at all.
            present_BG = gram_BGG.diagonal(dim1=1, dim2=2) > 0
            met_BG = present_BG & (present_BG.sum(1, keepdim=True) > 1)
            self._add(0, layer, gradients, (gram_BGG < 0).any(2).sum(0))
            self._add(1, layer, gradients, met_BG.sum(0))
        total_BX = torch.zeros_like(stacked_GBX[0])
        for scale_B, gradient_BX in zip(scale_GB, stacked_GBX, strict=True):
            total_BX.addcmul_(gradient_BX, scale_B[:, None])
        return total_BX.view_as(next(iter(gradients.values())))

    def _add(self, row: int, layer: int, teachers: Iterable[int], figures_G: Tensor) -> None:
        for teacher, figure in zip(teachers, figures_G.to(self.sums), strict=True):
            self.sums[row, teacher, layer] += figure


def without_conflicts(gram_BGG: Tensor) -> Tensor:
    """PCGrad as coefficients: ``[B, G, G]``, row i the mixture of gradients that ``g_i`` becomes.

    Every gradient is projected off the *original* others, one after the other, where its inner
    product with them is negative at that point (Algorithm 1 of arXiv 2001.06782). All of that
    depends on the gradients' inner products ``gram`` alone.
    """
    mix_BGG = torch.diag_embed(torch.ones_like(gram_BGG[:, 0]))
    square_BG = gram_BGG.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram_BGG.dtype).tiny)
    for other in range(gram_BGG.shape[1]):
        inner_BG = torch.einsum("bgh,bh->bg", mix_BGG, gram_BGG[:, other]).clamp_max(0)
        inner_BG[:, other] = 0
        mix_BGG[:, :, other] -= inner_BG / square_BG[:, other, None]
    return mix_BGG


class TeacherBalance(nn.Module):
    """Holds what a balance has measured, and makes the ``Balancing`` of a pass."""

    moments: Tensor
    progress = 0.0  # share of the training that is done; the trainer sets it at every step

    def __init__(self, config: BalanceConfig, names: Sequence[str], num_layers: int) -> None:
        super().__init__()
        self.config, self.names = config, names
        self._since: Tensor | None = None  # not a buffer: every rank has measured its own tokens
        shape = (len(KINDS), 2, len(names), num_layers)
        self.register_buffer("moments", torch.zeros(shape), persistent=config.method != "none")

    def balancing(self, kind: Kind) -> Balancing | None:
        """The balance of a training pass; None where gradients are only added up."""
        if not (self.training and self.config.active):
            return None
        if self._since is None:
            self._since = torch.zeros_like(self.moments)
        return Balancing(self.config.method, self.scale(kind), self._since[KINDS.index(kind)])

    def scale(self, kind: Kind) -> Tensor:
        """Factor on every teacher's gradients, ``[N, L]`` float32."""
        above, below = self.moments[KINDS.index(kind)]
        seen = below > 0
        figure = above / torch.where(seen, below, 1.0)
        weight = torch.ones_like(figure)
        if self.config.method == "explained":
            share = (1 - figure).clamp_min(FLOOR)
            weight = share / _mean_over_teachers(share, seen)
        elif self.config.method == "gradnorm":
            norm = figure.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            weight = (_mean_over_teachers(norm, seen) / norm).clamp(1 / MAX_FACTOR, MAX_FACTOR)
        rows = zip(self.names, torch.where(seen, weight, 1.0), strict=True)
        return torch.stack([self._factor(name) * row for name, row in rows])

    def _factor(self, name: str) -> float:
        start, end = self.config.spans.get(name, (0.0, 1.0))
        return self.config.factors.get(name, 1.0) * (start <= self.progress < end)

    @torch.no_grad()
    def end_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add a step's measurements to the running ones; all ranks call it, after each step.

        A layer that a teacher did not teach in this step keeps its figure, and so does one whose
        gradients overflowed in half precision.
        """
        if self.config.method == "none":
            return
        since = torch.zeros_like(self.moments) if self._since is None else self._since
        step, self._since = sum_over_ranks(since), None
        taught = (step.isfinite().all(1) & (step[:, 1] > 0)).unsqueeze(1)
        running = self.config.momentum * self.moments + step
        self.moments.copy_(torch.where(taught, running, self.moments))

    def figures(self) -> dict[str, Tensor]:
        """For the log: mean factor per teacher or, with ``pcgrad``, how often it conflicts."""
        if not self.config.active:
            return {}
        found = torch.stack([self.scale(kind) for kind in KINDS]).mean(dim=(0, 2))
        shown = {f"balance_{name}": x for name, x in zip(self.names, found, strict=True)}
        if self.config.method == "pcgrad":
            above, below = self.moments.sum(dim=(0, 3))
            shares = above / below.clamp_min(1)
            shown |= {f"conflict_{name}": x for name, x in zip(self.names, shares, strict=True)}
        return shown


def _mean_over_teachers(figure_NL: Tensor, seen_NL: Tensor) -> Tensor:
    total = torch.where(seen_NL, figure_NL, 0.0).sum(0)
    return total / seen_NL.sum(0).clamp_min(1)
