"""A teacher's stored codes against a prediction in one kernel: no target in memory.

``LayerTargets`` decodes a layer, standardises it and places it on the student's tokens, and
``regression`` subtracts and measures: a dozen passes over float32 copies of the layer. On a GPU
``FusedResidual`` does all of it in one pass that reads codes and prediction and writes the gradient
over the prediction. Matrix products stay with the library.

Decoding is the same for every codec: ``codes · step + start``, then for int4's values a rotation.
What is not of that form (``klt``) is decoded a layer at a time and read as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvdistill.distill.align.band import Band
from kvdistill.distill.align.layers import LayerMap
from kvdistill.store.codecs import Codec, Symmetric, by_layer
from kvdistill.store.codecs.int4 import Asymmetric
from kvdistill.store.codecs.klt import Transform
from kvdistill.store.shard import BLOCK_TOKENS
from kvdistill.text import shorten
from kvdistill.types import Distance, Kind


def kernel_fault(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device; None where it can."""
    if device.type != "cuda":
        return "it needs a GPU"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # without a C compiler, Triton cannot build its launcher
        return f"Triton does not work here: {type(error).__name__}: {shorten(str(error), 200)}"
    return None


@dataclass(frozen=True, eq=False)
class Residual:
    """A prediction against its target, token by token, the sum over channels ``[N]``."""

    slope_NO: Tensor
    """Derivative of the error, times the token's weight; half of it where errors are squares."""
    error_N: Tensor
    squared_N: Tensor | None = None
    """Squared residual, where it is measured."""
    energy_N: Tensor | None = None
    """Squared target, where it is measured."""


@dataclass(frozen=True, eq=False)
class AffineCodes:
    """Codes ``[B, L, H, T, D]`` with ``x = codes · step + start``; ``[…, D/2]`` in nibbles."""

    codes: Tensor
    step: Tensor | None = None
    """``[B, L, H, T, 1]``, or of keys ``[B, L, H, blocks, D]``."""
    start: Tensor | None = None
    is_rotated: bool = False

    @staticmethod
    def of(codec: Codec, parts: Mapping[str, Tensor], kind: Kind) -> AffineCodes:
        """The stored parts of any codec but ``klt``."""
        parts = {suffix: x.contiguous() for suffix, x in parts.items()}
        codes = parts[""]
        if isinstance(codec, Asymmetric):
            if kind == "key":
                return AffineCodes(codes, parts["scale"], parts["zero"])
            return AffineCodes(codes, *codec.step_and_start(parts), is_rotated=True)
        if isinstance(codec, Symmetric):
            return AffineCodes(codes, parts["scale"])
        return AffineCodes(codes.view(torch.bfloat16) if codec.name == "bf16" else codes)

    def constants(self, kind: Kind, dim: int) -> dict[str, Any]:
        """What the kernel is compiled for, by its own names; ``dim`` channels."""
        is_packed = self.codes.dtype == torch.uint8  # nibbles, or floats of eight bits
        per_block = self.step is not None and kind == "key"
        width = 1 << (dim - 1).bit_length()
        return {
            "DIM": dim,
            "FORMAT": (1 if self.start is None else 2) if is_packed else 0,
            "HAS_STEP": self.step is not None,
            "HAS_START": self.start is not None,
            "BLOCK_TOKENS": BLOCK_TOKENS if per_block else 0,
            "ROTATED": (dim & -dim).bit_length() - 1 if self.is_rotated else 0,
            "BLOCK_T": max(16, 2048 // max(width, 32)),
            "BLOCK_D": width,
        }


class FusedResidual:
    """One teacher and kind in a batch, compared with predictions one student layer at a time."""

    def __init__(
        self,
        codec: Codec,
        parts: Mapping[str, Tensor],
        kind: Kind,
        *,
        band: Band,
        layers: LayerMap,
        statistics: tuple[Tensor, Tensor],
    ) -> None:
        self._kind, self._layers, self._stored = kind, layers, layers.needed
        self._mean_LHD, self._inverse_LHD = (x.contiguous() for x in statistics)
        self._first, self._weight = band.start.contiguous(), band.weight.contiguous()
        apart = isinstance(codec, Transform)  # decoded one layer at a time
        self._by_layer = by_layer(codec, parts, kind) if apart else None
        self._affine = AffineCodes(parts[""]) if apart else AffineCodes.of(codec, parts, kind)

    def __call__(
        self, row: int, prediction_NO: Tensor, alpha_N: Tensor, distance: Distance, measures: bool
    ) -> Residual:
        """Compare a prediction, whose memory is used for the slope.

        Args:
            row: of the student layers that the teacher's group serves.
            prediction_NO: contiguous, float32 or half; N student tokens, sample by sample.
            alpha_N: weight of every token, float32.
            distance: of the error.
            measures: whether ``squared_N`` and ``energy_N`` are wanted.
        """
        from kvdistill.distill.losses.residual_kernel import residual_kernel

        layers, fraction = self._layers, self._layers.fraction[row]
        ends = [layers.lower[row], layers.upper[row]] if fraction else [layers.lower[row]]
        rows = [self._stored.index(layer) for layer in ends]
        means, inverses, affine = self._mean_LHD, self._inverse_LHD, self._affine
        if self._by_layer is not None:
            affine = AffineCodes(torch.stack([self._by_layer(row) for row in rows], dim=1))
            means, inverses, rows = means[rows], inverses[rows], [*range(len(rows))]
        _, num_heads, dim = means.shape
        samples, num_tokens = self._first.shape
        codes, step, start = affine.codes, affine.step, affine.start
        constants = affine.constants(self._kind, dim)
        figures = alpha_N.new_empty(3 if measures else 1, num_heads, len(alpha_N))
        if figures.numel():
            residual_kernel[-(-num_tokens // constants["BLOCK_T"]), num_heads, samples](
                prediction_NO, prediction_NO, figures, alpha_N,
                codes, codes if step is None else step, codes if start is None else start,
                means, inverses, self._first, self._weight,
                rows[0], rows[-1], fraction, codes.shape[1], num_tokens, codes.shape[3],
                0 if step is None else step.shape[3], self._weight.shape[2],
                HEADS=num_heads, SIDES=len(ends), SMOOTH_L1=distance == "smooth_l1",
                MEASURES=measures, **constants,
            )  # fmt: skip
        return Residual(prediction_NO, *figures.sum(1))
