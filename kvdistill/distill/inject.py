"""The fused teacher KV put into the student's own cache, and what the student then predicts.

    k ← k + σ(g)·k_fused,   v ← v + σ(g)·v_fused      (residual)
    k ← k_fused,            v ← v_fused               (replace)

on the injected positions, before rotation; the cross-entropy of what follows trains projectors
and router towards what is useful, not towards what is easy to imitate (Cache-to-Cache,
arXiv 2510.03215, where residual with a gate is far better than replacement).

Only teachers that read from left to right are injected: an encoder's KV at the prompt has read
the answer, and predicting the answer from it teaches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvdistill.distill.student import KVCapture
from kvdistill.types import KINDS, Kind


class Injector(nn.Module):
    """Gates per layer and kind, and the hooks that put a KV into the student."""

    def __init__(self, capture: KVCapture, style: Literal["residual", "replace"]) -> None:
        super().__init__()
        self.capture, self.style = capture, style
        capture.check_injectable()
        num_layers = capture.geometry.num_layers
        self.gate_KL = nn.Parameter(torch.zeros(len(KINDS), num_layers))

    @contextmanager
    def __call__(self, fused: Mapping[Kind, Tensor], mask_BT: Tensor) -> Iterator[None]:
        """While inside, the student runs with ``fused [B, L, H, T, D]`` where ``mask_BT``."""
        handles = []
        for kind_idx, kind in enumerate(KINDS):
            for layer_idx, tap in enumerate(self.capture.taps(kind)):
                gate = self.gate_KL[kind_idx, layer_idx].sigmoid()
                hook = self._hook(fused[kind][:, layer_idx], gate, mask_BT)
                handles.append(tap.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, fused_BHTD: Tensor, gate: Tensor, mask_BT: Tensor) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            given = self.capture.like_tap(fused_BHTD, output)
            mask = self.capture.like_tap(mask_BT[:, None, :, None].expand_as(fused_BHTD), output)
            new = output + gate.to(output.dtype) * given if self.style == "residual" else given
            return torch.where(mask, new, output)

        return hook
