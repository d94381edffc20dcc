"""The K/V errors of a step, per token and by the name of their weight in the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from kvdistill.config.distill import LossConfig
from kvdistill.distill.losses.attention_maps import relation_error
from kvdistill.distill.losses.pointwise import cosine_error, kv_error, layer_std
from kvdistill.distill.losses.regression import regression_error
from kvdistill.distill.student.outputs import StudentView
from kvdistill.distill.targets import TargetOf, TeacherHead
from kvdistill.types import KINDS, Kind

Rows = dict[Kind, list[Sequence[TargetOf]]]
"""Per kind, teacher and group: what gives the target of a student layer."""


def rows_of(targets: Mapping[Kind, Sequence[Sequence[Tensor]]]) -> Rows:
    """Targets that are there already, row by row."""
    return {
        kind: [[partial(torch.select, x, 1) for x in groups] for groups in teachers]
        for kind, teachers in targets.items()
    }


def regression_sums(
    view: StudentView,
    heads: Mapping[Kind, Sequence[TeacherHead]],
    rows: Rows,
    alpha_NBLT: Tensor,
    losses: LossConfig,
) -> dict[str, Tensor]:
    """In mode ``student_to_teacher``: the errors of keys and of values, summed over tokens.

    Args:
        view: the student.
        heads: per kind, one per teacher.
        rows: per kind and teacher, the targets of its groups.
        alpha_NBLT: fusion weights; L may be 1.
        losses: which errors are wanted, and how a difference is measured.
    """
    sums: dict[str, Tensor] = {}
    for kind in KINDS:
        if losses.weights()[kind]:
            of_kind = zip(heads[kind], rows[kind], alpha_NBLT, strict=True)
            regressions = [
                one for head, targets, alpha in of_kind for one in head.regressions(targets, alpha)
            ]
            sums[kind] = regression_error(view.kind(kind), regressions, losses.distance)
    return sums


def teacher_errors(
    student_BLHTD: Tensor,
    heads: Sequence[TeacherHead],
    targets: Sequence[Sequence[Tensor]],
    alpha_NBLT: Tensor,
    losses: LossConfig,
) -> dict[str, Tensor]:
    """One kind in mode ``student_to_teacher``: cosine and relation, mixed by teachers' weights.

    The error itself is ``losses.regression_error``, which keeps no guess.

    Args:
        student_BLHTD: the student's keys or values.
        heads: one per teacher, of that kind.
        targets: per teacher and group.
        alpha_NBLT: fusion weights; L may be 1.
        losses: which errors are wanted.

    Returns:
        ``[B, T]`` maps: ``cosine`` and ``relation`` where wanted.
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
            runs = (
                _runs_of_equal_weight(weight_BLT, alpha_NBLT.shape[2] > 1) if losses.cosine else []
            )
            for start, stop in runs:
                share = (stop - start) / num_layers
                ours, theirs = guess[:, start:stop], target[:, start:stop]
                add("cosine", weight_BLT[:, start] * share * cosine_error(ours, theirs))
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


def merge_kinds(keys: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Errors of both kinds; those that keys and values share a weight for are averaged."""
    shared = {name: (keys[name] + values[name]) / len(KINDS) for name in keys.keys() & values}
    return keys | values | shared


def _runs_of_equal_weight(weight_BLT: Tensor, by_layer: bool) -> list[tuple[int, int]]:
    """Layers that share a weight: all of them, or each its own where a router tells them apart."""
    num_layers = weight_BLT.shape[1]
    return [(i, i + 1) for i in range(num_layers)] if by_layer else [(0, num_layers)]
