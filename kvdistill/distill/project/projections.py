"""Maps between a teacher's KV space and the student's, per layer; one module per teacher and kind.

    map                   from → to                        form
    LinearProjection      teacher → student                head dim, then heads: two small matrices
    FullProjection        teacher → student                one joint matrix over heads and channels
    BottleneckProjection  teacher → student                linear, GELU, linear
    StudentToTeacher      student → teacher                one joint matrix, plus an MLP if wanted
    SpaceAdapter          any model → shared space → back  two joint matrices

Parameter suffixes: L layers; H, D source heads and head dim; G, E target heads and head dim;
I = H·D and O = G·E their widths, all heads joined. Layers never mix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdistill.attention.geometry import HeadShape, check_kv
from kvdistill.config.distill import ProjectionConfig
from kvdistill.distill.losses.pointwise import kv_error
from kvdistill.errors import ConfigError
from kvdistill.types import ProjectionInit


def make_projection(
    config: ProjectionConfig, num_layers: int, source: HeadShape, student: HeadShape
) -> Any:
    """The configured teacher-to-student map, or a teacher's adapter to the shared space.

    Raises:
        ConfigError: mode ``identity`` between unequal shapes.
    """
    if config.mode == "identity":
        if source != student:
            raise ConfigError(
                f"projection.mode identity: the teacher has {source.num_heads} KV heads of "
                f"{source.head_dim}, the student {student.num_heads} of {student.head_dim}; they "
                "must agree, or use student_to_teacher"
            )
        return nn.Identity()
    if config.mode == "shared_space":
        return SpaceAdapter(num_layers, source, HeadShape(config.space_heads, config.space_dim))
    if config.method == "bottleneck":
        return BottleneckProjection(num_layers, source, student, config.mlp_ratio)
    kind = FullProjection if config.method == "full" else LinearProjection
    init: ProjectionInit = "orthogonal" if config.init == "orthogonal" else "grouped_mean"
    return kind(num_layers, source, student, init)


class LinearProjection(nn.Module):
    """Head dim, then heads: ``[H_t, D_t] → [H_t, D_s] → [H_s, D_s]``.

    It cannot mix channels of different heads, but fits every pair of shapes with few parameters,
    and its initial weights are interpretable: grouped means of heads, a truncated identity of dims.
    """

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
            else torch.eye(source.head_dim, target.head_dim)
            for _ in range(num_layers)
        ]
        self.dim_LDE = nn.Parameter(torch.stack(dims))
        self.head_LHG = nn.Parameter(heads.repeat(num_layers, 1, 1))
        self.bias_LGE = nn.Parameter(torch.zeros(num_layers, *target))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """As ``JointMap.forward``."""
        check_kv(x_BLHTD, self.num_layers, self.source, "LinearProjection")
        b, num_layers, num_heads, t, dim = x_BLHTD.shape
        # Both products read the heads in place; an einsum would first permute all of x.
        rows = x_BLHTD.reshape(b, num_layers, num_heads * t, dim) @ self.dim_LDE
        columns = rows.view(b, num_layers, num_heads, t * self.target.head_dim)
        mixed = (self.head_LHG.mT @ columns).view(b, num_layers, -1, t, self.target.head_dim)
        return mixed + self.bias_LGE[:, :, None]


class JointMap(nn.Module):
    """One matrix per layer over heads and channels, ``H·D → G·E``, and a bias."""

    def __init__(self, weight_LIO: Tensor, source: HeadShape, target: HeadShape) -> None:
        super().__init__()
        self.num_layers, self.source, self.target = len(weight_LIO), source, target
        self.weight_LIO = nn.Parameter(weight_LIO)
        self.bias_LO = nn.Parameter(torch.zeros(self.num_layers, target.width))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """``[B, L, H, T, D]`` to ``[B, L, G, T, E]``.

        Raises:
            GeometryError: layers, heads or dim are not the declared ones.
        """
        check_kv(x_BLHTD, self.num_layers, self.source, type(self).__name__)
        return layerwise(x_BLHTD, self.weight_LIO, self.bias_LO, self.target)


class FullProjection(JointMap):
    """One joint map ``H_t·D_t → H_s·D_s``: the richest linear map, and the largest.

    It starts as the same map as ``LinearProjection``.
    """

    def __init__(
        self,
        num_layers: int,
        source: HeadShape,
        target: HeadShape,
        init: ProjectionInit = "grouped_mean",
    ) -> None:
        if init == "orthogonal":
            maps = [orthogonal(source.width, target.width) for _ in range(num_layers)]
        else:
            heads = grouped_mean(source.num_heads, target.num_heads)
            # The Kronecker product is the joint map of applying dims, then heads.
            maps = [torch.kron(heads, torch.eye(source.head_dim, target.head_dim))] * num_layers
        super().__init__(torch.stack(maps), source, target)


class StudentToTeacher(JointMap):
    """Regression of the student's KV onto a teacher's fixed one, discarded after training.

    The target is the teacher's standardised KV and holds no parameter: it cannot move towards the
    student, and a constant student scores exactly its variance, 1 (FitNets, arXiv 1412.6550).

    With a ``num_hidden`` above 0, ``relu(x U + c) V`` of that width is added: what several teachers
    hold need not be linear in the student's KV. ``V`` starts at zero, so a head starts linear, from
    its closed form where it has one.
    """

    def __init__(
        self, num_layers: int, source: HeadShape, target: HeadShape, num_hidden: int = 0
    ) -> None:
        bound = 1 / math.sqrt(source.width)  # as nn.Linear initialises its own
        weight = torch.empty(num_layers, source.width, target.width).uniform_(-bound, bound)
        super().__init__(weight, source, target)
        self.hidden = nn.ParameterDict()
        if num_hidden:
            up = [orthogonal(source.width, num_hidden) for _ in range(num_layers)]
            self.hidden["up"] = torch.stack(up)
            self.hidden["bias"] = torch.zeros(num_layers, num_hidden)
            self.hidden["down"] = torch.zeros(num_layers, num_hidden, target.width)

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """As ``JointMap.forward``."""
        out = super().forward(x_BLHTD)
        if not len(self.hidden):
            return out
        up_LIM, bias_LM, down_LMO = self.hidden.values()
        inner = layerwise(x_BLHTD, up_LIM, bias_LM, HeadShape(1, up_LIM.shape[2])).relu()
        return out + layerwise(inner, down_LMO, torch.zeros_like(self.bias_LO), self.target)


class BottleneckProjection(nn.Module):
    """Linear, GELU, linear through ``mlp_ratio · √(H_t·D_t · H_s·D_s)`` channels.

    The inner width follows from both models' widths, so one ratio serves every pair of a teacher
    and a student. Both linear maps start orthogonal.
    """

    def __init__(
        self, num_layers: int, source: HeadShape, target: HeadShape, mlp_ratio: float = 0.5
    ) -> None:
        super().__init__()
        self.num_layers, self.source, self.target = num_layers, source, target
        width = max(1, round(mlp_ratio * math.sqrt(source.width * target.width)))
        self.inner = HeadShape(1, width)
        layers = range(num_layers)
        self.down_LIO = nn.Parameter(torch.stack([orthogonal(source.width, width) for _ in layers]))
        self.up_LIO = nn.Parameter(torch.stack([orthogonal(width, target.width) for _ in layers]))
        self.down_bias_LO = nn.Parameter(torch.zeros(num_layers, width))
        self.up_bias_LO = nn.Parameter(torch.zeros(num_layers, target.width))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """As ``JointMap.forward``."""
        check_kv(x_BLHTD, self.num_layers, self.source, "BottleneckProjection")
        inner = F.gelu(layerwise(x_BLHTD, self.down_LIO, self.down_bias_LO, self.inner))
        return layerwise(inner, self.up_LIO, self.up_bias_LO, self.target)


class SpaceAdapter(nn.Module):
    """One model's linear map into the shared space and back (arXiv 2601.06123), for one kind.

    Two adapters per model (keys, values) instead of one per pair of models. A space trained on its
    own distances alone collapses to a point; ``round_trip_error`` and a language-model loss through
    ``out_of`` prevent that. ``back`` starts as the transpose of ``to``, its pseudo-inverse.
    """

    def __init__(self, num_layers: int, model: HeadShape, space: HeadShape) -> None:
        super().__init__()
        self.num_layers, self.source, self.target = num_layers, model, space
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
        check_kv(x_BLHTD, self.num_layers, self.source, "shared space")
        return layerwise(x_BLHTD, self.to_LIO, self.to_bias_LO, self.target)

    def out_of(self, z_BLHTD: Tensor) -> Tensor:
        """Latents ``[B, L, H_z, T, D_z]`` as the model's KV, ``[B, L, H, T, D]``.

        Raises:
            GeometryError: layers, heads or dim are not the space's.
        """
        check_kv(z_BLHTD, self.num_layers, self.target, "shared space")
        return layerwise(z_BLHTD, self.back_LOI, self.back_bias_LI, self.source)

    def round_trip_error(self, x_BLHTD: Tensor) -> Tensor:
        """Mean squared error after the way into the space and back: ``[B, L, T]``."""
        return kv_error(self.out_of(self(x_BLHTD)), x_BLHTD)


def layerwise(x_BLHTD: Tensor, weight_LIO: Tensor, bias_LO: Tensor, target: HeadShape) -> Tensor:
    """One joint linear map per layer: ``[B, L, H, T, D]`` to ``[B, L, G, T, E]``."""
    b, num_layers, num_heads, t, dim = x_BLHTD.shape
    flat = x_BLHTD.permute(1, 0, 3, 2, 4).reshape(num_layers, b * t, num_heads * dim)
    out = torch.baddbmm(bias_LO.unsqueeze(1), flat, weight_LIO)
    return out.view(num_layers, b, t, *target).permute(1, 0, 3, 2, 4)


def grouped_mean(num_from: int, num_to: int) -> Tensor:
    """Head weights ``[num_from, num_to]``: every new head is the mean of the heads it overlaps.

    Both numbers of heads divide the unit interval evenly, and overlap gives the weight. Where
    ``num_to`` divides ``num_from`` that is the mean of each group, as grouped-query attention pools
    heads (arXiv 2305.13245); in the opposite case heads repeat; otherwise they are shared. Columns
    sum to one.
    """
    old = torch.linspace(0, 1, num_from + 1, dtype=torch.float64)
    new = torch.linspace(0, 1, num_to + 1, dtype=torch.float64)
    upper = torch.minimum(old[1:, None], new[None, 1:])
    lower = torch.maximum(old[:-1, None], new[None, :-1])
    overlap = (upper - lower).clamp_min(0)
    overlap[overlap < 1e-12] = 0
    return (overlap / overlap.sum(0)).float()


def orthogonal(dim_from: int, dim_to: int) -> Tensor:
    """Random ``[dim_from, dim_to]`` with orthonormal rows or columns, whichever are fewer."""
    return torch.nn.init.orthogonal_(torch.empty(dim_from, dim_to))
