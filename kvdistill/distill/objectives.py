"""The K/V errors of a step, per token and by the name of their weight in the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdistill.config_distill import LossConfig
from kvdistill.distill.head import TeacherHead
from kvdistill.distill.losses import cosine_error, kv_error, layer_std, relation_error
from kvdistill.types import KINDS, Kind


@dataclass(frozen=True, eq=False)
class StudentView:
    """What one forward pass of the student gives; keys and queries are not rotated."""

    logits: Tensor
    query_BLQTD: Tensor
    key_BLHTD: Tensor
    value_BLHTD: Tensor
    hidden: Tensor | None
    """Last hidden state ``[B, T, E]``, where something asked for it."""

    def kind(self, kind: Kind) -> Tensor:
        """Keys or values ``[B, L, H, T, D]``."""
        return self.key_BLHTD if kind == "key" else self.value_BLHTD


def teacher_errors(
    student_BLHTD: Tensor,
    heads: Sequence[TeacherHead],
    targets: Sequence[Sequence[Tensor]],
    alpha_NBLT: Tensor,
    losses: LossConfig,
) -> dict[str, Tensor]:
    """One kind in mode ``student_to_teacher``: each teacher's error, mixed by its weight.

    Args:
        student_BLHTD: the student's keys or values.
        heads: one per teacher, of that kind.
        targets: per teacher and group.
        alpha_NBLT: fusion weights; L may be 1.
        losses: which errors are wanted.

    Returns:
        ``[B, T]`` maps by name: the kind's own, and ``cosine`` and ``relation`` where wanted.
    """
    num_layers = student_BLHTD.shape[1]
    alpha = alpha_NBLT.expand(-1, -1, num_layers, -1)
    maps: dict[str, Tensor] = {}

    def add(name: str, error: Tensor) -> None:
        maps[name] = maps[name] + error if name in maps else error

    for i, head in enumerate(heads):
        for group_idx, guess in enumerate(head.guesses(student_BLHTD)):
            target = targets[i][group_idx]
            layers = list(head.groups[group_idx].student_layers)
            weight_BLT = alpha[i][:, layers]
            for start, stop in _runs(weight_BLT, alpha_NBLT.shape[2] > 1):
                share = (stop - start) / num_layers
                weight_BT = weight_BLT[:, start] * share
                ours, theirs = guess[:, start:stop], target[:, start:stop]
                add(head.kind, weight_BT * kv_error(ours, theirs, losses.distance))
                if losses.cosine:
                    add("cosine", weight_BT * cosine_error(ours, theirs))
            if losses.relation:
                own = head.of_group(student_BLHTD, group_idx)
                mask_BT = weight_BLT[:, 0] > 0
                error = relation_error(own, target, mask_BT, losses.relation_heads)
                add("relation", weight_BLT.mean(1) * error * (len(layers) / num_layers))
    return maps


def fused_errors(
    student: Mapping[Kind, Tensor],
    target: Mapping[Kind, Tensor],
    covered_BT: Tensor,
    losses: LossConfig,
) -> dict[str, Tensor]:
    """Errors against one fused target in the student's (or the shared) space, ``[B, T]`` maps."""
    maps: dict[str, Tensor] = {}
    for kind in KINDS:
        ours, theirs = student[kind], target[kind]
        std = layer_std(theirs, covered_BT) if losses.layer_std else None
        maps[kind] = kv_error(ours, theirs, losses.distance, std)
        if losses.cosine:
            maps["cosine"] = maps.get("cosine", 0) + cosine_error(ours, theirs) / len(KINDS)
        if losses.relation:
            error = relation_error(ours, theirs, covered_BT, losses.relation_heads)
            maps["relation"] = maps.get("relation", 0) + error / len(KINDS)
    return {name: torch.as_tensor(error) for name, error in maps.items()}


def _runs(weight_BLT: Tensor, by_layer: bool) -> list[tuple[int, int]]:
    """Layers that share a weight: all of them, or each its own where a router tells them apart."""
    num_layers = weight_BLT.shape[1]
    return [(i, i + 1) for i in range(num_layers)] if by_layer else [(0, num_layers)]
