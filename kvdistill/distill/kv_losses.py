"""K/V errors of a step beside the regression itself, per token and by their name in the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvdistill.config.distill import LossConfig
from kvdistill.distill.losses.attention_maps import relation_error
from kvdistill.distill.losses.pointwise import cosine_error, kv_error, layer_std
from kvdistill.distill.targets import TeacherHead
from kvdistill.types import KINDS, Kind


def teacher_errors(
    student_BLHTD: Tensor,
    heads: Sequence[TeacherHead],
    targets: Sequence[Sequence[Tensor]],
    alpha_NBLT: Tensor,
    losses: LossConfig,
) -> dict[str, Tensor]:
    """One kind in mode ``student_to_teacher``, weighted by teacher: ``[B, T]`` maps by name.

    ``cosine`` and ``relation`` where they have a weight in ``losses``; the regression error itself
    is ``losses.regression_error``, which materialises no prediction. ``heads`` are one per teacher,
    ``targets`` per teacher and group; L of ``alpha_NBLT`` may be 1.
    """
    num_layers = student_BLHTD.shape[1]
    alpha = alpha_NBLT.expand(-1, -1, num_layers, -1)
    maps: dict[str, Tensor] = {}
    for i, head in enumerate(heads):
        groups = zip(head.groups, head.predictions(student_BLHTD), targets[i], strict=True)
        for group_idx, (group, ours, target) in enumerate(groups):
            layers = list(group.student_layers)
            weight_BLT = alpha[i][:, layers]
            if losses.cosine:
                # Layers of one weight are compared at once.
                step = 1 if alpha_NBLT.shape[2] > 1 else len(layers)
                for start in range(0, len(layers), step):
                    rows = slice(start, start + step)
                    weight = weight_BLT[:, start] * (step / num_layers)
                    error = weight * cosine_error(ours[:, rows], target[:, rows])
                    maps["cosine"] = maps.get("cosine", 0) + error
            if losses.relation:
                own = head.of_group(student_BLHTD, group_idx)
                mask_BT = weight_BLT[:, 0] > 0
                error = relation_error(own, target, mask_BT, losses.relation_heads)
                error = weight_BLT.mean(1) * error * (len(layers) / num_layers)
                maps["relation"] = maps.get("relation", 0) + error
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
