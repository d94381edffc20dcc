"""CODI's term: the student's hidden state just before the answer, pulled to the teacher's.

Smooth-L1 per layer at the one token from which the answer is predicted, divided by the teacher's
std in that layer (CODI, arXiv 2502.21074; used by KaVa, arXiv 2510.02312). Offline, the teacher's
side is ``hidden_at_cue`` of the store.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kvdistill.errors import GeometryError


def hidden_error(student_BLE: Tensor, target_BLE: Tensor, std_L: Tensor | None = None) -> Tensor:
    """Error per sample, the mean over layers and channels: ``[B]`` float32.

    Args:
        student_BLE: the student's hidden states at the cue, ``[B, L, E]``.
        target_BLE: the teacher's, layer-mapped, in the student's width; detached here.
        std_L: the target's std per layer over the corpus; this batch's if not given.

    Raises:
        GeometryError: the shapes differ (a teacher of another width needs a map first).
    """
    if student_BLE.shape != target_BLE.shape:
        raise GeometryError(
            f"hidden-state loss: student {tuple(student_BLE.shape)} and target "
            f"{tuple(target_BLE.shape)} differ; map the student's states to the teacher's width"
        )
    target = target_BLE.detach().float()
    error = F.smooth_l1_loss(student_BLE.float(), target, reduction="none").mean(2)
    std = target.std(dim=(0, 2), correction=0) if std_L is None else std_L.detach().float()
    return (error / std.clamp_min(1e-6)).mean(1)
