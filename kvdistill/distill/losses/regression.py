"""The error of regressing the student's KV onto teachers, with its gradients, in one pass.

    loss = Σ_tokens  1/L Σ_layers  Σ_teachers  α · 1/(H·D) ‖ x W + b + relu(x U + c) V − y ‖²

``U``, ``c`` and ``V`` are those of a head with a hidden layer; most heads have none.

Written as a prediction, a difference, a norm and their backward passes, this moves several float32
copies of every teacher's KV through memory. Here each layer's residual is computed, measured and
turned into gradients while it is in the cache, then discarded. Nothing of the teachers' size is
kept for the backward pass, which only scales the gradients. On a GPU, ``fused_residual`` compares
with stored codes instead of targets. The sum over tokens is taken inside, because the gradient of
``W`` needs every token's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvdistill.distill.fuse.balance import Balancing
from kvdistill.distill.losses.fused_residual import FusedResidual, Residual
from kvdistill.types import Distance


@dataclass(frozen=True, eq=False)
class Regression:
    """Maps of one teacher (or of one group of its layers), their targets and their weights."""

    weight_LIO: Tensor
    bias_LO: Tensor
    student_layers: tuple[int, ...]
    """The student layer of each row of ``weight_LIO``."""
    target: Callable[[int], Tensor]
    """Row → ``[B, H_t, T, D_t]``, without gradient."""
    alpha_BLT: Tensor
    """Weight and mask in one: how much each token counts in each student layer, 0 where it does
    not; L may be 1."""
    teacher: int = 0
    """Whose it is, for a balance; of one teacher's regressions one at most serves a layer."""
    hidden: tuple[Tensor, ...] = ()
    """``U [L, I, M]``, ``c [L, M]`` and ``V [L, M, O]``, where there is a hidden layer."""
    fused: FusedResidual | None = None
    """Compares with the same targets without making them."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What has a gradient beside the student."""
        return self.weight_LIO, self.bias_LO, self.alpha_BLT, *self.hidden


@torch.compiler.disable  # type: ignore[untyped-decorator]
def regression_error(
    student_BLHTD: Tensor,
    regressions: Sequence[Regression],
    distance: Distance = "mse",
    balancing: Balancing | None = None,
) -> Tensor:
    """Sum over tokens of the α-weighted error, the mean over student layers: a float32 scalar.

    Equals ``kv_error`` of ``StudentToTeacher``'s prediction, times α, summed. Gradients flow into
    the student, the maps and α. Float64 in, float64 out. Under autocast, matrix products are in its
    dtype.

    Args:
        student_BLHTD: the student's keys or values.
        regressions: of all teachers; any number of them may serve a layer.
        distance: ``mse`` or ``smooth_l1``.
        balancing: combines the teachers' gradients at the student, in place of their sum. Neither
            the error nor the gradients of maps and α depend on it.
    """
    parameters = [x for r in regressions for x in r.parameters]
    error: Tensor = _FusedRegression.apply(  # type: ignore[no-untyped-call]
        student_BLHTD, tuple(regressions), distance, balancing, *parameters
    )
    return error


class _FusedRegression(torch.autograd.Function):
    """Forward computes the gradients too; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        regressions: tuple[Regression, ...],
        distance: Distance,
        balancing: Balancing | None,
        *parameters: Tensor,
    ) -> Tensor:
        device = student.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else student.dtype
        terms = [_Term(regression, distance, dtype) for regression in regressions]
        b, num_layers, heads, t, dim = student.shape
        differentiates = any(ctx.needs_input_grad)
        exact = torch.promote_types(student.dtype, torch.float32)
        total = student.new_zeros((), dtype=exact)
        gradient = torch.zeros_like(student, memory_format=torch.contiguous_format)
        with torch.autocast(device, enabled=False):
            for layer in range(num_layers):
                x_BTI = student[:, layer].transpose(1, 2).reshape(b, t, heads * dim)
                grad_NI = student.new_zeros(b * t, heads * dim, dtype=exact)
                apart: dict[int, Tensor] = {}
                for term in terms:
                    if layer in term.rows:
                        into = grad_NI if differentiates else None
                        if balancing is not None and differentiates:
                            into = apart[term.teacher] = torch.zeros_like(grad_NI)
                        total += term.add(layer, x_BTI, into, num_layers, balancing)
                if balancing is not None and apart:
                    grad_NI = balancing.combine(layer, apart, b)
                gradient[:, layer] = grad_NI.view(b, t, heads, dim).transpose(1, 2)
        ctx.save_for_backward(gradient, *(x for term in terms for x in term.gradients))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        first, _, _, _, *others = ctx.needs_input_grad  # three arguments are no tensors
        student, *parameters = (
            upstream * x if wanted else None
            for x, wanted in zip(ctx.saved_tensors, [first, *others], strict=True)
        )
        return student, None, None, None, *parameters


class _Term:
    """One regression, and its gradients for an upstream gradient of 1, filled layer by layer."""

    def __init__(self, regression: Regression, distance: Distance, dtype: torch.dtype) -> None:
        self._of, self._distance, self.teacher = regression, distance, regression.teacher
        self.rows = {layer: row for row, layer in enumerate(regression.student_layers)}
        self._weight_LIO = regression.weight_LIO.to(dtype)
        self._bias_LO = regression.bias_LO.to(dtype)
        self._hidden = [x.to(dtype) for x in regression.hidden]
        self._exact = torch.promote_types(dtype, torch.float32)
        self.gradients = [torch.zeros_like(x, dtype=self._exact) for x in regression.parameters]

    def add(
        self,
        layer: int,
        student_BTI: Tensor,
        grad_NI: Tensor | None,
        num_layers: int,
        balancing: Balancing | None,
    ) -> Tensor:
        """The error of one student layer; its gradient is added to ``grad_NI`` if there is one."""
        weight_grad, bias_grad, alpha_grad, *hidden_grads = self.gradients
        row, alpha_row = self.rows[layer], layer if alpha_grad.shape[1] > 1 else 0
        x_NI = student_BTI.flatten(0, 1).to(self._weight_LIO.dtype)
        inner_NM = self._inner(row, x_NI)
        share = 1 / (bias_grad.shape[1] * num_layers)
        alpha_N = self._of.alpha_BLT[:, alpha_row].reshape(-1).to(self._exact)
        measures = grad_NI is not None and balancing is not None and balancing.measures
        found = self._compare(row, self._predict(row, x_NI, inner_NM), alpha_N, measures)
        error_N = share * found.error_N
        if grad_NI is not None:
            if balancing is not None:
                balancing.measure(layer, self.teacher, alpha_N, found)
            alpha_grad[:, alpha_row] += error_N.view(student_BTI.shape[:2])
            slope, scale = found.slope_NO, share * (2 if self._distance == "mse" else 1)
            bias_grad[row] = scale * slope.sum(0, dtype=self._exact)
            _add_product(weight_grad[row], x_NI.T, slope, scale)
            _add_product(grad_NI, slope, self._weight_LIO[row].T, scale)
            if inner_NM is not None:
                up, _, down = self._hidden
                back_NM = (slope.to(inner_NM.dtype) @ down[row].T).masked_fill_(inner_NM <= 0, 0)
                _add_product(hidden_grads[0][row], x_NI.T, back_NM, scale)
                hidden_grads[1][row] = scale * back_NM.sum(0)
                _add_product(hidden_grads[2][row], inner_NM.T, slope, scale)
                _add_product(grad_NI, back_NM, up[row].T, scale)
        return torch.dot(error_N, alpha_N)

    def _inner(self, row: int, x_NI: Tensor) -> Tensor | None:
        """``relu(x U + c)`` of one layer, ``[N, M]``; None without a hidden layer."""
        if not self._hidden:
            return None
        up, bias, _ = self._hidden
        return torch.addmm(bias[row], x_NI, up[row]).relu_()

    def _predict(self, row: int, x_NI: Tensor, inner_NM: Tensor | None) -> Tensor:
        """``x W + b + inner V`` of one layer, ``[N, O]``; a sum of products in float32 or more."""
        predicted = torch.addmm(self._bias_LO[row], x_NI, self._weight_LIO[row])
        if inner_NM is not None:
            predicted = predicted.to(self._exact)
            _add_product(predicted, inner_NM, self._hidden[2][row], 1.0)
        return predicted

    def _compare(self, row: int, predicted_NO: Tensor, alpha_N: Tensor, measures: bool) -> Residual:
        """The prediction, which is overwritten, against the target of one layer."""
        if self._of.fused is not None:
            return self._of.fused(row, predicted_NO, alpha_N, self._distance, measures)
        target_BHTD = self._of.target(row)
        samples, heads, tokens, dim = target_BHTD.shape
        residual = predicted_NO.to(self._exact)
        residual.view(samples, tokens, heads, dim).sub_(target_BHTD.transpose(1, 2))
        squared_N = energy_N = None
        if measures or self._distance == "mse":
            norm: Tensor = torch.linalg.vector_norm(residual, dim=1)
            error_N = squared_N = norm.square()
        if measures:
            energy_N = target_BHTD.square().sum(dim=(1, 3)).flatten().to(alpha_N.dtype)
        if self._distance == "smooth_l1":
            size = residual.abs()
            error_N = torch.where(size < 1, 0.5 * size.square(), size - 0.5).sum(1)
            residual.clamp_(-1, 1)
        return Residual(residual.mul_(alpha_N[:, None]), error_N, squared_N, energy_N)


def _add_product(out: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """``out += factor · left @ right``, the product in the narrower dtype of both."""
    dtype = left.dtype if left.dtype.itemsize < right.dtype.itemsize else right.dtype
    if dtype == out.dtype:
        out.addmm_(left, right, alpha=factor)
    else:
        out.add_((left.to(dtype) @ right.to(dtype)).to(out.dtype), alpha=factor)
