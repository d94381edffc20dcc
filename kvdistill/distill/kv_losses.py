"""K/V errors of a step beside the regression itself, by their name in the config.

Weights and mask are one object ``[B, L, T]``. Every error is its weighted sum over tokens and mean
over the student's layers, a float32 scalar, as in ``losses.regression_error``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvdistill.config.distill import LossConfig
from kvdistill.distill.fuse.weights import mean_weights
from kvdistill.distill.losses.absorption import explained_variance, target_variance
from kvdistill.distill.losses.attention_maps import relation_error
from kvdistill.distill.losses.pointwise import cosine_error, kv_error, layer_std
from kvdistill.distill.losses.weighting import sum_served
from kvdistill.distill.targets import TeacherHead
from kvdistill.types import KINDS, Kind


def teacher_errors(
    student: tuple[Tensor, Tensor],
    heads: Sequence[TeacherHead],
    targets: Sequence[Sequence[Tensor]],
    alpha_NBLT: Tensor,
    losses: LossConfig,
) -> dict[str, Tensor]:
    """One kind in mode ``student_to_teacher``, weighted by teacher.

    ``cosine`` and ``relation`` where they have a weight in ``losses``; the regression error itself
    is ``losses.regression_error``, which materialises no prediction. ``student`` is its KV
    ``[B, L, H, T, D]`` as it is, and as heads read it. ``heads`` are one per teacher, ``targets``
    per teacher and group.
    """
    student_BLHTD, regressed_BLHTD = student
    sums: dict[str, list[Tensor]] = defaultdict(list)
    for head, alpha_BLT, groups in zip(heads, alpha_NBLT, targets, strict=True):
        predictions = head.predictions(regressed_BLHTD) if losses.cosine else groups
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


def round_trip_errors(
    space: Any,
    student_BLHTD: Tensor,
    heads: Sequence[TeacherHead],
    targets: Sequence[Sequence[Tensor]],
    alpha_NBLT: Tensor,
) -> Tensor:
    """One kind's error of every model after the way into the shared space and back."""
    alpha = alpha_NBLT.detach()
    own = space.round_trip_error(student_BLHTD.detach())
    lost = [sum_served(own, (alpha.sum(0) > 0).float())]
    for head, alpha_BLT, groups in zip(heads, alpha, targets, strict=True):
        adapters: Any = head.project
        for adapter, group, target in zip(adapters, head.groups, groups, strict=True):
            weight_BLT = alpha_BLT[:, list(group.student_layers)]
            lost.append(sum_served(adapter.round_trip_error(target), weight_BLT))
    return torch.stack(lost).sum() / alpha.shape[2]


def kv_figures(
    compared: Iterable[tuple[object, Tensor, Tensor | Iterable[Tensor]]],
    alpha_NBLT: Tensor,
    errors: Sequence[Tensor],
    num_served: Tensor,
    losses: LossConfig,
) -> dict[str, Tensor]:
    """Mean fusion weights, and what shows whether the target moves, where a teacher serves.

    Args:
        compared: layers, weights of their errors, and targets as for ``target_variance``.
        alpha_NBLT: the fusion weights.
        errors: losses of keys and of values, this batch's shares of a step.
        num_served: of the whole step.
        losses: the error's distance.
    """
    variance = target_variance((target, weight_BLT) for _, weight_BLT, target in compared)
    found = {"alpha": mean_weights(alpha_NBLT), "target_variance": variance}
    if errors and losses.distance == "mse" and not losses.layer_std:
        share = (alpha_NBLT.sum(0) > 0).sum() / num_served.clamp_min(1)
        error = torch.stack(list(errors)).mean().detach() / share
        found["explained_variance"] = explained_variance(error, variance)
    return found
