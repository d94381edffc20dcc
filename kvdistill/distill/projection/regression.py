"""The student's keys and values regressed onto a teacher's fixed ones.

The target is the teacher's own standardised KV and holds no parameter, so it cannot move towards
the student, and a constant student scores exactly the target's variance, 1. The map may mix all
heads and channels of a layer; it is thrown away after training (FitNets, arXiv 1412.6550).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvdistill.distill.projection.layerwise import layerwise, uniform_weights
from kvdistill.distill.projection.shapes import HeadShape, check_kv


class StudentToTeacher(nn.Module):
    """One linear map ``[H_s·D_s] → [H_t·D_t]`` per student layer; one module per teacher, kind."""

    def __init__(self, num_layers: int, source: HeadShape, target: HeadShape) -> None:
        super().__init__()
        self.num_layers, self.source, self.target = num_layers, source, target
        self.weight_LIO = uniform_weights(num_layers, source, target)
        self.bias_LO = nn.Parameter(torch.zeros(num_layers, target.width))

    def forward(self, student_BLHTD: Tensor) -> Tensor:
        """``[B, L, H_s, T, D_s]`` to a guess at ``[B, L, H_t, T, D_t]``.

        Raises:
            GeometryError: layers, heads or dim are not the declared ones.
        """
        check_kv(student_BLHTD, self.num_layers, self.source, "student-to-teacher regression")
        return layerwise(student_BLHTD, self.weight_LIO, self.bias_LO, self.target)
