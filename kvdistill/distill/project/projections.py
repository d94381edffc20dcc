"""Closed-form first weights of a projection: where it stands before anything is learned."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdistill.attention.geometry import HeadShape, check_kv
from kvdistill.distill.losses.pointwise import kv_error
from kvdistill.errors import ConfigError
from kvdistill.types import ProjectionInit


def grouped_mean(num_from: int, num_to: int) -> Tensor:
    """Head weights ``[num_from, num_to]``: every new head is the mean of the heads it stands for.

    Heads are laid on one line, both ways of cutting it, and overlap gives the weight. Where
    ``num_to`` divides ``num_from`` that is the mean of each group (as grouped-query attention
    pools heads, arXiv 2305.13245); the other way round it repeats; otherwise a head that lies
    across a cut is shared. Columns sum to one.
    """
    old = torch.linspace(0, 1, num_from + 1, dtype=torch.float64)
    new = torch.linspace(0, 1, num_to + 1, dtype=torch.float64)
    upper = torch.minimum(old[1:, None], new[None, 1:])
    lower = torch.maximum(old[:-1, None], new[None, :-1])
    overlap = (upper - lower).clamp_min(0)
    overlap[overlap < 1e-12] = 0
    return (overlap / overlap.sum(0)).float()


def identity(dim_from: int, dim_to: int) -> Tensor:
    """Dim weights ``[dim_from, dim_to]``: the identity, cut off or padded with zeros."""
    return torch.eye(dim_from, dim_to)


def orthogonal(dim_from: int, dim_to: int) -> Tensor:
    """Random ``[dim_from, dim_to]`` with orthonormal rows or columns, whichever are fewer."""
    return torch.nn.init.orthogonal_(torch.empty(dim_from, dim_to))


def joint_map(heads: Tensor, dims: Tensor) -> Tensor:
    """One map ``[H·D, H'·D']`` that equals applying ``dims [D, D']`` and then ``heads [H, H']``."""
    return torch.kron(heads, dims)


def layerwise(x_BLHTD: Tensor, weight_LIO: Tensor, bias_LO: Tensor, target: HeadShape) -> Tensor:
    """``[B, L, H, T, D]`` to ``[B, L, H', T, D']`` by ``weight [L, H·D, H'·D']`` and a bias."""
    b, num_layers, num_heads, t, dim = x_BLHTD.shape
    flat = x_BLHTD.permute(1, 0, 3, 2, 4).reshape(num_layers, b * t, num_heads * dim)
    out = torch.baddbmm(bias_LO.unsqueeze(1), flat, weight_LIO)
    return out.view(num_layers, b, t, *target).permute(1, 0, 3, 2, 4)


def uniform_weights(num_layers: int, source: HeadShape, target: HeadShape) -> nn.Parameter:
    """``[L, I, O]`` from U(−1/√I, 1/√I), as ``nn.Linear`` draws its own."""
    bound = 1 / math.sqrt(source.width)
    return nn.Parameter(torch.empty(num_layers, source.width, target.width).uniform_(-bound, bound))


class FullProjection(nn.Module):
    """Teacher space to student space by one joint map of ``H_t·D_t → H_s·D_s`` per layer.

    The richest linear map, and the largest: ``L·H_t·D_t·H_s·D_s`` numbers per teacher and kind.
    Starts as the same map as ``LinearProjection`` does.
    """

    def __init__(
        self, num_layers: int, source: HeadShape, target: HeadShape, init: str = "grouped_mean"
    ) -> None:
        super().__init__()
        self.num_layers, self.source, self.target = num_layers, source, target
        if init == "orthogonal":
            maps = [orthogonal(source.width, target.width) for _ in range(num_layers)]
        else:
            heads = grouped_mean(source.num_heads, target.num_heads)
            maps = [torch.kron(heads, identity(source.head_dim, target.head_dim))] * num_layers
        self.weight_LIO = nn.Parameter(torch.stack(maps))
        self.bias_LO = nn.Parameter(torch.zeros(num_layers, target.width))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """``[B, L, H_t, T, D_t]`` to ``[B, L, H_s, T, D_s]``.

        Raises:
            GeometryError: layers, heads or dim are not the declared ones.
        """
        check_kv(x_BLHTD, self.num_layers, self.source, "full projection")
        return layerwise(x_BLHTD, self.weight_LIO, self.bias_LO, self.target)


class LinearProjection(nn.Module):
    """Per-layer head-dim and head matrices; one module per teacher and kind."""

    def __init__(
        self,
        num_layers: int,
        source: HeadShape,
        target: HeadShape,
        init: ProjectionInit = "grouped_mean",
    ) -> None:
        super().__init__()
        self.num_layers, self.source, self.target = num_layers, source, target
        heads = grouped_mean(source.num_heads, target.num_heads)
        dims = [
            orthogonal(source.head_dim, target.head_dim)
            if init == "orthogonal"
            else identity(source.head_dim, target.head_dim)
            for _ in range(num_layers)
        ]
        self.dim_LDE = nn.Parameter(torch.stack(dims))
        self.head_LHG = nn.Parameter(heads.repeat(num_layers, 1, 1))
        self.bias_LGE = nn.Parameter(torch.zeros(num_layers, *target))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """``[B, L, H_t, T, D_t]`` to ``[B, L, H_s, T, D_s]``.

        Raises:
            GeometryError: layers, heads or dim are not the declared ones.
        """
        check_kv(x_BLHTD, self.num_layers, self.source, "projection")
        b, num_layers, num_heads, t, dim = x_BLHTD.shape
        # Both products read the heads where they lie; an einsum would first reorder all of x.
        rows = x_BLHTD.reshape(b, num_layers, num_heads * t, dim) @ self.dim_LDE
        columns = rows.view(b, num_layers, num_heads, t * self.target.head_dim)
        mixed = (self.head_LHG.mT @ columns).view(b, num_layers, -1, t, self.target.head_dim)
        return mixed + self.bias_LGE[:, :, None]


class BottleneckProjection(nn.Module):
    """Linear, GELU, linear per layer; both linear maps start orthogonal."""

    def __init__(
        self, num_layers: int, source: HeadShape, target: HeadShape, mlp_ratio: float = 0.5
    ) -> None:
        super().__init__()
        if mlp_ratio <= 0:
            raise ConfigError(f"projection.mlp_ratio: expected > 0, got {mlp_ratio}")
        self.num_layers, self.source, self.target = num_layers, source, target
        width = max(1, round(mlp_ratio * math.sqrt(source.width * target.width)))
        self.inner = HeadShape(1, width)
        layers = range(num_layers)
        self.down_LIO = nn.Parameter(torch.stack([orthogonal(source.width, width) for _ in layers]))
        self.up_LIO = nn.Parameter(torch.stack([orthogonal(width, target.width) for _ in layers]))
        self.down_bias_LO = nn.Parameter(torch.zeros(num_layers, width))
        self.up_bias_LO = nn.Parameter(torch.zeros(num_layers, target.width))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """``[B, L, H_t, T, D_t]`` to ``[B, L, H_s, T, D_s]``.

        Raises:
            GeometryError: layers, heads or dim are not the declared ones.
        """
        check_kv(x_BLHTD, self.num_layers, self.source, "bottleneck projection")
        inner = F.gelu(layerwise(x_BLHTD, self.down_LIO, self.down_bias_LO, self.inner))
        return layerwise(inner, self.up_LIO, self.up_bias_LO, self.target)


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


class SpaceAdapter(nn.Module):
    """One model's way into the shared space and back, per layer and for one kind.

    Both maps are linear; ``back`` starts as the transpose of ``to``, its pseudo-inverse.
    """

    def __init__(self, num_layers: int, model: HeadShape, space: HeadShape) -> None:
        super().__init__()
        self.num_layers, self.model, self.space = num_layers, model, space
        to = torch.stack([orthogonal(model.width, space.width) for _ in range(num_layers)])
        self.to_LIO = nn.Parameter(to)
        self.back_LOI = nn.Parameter(to.mT.contiguous())
        self.to_bias_LO = nn.Parameter(torch.zeros(num_layers, space.width))
        self.back_bias_LI = nn.Parameter(torch.zeros(num_layers, model.width))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """The model's KV ``[B, L, H, T, D]`` in the shared space, ``[B, L, H_z, T, D_z]``.

        Raises:
            GeometryError: layers, heads or dim are not the model's.
        """
        check_kv(x_BLHTD, self.num_layers, self.model, "shared space")
        return layerwise(x_BLHTD, self.to_LIO, self.to_bias_LO, self.space)

    def out_of(self, z_BLHTD: Tensor) -> Tensor:
        """Latents ``[B, L, H_z, T, D_z]`` as the model's KV, ``[B, L, H, T, D]``.

        Raises:
            GeometryError: layers, heads or dim are not the space's.
        """
        check_kv(z_BLHTD, self.num_layers, self.space, "shared space")
        return layerwise(z_BLHTD, self.back_LOI, self.back_bias_LI, self.model)

    def round_trip_error(self, x_BLHTD: Tensor) -> Tensor:
        """What a model loses by going into the space and back: ``[B, T]`` float32."""
        return kv_error(self.out_of(self(x_BLHTD)), x_BLHTD)


# MERGED-DOC distill.projection.layerwise
# One linear map per layer between whole layers of two models, heads and channels mixed freely.


# MERGED-DOC distill.projection.linear
# Teacher space to student space in two linear steps: head dim, then heads.
#
#     [B, L, H_t, T, D_t] → [B, L, H_t, T, D_s] → [B, L, H_s, T, D_s]
#
# Two small matrices per layer instead of one of ``H_t·D_t × H_s·D_s``: it cannot mix channels of
# different heads, but every pair of shapes fits, and its first weights mean something
# (grouped means of heads, a truncated identity of dims).


# MERGED-DOC distill.projection.bottleneck
# Teacher space to student space through a narrower, non-linear middle.
#
#     inner = round( mlp_ratio · √(H_t·D_t · H_s·D_s) )
#
# "Elastic": the middle follows from the widths of both models, so one ratio serves every pair of
# a teacher and a student.


# MERGED-DOC distill.projection.regression
# The student's keys and values regressed onto a teacher's fixed ones.
#
# The target is the teacher's own standardised KV and holds no parameter, so it cannot move towards
# the student, and a constant student scores exactly the target's variance, 1. The map may mix all
# heads and channels of a layer; it is thrown away after training (FitNets, arXiv 1412.6550).


# MERGED-DOC distill.projection.shared_space
# One latent KV space for every model: two adapters a model instead of one per pair.
#
# Every teacher and the student map into the space, losses are taken there, and the inverse adapter
# brings fused latents back into the student (KV Cache Alignment, arXiv 2601.06123). A space that
# is trained by its own distances alone collapses to a point: ``round_trip_error`` and a language
# model's loss through ``out_of`` are what keep it honest.
