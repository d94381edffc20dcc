"""Several teachers as one target: ``KV = Σ_i α_i KV_i``.

A token that a teacher does not cover drops out of its sum and the other weights grow to fill the
gap, so a teacher that covers nothing changes nothing, and one teacher fused is that teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvdistill.errors import GeometryError


def fuse(alpha_NBLT: Tensor, teachers_BLHTD: Sequence[Tensor]) -> Tensor:
    """Weighted sum of aligned, projected teachers.

    Args:
        alpha_NBLT: renormalised weights (``renormalise``); B, L, T may be 1.
        teachers_BLHTD: N tensors of one shape ``[B, L, H, T, D]``, finite.

    Returns:
        ``[B, L, H, T, D]``; zeros where no teacher covers a token.

    Raises:
        GeometryError: the teachers' shapes differ, or there are not N of them.
    """
    shapes = {tuple(teacher.shape) for teacher in teachers_BLHTD}
    if len(shapes) != 1 or len(teachers_BLHTD) != alpha_NBLT.shape[0]:
        raise GeometryError(
            f"fusion: expected {alpha_NBLT.shape[0]} teachers of one shape [B, L, H, T, D], "
            f"got {[tuple(teacher.shape) for teacher in teachers_BLHTD]}; project them first"
        )
    first, *others = teachers_BLHTD
    alpha_NBLHTD = alpha_NBLT[:, :, :, None, :, None].to(first.dtype)
    fused = first * alpha_NBLHTD[0]
    for alpha, teacher in zip(alpha_NBLHTD[1:], others, strict=True):
        fused = torch.addcmul(fused, teacher, alpha)
    return fused
