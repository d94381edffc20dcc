"""Closed-form projections from pilot moments: whitened PCA of the teacher, and ridge regression.

    pca:    W = E_K Λ_K^(−1/2)           (E, Λ: leading eigenpairs of the teacher's covariance)
    ridge:  W = (C_xx + ρ·tr(C_xx)/I · 1)⁻¹ C_xy,   b = ȳ − x̄ W

Whitened PCA depends on the teacher alone and weighs all kept directions equally. Ridge regresses
the student's own initial KV on the teacher's, which suits a pretrained student. Both follow from
counts, means and centred products, so a pilot is read once and never held in memory.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

from kvdistill.distill.project.projections import (
    FullProjection,
    LinearProjection,
    grouped_mean,
    orthogonal,
)
from kvdistill.errors import ConfigError
from kvdistill.store.channel_statistics import merge_moments

RIDGE: Final = 1e-3
"""Penalty ρ, as a share of the source's mean variance."""

EIGENVALUE_FLOOR: Final = 1e-6
"""Directions below this share of the largest variance are noise: whitening maps them to zero."""


class PilotMoments:
    """Joint moments per layer of source ``x`` (width I) and target ``y`` (width O).

    Both are kept side by side, the source first: means ``[L, I + O]``, and centred products of the
    source with both, ``[L, I, I + O]``; float64, on the CPU.
    """

    def __init__(self, num_layers: int, width_x: int, width_y: int) -> None:
        self.count, self._width_x = 0, width_x
        self._mean = torch.zeros(num_layers, width_x + width_y, dtype=torch.float64)
        self._products = torch.zeros(num_layers, width_x, width_x + width_y, dtype=torch.float64)

    def add(self, x_BLHTD: Tensor, y_BLHTD: Tensor, mask_BT: Tensor) -> None:
        """Add the tokens of a batch where ``mask_BT`` is True; the two KVs must be aligned."""
        flat_NLC = [
            kv.detach().permute(0, 3, 1, 2, 4).flatten(3)[mask_BT] for kv in (x_BLHTD, y_BLHTD)
        ]
        joint_LNC = torch.cat([x.transpose(0, 1).double().cpu() for x in flat_NLC], dim=-1)
        if joint_LNC.shape[1] == 0:
            return
        mean = joint_LNC.mean(1)
        centred = joint_LNC - mean.unsqueeze(1)
        self.count, self._mean, self._products = merge_moments(
            (self.count, self._mean, self._products),
            (joint_LNC.shape[1], mean, centred[..., : self._width_x].mT @ centred),
        )

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of source ``[L, I]`` and target ``[L, O]``."""
        return self._mean[:, : self._width_x], self._mean[:, self._width_x :]

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Covariance of the source, ``[L, I, I]``, and of source and target, ``[L, I, O]``.

        Raises:
            ConfigError: no token has been added.
        """
        if self.count == 0:
            raise ConfigError(
                "projection.init: no token of the pilot is covered by the teacher; raise "
                "projection.pilot_batches"
            )
        xx, xy = self._products[..., : self._width_x], self._products[..., self._width_x :]
        return xx / self.count, xy / self.count


@torch.no_grad()
def initialise(
    projection: FullProjection | LinearProjection,
    moments: PilotMoments,
    init: Literal["pca", "ridge"],
) -> None:
    """Set a projection's weights and bias from pilot moments, in place.

    A ``LinearProjection`` cannot represent every joint map. For ``ridge`` it takes the nearest one
    it can (``nearest_two_step``); for ``pca`` its dims whiten the covariance pooled over heads, its
    heads stay grouped means, and one factor per layer restores unit variance.

    Raises:
        ConfigError: the pilot is empty.
    """
    covariance, _ = moments.covariances()
    mean_x, mean_y = moments.means()
    if init == "pca":
        mean_y = torch.zeros_like(mean_y)
    if isinstance(projection, FullProjection):
        width = projection.target.width
        weight = ridge(moments) if init == "ridge" else whitened_pca(covariance, width)
        projection.weight_LIO.copy_(weight)
        projection.bias_LO.copy_(mean_y - torch.einsum("li,lio->lo", mean_x, weight))
        return
    if init == "ridge":
        heads, dims = nearest_two_step(projection, ridge(moments))
    else:
        heads, dims = _pooled_pca(projection, covariance)
    projection.head_LHG.copy_(heads)
    projection.dim_LDE.copy_(dims)
    image = torch.einsum("lhd,lhg,lde->lge", mean_x.view(-1, *projection.source), heads, dims)
    projection.bias_LGE.copy_(mean_y.view_as(image) - image)


def whitened_pca(covariance_LII: Tensor, width: int) -> Tensor:
    """``[L, I, width]`` float64 whose image of the source has unit variance per channel.

    A source narrower than ``width`` is spread over all channels by an orthogonal map, so that no
    target channel is identically zero.
    """
    values, vectors = torch.linalg.eigh(covariance_LII)
    kept = min(width, covariance_LII.shape[-1])
    values, vectors = values[:, -kept:].flip(-1), vectors[..., -kept:].flip(-1)
    floor = EIGENVALUE_FLOOR * values[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    white: Tensor = vectors * torch.maximum(values, floor).rsqrt().unsqueeze(1)
    white = white.masked_fill((values <= floor).unsqueeze(1), 0.0)
    if width > kept:
        spread = torch.stack([orthogonal(kept, width).double() for _ in white])
        white = white @ spread * (width / kept) ** 0.5
    return white


def ridge(moments: PilotMoments) -> Tensor:
    """Regression of the centred target on the centred source: ``[L, I, O]`` float64.

    Raises:
        ConfigError: the pilot is empty.
    """
    covariance, cross = moments.covariances()
    scale = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(covariance.shape[-1], dtype=torch.float64)
    loaded = covariance + RIDGE * scale[:, None, None] * eye
    weight: Tensor = torch.linalg.solve(loaded, cross)
    return weight


def nearest_two_step(projection: LinearProjection, weight_LIO: Tensor) -> tuple[Tensor, Tensor]:
    """Heads ``[L, H, G]`` and dims ``[L, D, E]`` whose joint map is nearest to ``weight_LIO``.

    The joint map of two steps is a Kronecker product; the nearest one is the leading singular pair
    of the rearranged weights (Van Loan and Pitsianis, *Approximation with Kronecker Products*,
    1993).
    """
    (h, d), (g, e) = projection.source, projection.target
    blocks = weight_LIO.view(-1, h, d, g, e).permute(0, 1, 3, 2, 4).reshape(-1, h * g, d * e)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    root = s[:, :1].sqrt()
    return (u[..., 0] * root).view(-1, h, g), (vh[:, 0] * root).view(-1, d, e)


def _pooled_pca(projection: LinearProjection, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Heads ``[L, H, G]`` (grouped means) and whitening dims ``[L, D, E]``."""
    (h, d), (g, e) = projection.source, projection.target
    blocks = covariance.view(-1, h, d, h, d)
    dims = whitened_pca(torch.einsum("lhdhf->ldf", blocks) / h, e)
    heads = grouped_mean(h, g).double().expand(len(dims), h, g)
    variance = torch.einsum("lhg,lde,lhdif,lig,lfe->lge", heads, dims, blocks, heads, dims)
    scale = variance.mean(dim=(1, 2), keepdim=True).clamp_min(1e-12).rsqrt()
    return heads, dims * scale
