"""K/V errors of a step beside the regression itself, by their name in the config.

Weights and mask are one object ``[B, L, T]``. Every error is its weighted sum over tokens and mean
over the student's layers, a float32 scalar, as in ``losses.regression_error``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvdistill.config.distill import LossConfig
from kvdistill.distill.losses.attention_maps import relation_error
from kvdistill.distill.losses.pointwise import cosine_error, kv_error, layer_std
from kvdistill.distill.losses.weighting import sum_served
from kvdistill.distill.targets import TeacherHead
from kvdistill.types import KINDS, Kind


def teacher_errors(
    student_BLHTD: Tensor,
    heads: Sequence[TeacherHead],
    targets: Sequence[Sequence[Tensor]],
    alpha_NBLT: Tensor,
    losses: LossConfig,
) -> dict[str, Tensor]:
    """One kind in mode ``student_to_teacher``, weighted by teacher.

    ``cosine`` and ``relation`` where they have a weight in ``losses``; the regression error itself
    is ``losses.regression_error``, which materialises no prediction. ``heads`` are one per teacher,
    ``targets`` per teacher and group.
    """
    sums: dict[str, list[Tensor]] = defaultdict(list)
    for head, alpha_BLT, groups in zip(heads, alpha_NBLT, targets, strict=True):
        predictions = head.predictions(student_BLHTD) if losses.cosine else groups
        for i, (ours, target) in enumerate(zip(predictions, groups, strict=True)):
            weight_BLT = alpha_BLT[:, list(head.groups[i].student_layers)]
            if losses.cosine:
                sums["cosine"].append(sum_served(cosine_error(ours, target), weight_BLT))
            if losses.relation:
                own = head.of_group(student_BLHTD, i)
                error = relation_error(own, target, weight_BLT > 0, losses.relation_heads)
                sums["relation"].append(sum_served(error, weight_BLT))
    num_layers = student_BLHTD.shape[1]
    return {name: torch.stack(found).sum() / num_layers for name, found in sums.items()}


def fused_errors(
    student: Mapping[Kind, Tensor],
    target: Mapping[Kind, Tensor],
    served_BLT: Tensor,
    losses: LossConfig,
) -> dict[str, Tensor]:
    """Errors against one fused target in the student's (or the shared) space, where it exists."""
    maps: dict[str, list[Tensor]] = defaultdict(list)
    for kind in KINDS:
        ours, theirs = student[kind], target[kind]
        std = layer_std(theirs, served_BLT) if losses.layer_std else None
        maps[kind].append(kv_error(ours, theirs, losses.distance, std))
        if losses.cosine:
            maps["cosine"].append(cosine_error(ours, theirs) / len(KINDS))
        if losses.relation:
            error = relation_error(ours, theirs, served_BLT, losses.relation_heads)
            maps["relation"].append(error / len(KINDS))
    weight_BLT, num_layers = served_BLT.float(), served_BLT.shape[1]
    return {
        name: torch.stack([sum_served(x, weight_BLT) for x in found]).sum() / num_layers
        for name, found in maps.items()
    }
