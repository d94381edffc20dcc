"""Part ``fused`` of ``benchmarks/device.py``: the kernel against eager, by codec.

One teacher's keys or values of a batch against a student's, error and gradients of all layers: time
of the device, and the memory that this takes beyond what is there before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.device_checks import Inapplicable, relative, require
from benchmarks.device_models import Shape

CODECS: Final = (
    ("int8", "key"), ("int8", "value"), ("bf16", "key"), ("fp8_e4m3", "key"), ("int4", "key"),
    ("int4", "value"),
)  # fmt: skip


def require_kernel(device: torch.device) -> None:
    """Raise Inapplicable where neither Triton nor, on a CPU, its interpreter can run the kernel."""
    if find_spec("triton") is None:
        raise Inapplicable("Triton is not installed")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Inapplicable("on a CPU, it needs TRITON_INTERPRET=1")


class FusedCase:
    """A student's keys or values and one teacher's stored ones, at given shapes."""

    def __init__(
        self, device: torch.device, shapes: tuple[Shape, Shape], sizes: tuple[int, int], *how: Any
    ) -> None:
        from kvdistill.attention.geometry import HeadShape
        from kvdistill.config.distill import ProjectionConfig
        from kvdistill.distill.align.band import Band
        from kvdistill.distill.align.layers import layer_map
        from kvdistill.distill.targets import (
            GroupSpace,
            TargetStatistics,
            TeacherHead,
            TeacherSpace,
        )
        from kvdistill.store.codecs import CODECS as STORED
        from kvdistill.types import KINDS, CodecSpec

        codec, kind = how
        (student, teacher), (samples, tokens) = shapes, sizes
        torch.manual_seed(0)
        mapping = layer_map("ratio", student.layers, range(teacher.layers))
        shape = HeadShape(teacher.kv_heads, teacher.head_dim)
        columns = tokens * 7 // 8
        one = torch.randn(len(mapping.needed), *shape, device=device)  # of one token
        one = one[:, :, None] + torch.randn(*one.shape[:2], columns, shape.head_dim, device=device)
        parts = {
            name: x[None].expand(samples, *x.shape).contiguous()
            for name, x in STORED[codec].encode(one, kind).items()
        }
        statistics = TargetStatistics(one.mean(2).cpu(), one.var(2).cpu())
        group = GroupSpace(
            "", tuple(range(student.layers)), mapping, dict.fromkeys(KINDS, shape),
            dict.fromkeys(KINDS, statistics),
        )  # fmt: skip
        space = TeacherSpace("t", CodecSpec(key=codec, value=codec), (group,), causal=True)
        own = HeadShape(student.kv_heads, student.head_dim)
        self.head = TeacherHead(space, kind, own, ProjectionConfig(), projects=False).to(device)
        start = (torch.arange(tokens, device=device) * columns // tokens).expand(samples, -1)
        weight = torch.tensor([0.75, 0.25], device=device).expand(samples, tokens, 2).clone()
        weight[:, -1] = 0
        self._parts, self._band = {"": parts}, Band(start, weight, weight.sum(-1) > 0)
        size = samples, student.layers, *own
        self.student = torch.randn(*size[:3], tokens, size[3], device=device, requires_grad=True)
        self.alpha = self._band.covered[:, None].float() / samples / tokens
        self._device = device

    def step(self, *, fused: bool) -> list[Tensor]:
        """The error and its gradients for the student and the head."""
        from kvdistill.distill.losses.regression import regression_error

        self.head.is_fused = fused
        regressions = self.head.regressions(self.head.layers(self._parts, self._band), self.alpha)
        with torch.autocast(self._device.type, torch.bfloat16, self._device.type == "cuda"):
            error = regression_error(self.student, regressions)
        return [error, *torch.autograd.grad(error, [self.student, *self.head.parameters()])]

    def difference(self) -> float:
        """Of the kernel from eager, the largest over error and gradients."""
        pairs = zip(self.step(fused=True), self.step(fused=False), strict=True)
        bound = 1e-2 if self._device.type == "cuda" else 1e-4  # bfloat16, float32
        return require("fused", max(relative(mine, theirs) for mine, theirs in pairs), bound)


def peak_bytes(work: Callable[[], object]) -> int:
    """Device memory that work takes beyond what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before
