"""The error of regressing the student's KV onto teachers, with its gradients, in one sweep.

    loss = Σ_tokens  1/L Σ_layers  Σ_teachers  α · 1/(H·D) ‖ x W + b − y ‖²

Written as a guess, a difference, a norm and their backward passes, this moves several float32
copies of every teacher's KV through memory. Here each layer's residual is made, measured and
turned into gradients while it is in the cache, and then dropped: nothing of the teachers' size is
kept for a backward pass, which only multiplies by what comes from above. The sum over tokens is
taken inside, because the gradient of ``W`` needs each token's share at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvdistill.errors import GeometryError
from kvdistill.types import Distance


@dataclass(frozen=True, eq=False)
class Regression:
    """Maps of one teacher (or of one group of its layers) and what they should give."""

    weight_LIO: Tensor
    bias_LO: Tensor
    student_layers: tuple[int, ...]
    """The student layer of each row of ``weight_LIO``."""
    target: Callable[[int], Tensor]
    """Row → ``[B, H_t, T, D_t]``, without gradient."""
    alpha_BLT: Tensor
    """How much each token counts in each student layer; L may be 1."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def regression_error(
    student_BLHTD: Tensor, regressions: Sequence[Regression], distance: Distance = "mse"
) -> Tensor:
    """Sum over tokens of the α-weighted error, the mean over student layers: a float32 scalar.

    Equals ``kv_error`` of ``StudentToTeacher``'s guess, times α, summed; gradients reach the
    student, the maps and α. Float64 in, float64 out. Under autocast, products are in its dtype.

    Args:
        student_BLHTD: the student's keys or values.
        regressions: of all teachers; any number of them may serve a layer.
        distance: ``mse`` or ``smooth_l1``.

    Raises:
        GeometryError: a target's samples, tokens or channels are not its map's.
    """
    parameters = [x for r in regressions for x in (r.weight_LIO, r.bias_LO, r.alpha_BLT)]
    error: Tensor = _Sweep.apply(  # type: ignore[no-untyped-call]
        student_BLHTD, tuple(regressions), distance, *parameters
    )
    return error


class _Sweep(torch.autograd.Function):
    """Forward makes the gradients too; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        regressions: tuple[Regression, ...],
        distance: Distance,
        *parameters: Tensor,
    ) -> Tensor:
        device = student.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else student.dtype
        slopes = [_Slopes(regression, dtype) for regression in regressions]
        sums = _Sums(student, slopes, distance, differentiates=any(ctx.needs_input_grad))
        with torch.autocast(device, enabled=False):
            for layer in range(student.shape[1]):
                sums.add(layer, student[:, layer])
        found = [sums.student]
        for one in slopes:
            found += [one.weight, one.bias, one.alpha]
        ctx.save_for_backward(*found)
        return sums.total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, *parameters = (
            upstream * x if wanted else None
            for x, wanted in zip(ctx.saved_tensors, _of_tensors(ctx.needs_input_grad), strict=True)
        )
        return student, None, None, *parameters


def _of_tensors(wanted: Sequence[bool]) -> list[bool]:
    """Without the two arguments that are no tensors."""
    return [wanted[0], *wanted[3:]]


class _Slopes:
    """One regression's gradients for an upstream gradient of 1, filled layer by layer."""

    def __init__(self, regression: Regression, dtype: torch.dtype) -> None:
        self.of = regression
        exact = torch.promote_types(dtype, torch.float32)
        self.rows = {layer: row for row, layer in enumerate(regression.student_layers)}
        self.weight_LIO = regression.weight_LIO.to(dtype)
        self.bias_LO = regression.bias_LO.to(dtype)
        self.weight = torch.zeros_like(regression.weight_LIO, dtype=exact)
        self.bias = torch.zeros_like(regression.bias_LO, dtype=exact)
        self.alpha = torch.zeros_like(regression.alpha_BLT, dtype=exact)

    def residual(self, row: int, x_NI: Tensor, shape: tuple[int, int]) -> Tensor:
        """``x W + b − y`` of one layer, ``[N, O]`` in at least float32."""
        target_BHTD = self.of.target(row)
        heads, dim = target_BHTD.shape[1], target_BHTD.shape[3]
        wanted = (*shape, heads * dim)
        got = (target_BHTD.shape[0], target_BHTD.shape[2], self.bias_LO.shape[1])
        if wanted != got:
            raise GeometryError(
                f"regression: expected targets of (samples, tokens, channels) {got}, got a "
                f"student and targets of {wanted}; align and layer-map first"
            )
        guess = torch.addmm(self.bias_LO[row], x_NI, self.weight_LIO[row])
        residual = guess.to(self.weight.dtype)
        residual.view(*shape, heads, dim).sub_(target_BHTD.transpose(1, 2))
        return residual


class _Sums:
    """The total, and every gradient of it, as layers are added."""

    def __init__(
        self, student: Tensor, slopes: list[_Slopes], distance: Distance, *, differentiates: bool
    ) -> None:
        self.slopes, self._distance, self._differentiates = slopes, distance, differentiates
        self._num_layers = student.shape[1]
        self._exact = torch.promote_types(student.dtype, torch.float32)
        self.total = student.new_zeros((), dtype=self._exact)
        self.student = torch.zeros_like(student, memory_format=torch.contiguous_format)

    def add(self, layer: int, student_BHTD: Tensor) -> None:
        """Count one student layer."""
        b, heads, t, dim = student_BHTD.shape
        x = student_BHTD.transpose(1, 2).reshape(b * t, heads * dim)
        grad = torch.zeros_like(x, dtype=self._exact)
        for slopes in self.slopes:
            if layer in slopes.rows:
                self._add(slopes, layer, x, grad, (b, t))
        self.student[:, layer] = grad.view(b, t, heads, dim).transpose(1, 2)

    def _add(
        self,
        slopes: _Slopes,
        layer: int,
        x_NI: Tensor,
        grad_NI: Tensor,
        shape: tuple[int, int],
    ) -> None:
        row = slopes.rows[layer]
        x = x_NI.to(slopes.weight_LIO.dtype)
        residual = slopes.residual(row, x, shape)
        share = 1 / (residual.shape[1] * self._num_layers)
        of_layer = layer if slopes.alpha.shape[1] > 1 else 0
        alpha = slopes.of.alpha_BLT[:, of_layer].reshape(-1, 1).to(residual.dtype)
        error_N = share * _token_error(residual, self._distance)
        self.total += torch.dot(error_N, alpha.squeeze(1))
        if not self._differentiates:
            return
        slopes.alpha[:, of_layer] += error_N.view(shape)
        if self._distance == "mse":
            slope, share = residual.mul_(alpha), 2 * share
        else:
            slope = residual.clamp_(-1, 1).mul_(alpha)
        slopes.bias[row] = share * slope.sum(0)
        _add_product(slopes.weight[row], x.T, slope, share)
        _add_product(grad_NI, slope, slopes.weight_LIO[row].T, share)


def _token_error(residual_NO: Tensor, distance: Distance) -> Tensor:
    """Per token, the sum over channels."""
    if distance == "mse":
        norm: Tensor = torch.linalg.vector_norm(residual_NO, dim=1)
        return norm.square()
    size = residual_NO.abs()
    return torch.where(size < 1, 0.5 * size.square(), size - 0.5).sum(1)


def _add_product(out: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """``out += factor · left @ right``, the product in the narrower dtype of both."""
    dtype = left.dtype if left.dtype.itemsize < right.dtype.itemsize else right.dtype
    if dtype == out.dtype:
        out.addmm_(left, right, alpha=factor)
    else:
        out.add_((left.to(dtype) @ right.to(dtype)).to(out.dtype), alpha=factor)
