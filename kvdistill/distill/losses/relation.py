"""How tokens relate to each other, instead of what they are: no head or dim needs to match.

    R = softmax( X Xᵀ / √d ),   KL( R_teacher ‖ R_student ) per token

X are a layer's keys (K-K) or values (V-V), all heads joined and cut again into ``num_relations``
relation heads of width d (MiniLMv2, arXiv 2012.15828). The teacher must be on the student's
tokens (aligned), nothing else: no projector, so nothing that could absorb the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvdistill.distill.losses.attention import masked_kl, visible_pairs
from kvdistill.errors import GeometryError


def relation_error(
    student_BLHTD: Tensor,
    teacher_BLHTD: Tensor,
    mask_BT: Tensor,
    num_relations: int = 1,
    causal: bool = False,
) -> Tensor:
    """KL of relation rows per token, the mean over layers and relation heads: ``[B, T]`` float32.

    Args:
        student_BLHTD: the student's keys or values.
        teacher_BLHTD: the teacher's of the same kind, aligned, layer-mapped, detached here;
            heads and dim may differ.
        mask_BT: tokens that take part.
        num_relations: relation heads; must divide ``H·D`` of both.
        causal: compare each token with earlier ones only.

    Raises:
        GeometryError: samples, layers or tokens differ, or the widths cannot be cut.
    """
    ours, theirs = student_BLHTD.shape, teacher_BLHTD.shape
    uneven = (ours[2] * ours[4]) % num_relations or (theirs[2] * theirs[4]) % num_relations
    if (ours[0], ours[1], ours[3]) != (theirs[0], theirs[1], theirs[3]) or uneven:
        raise GeometryError(
            f"relation loss: student {tuple(ours)} and teacher {tuple(theirs)} must share B, L "
            f"and T, and H·D of both be a multiple of {num_relations} relation heads"
        )
    visible = visible_pairs(mask_BT, causal)
    layers = zip(student_BLHTD.unbind(1), teacher_BLHTD.detach().unbind(1), strict=True)
    maps = [
        checkpoint(_layer, own, teacher, visible, num_relations, use_reentrant=False)
        for own, teacher in layers
    ]
    return torch.stack(maps).mean(0)


def _layer(own_BHTD: Tensor, teacher_BHTD: Tensor, visible: Tensor, num_relations: int) -> Tensor:
    student, teacher = (_relations(x, num_relations) for x in (own_BHTD, teacher_BHTD))
    return masked_kl(teacher, student, visible.unsqueeze(1)).mean(1)


def _relations(x_BHTD: Tensor, num_relations: int) -> Tensor:
    """Unnormalised relation logits ``[B, R, T, T]``."""
    joined = x_BHTD.float().transpose(1, 2)
    x = joined.reshape(*joined.shape[:2], num_relations, -1).transpose(1, 2)
    logits: Tensor = (x * x.shape[-1] ** -0.5) @ x.mT
    return logits
