"""Layers matched by how alike they already are, measured on a pilot.

    CKA(X, Y) = ‖Yᵀ X‖² / (‖Xᵀ X‖ · ‖Yᵀ Y‖),   X, Y centred, Frobenius norms

(Similarity of Neural Network Representations Revisited, arXiv 1905.00414.) It needs no equal
widths and ignores rotations and scale. The matching is the monotone one of largest sum, found by
dynamic programming. An untrained student is like nothing, so this is for pretrained ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvdistill.distill.alignment.layers import LayerMap
from kvdistill.errors import ConfigError, GeometryError


def linear_cka(student_LNC: Tensor, teacher_LNC: Tensor) -> Tensor:
    """Similarity of every student layer to every teacher layer: ``[L_s, L_t]`` in [0, 1].

    Args:
        student_LNC: ``[L_s, N, C_s]``: N aligned tokens, all heads and channels of a layer.
        teacher_LNC: ``[L_t, N, C_t]``: the same tokens.

    Raises:
        GeometryError: the numbers of tokens differ.
    """
    if student_LNC.shape[1] != teacher_LNC.shape[1]:
        raise GeometryError(
            f"cka: {student_LNC.shape[1]} student tokens and {teacher_LNC.shape[1]} teacher "
            "tokens; align them first"
        )
    x = student_LNC.float() - student_LNC.float().mean(1, keepdim=True)
    y = teacher_LNC.float() - teacher_LNC.float().mean(1, keepdim=True)
    norm_x, norm_y = _self_norm(x), _self_norm(y)
    cross = torch.stack([torch.einsum("nc,lnd->lcd", one, y).square().sum((1, 2)) for one in x])
    return cross / (norm_x[:, None] * norm_y[None]).clamp_min(torch.finfo(torch.float32).tiny)


def monotone_map(similarity: Tensor, teacher_layers: Sequence[int]) -> LayerMap:
    """The non-decreasing assignment of student to teacher layers of largest total similarity.

    Args:
        similarity: ``[L_s, L_t]``, such as the mean of keys' and values' ``linear_cka``.
        teacher_layers: which teacher layer each column is, ascending.

    Raises:
        ConfigError: similarities are not finite, or of another number of teacher layers.
    """
    num_student, num_teacher = similarity.shape
    if num_teacher != len(teacher_layers) or not bool(torch.isfinite(similarity).all()):
        raise ConfigError(
            f"alignment.layers: cka needs finite similarities to {len(teacher_layers)} teacher "
            f"layers, got {tuple(similarity.shape)}"
        )
    scores = similarity.double()
    # best[j]: largest sum so far with the newest student layer at a teacher layer ≤ j.
    best, choices = torch.zeros(num_teacher, dtype=torch.float64), []
    for row in scores.cpu():
        best, choice = torch.cummax(best + row, dim=0)
        choices.append(choice)
    picked, limit = [], num_teacher - 1
    for choice in reversed(choices):
        limit = int(choice[limit])
        picked.append(teacher_layers[limit])
    layers = tuple(reversed(picked))
    return LayerMap(layers, layers, (0.0,) * num_student)


def _self_norm(x_LNC: Tensor) -> Tensor:
    return torch.einsum("lnc,lnd->lcd", x_LNC, x_LNC).square().sum((1, 2)).sqrt()
