"""Closed-form projections from pilot moments: whitened PCA of the teacher, and ridge regression.

    pca:    W = E_K Λ_K^(−1/2)           (E, Λ: leading eigenpairs of the teacher's covariance)
    ridge:  W = (C_xx + ρ·tr(C_xx)/I · 1)⁻¹ C_xy,   b = ȳ − x̄ W
    back:   V = (Wᵀ C_xx W)⁺ Wᵀ C_xx,   c = x̄        (out of a space, from z = (x − x̄) W)

Whitened PCA depends on the teacher alone and weighs all kept directions equally. Ridge regresses
one model's KV on the other's: the teacher's on that of a pretrained student (``StudentToTeacher``),
or the student's on the teacher's. A shared space is the PCA of the student's KV, standardised per
channel, onto which every teacher's is regressed; ``back`` regresses a model's KV on its image.

All follow from counts, means and centred products, so a pilot is read in batches and never held in
memory. A part of its texts is held out: the penalty ρ with the smallest error there is taken, and
the variance explained there is what the map is worth.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

from kvdistill.distill.project.projections import (
    JointMap,
    LinearProjection,
    SpaceAdapter,
    grouped_mean,
    orthogonal,
)
from kvdistill.errors import ConfigError
from kvdistill.store.channel_statistics import merge_moments

Map = JointMap | LinearProjection | SpaceAdapter

PENALTIES: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties ρ to choose from, as shares of the source's mean variance."""

PENALTY: Final = 1e-2
"""Where no text is held out."""

EIGENVALUE_FLOOR: Final = 1e-6
"""Directions below this share of the largest variance are noise: whitening maps them to zero."""


class Moments:
    """Joint moments of a source ``x`` (width I) and a target ``y`` (width O) of one layer.

    Kept are the means of both, the centred products of the source with both ``[I, I + O]``, and of
    the target the centred squares ``[O]``. A batch's products are computed in float32 around its
    own mean and added up in float64: where means are a hundred times the spread, as those of keys
    with a bias are, covariances are right to 1e-6 (float64 throughout would take twice the time).
    """

    def __init__(self, width_x: int, width_y: int, device: torch.device | str = "cpu") -> None:
        self.count, self.width_x = 0, width_x
        mps = torch.device(device).type == "mps"  # has no float64
        exact = torch.float32 if mps else torch.float64
        self.mean = torch.zeros(width_x + width_y, dtype=exact, device=device)
        self.products = self.mean.new_zeros(width_x, width_x + width_y)
        self.squares = self.mean.new_zeros(width_y)

    def add(self, x_NI: Tensor, y_NO: Tensor) -> None:
        """Add N tokens; the two must be aligned."""
        joint_NC = torch.cat([x_NI.float(), y_NO.float()], dim=1)
        if len(joint_NC) == 0:
            return
        mean = joint_NC.to(self.mean.dtype).mean(0)
        centred = joint_NC - mean.float()
        products = centred[:, : self.width_x].T @ centred
        squares = centred[:, self.width_x :].square().sum(0)
        self.merge(len(joint_NC), mean, products.to(mean), squares.to(mean))

    def merge(self, count: int, mean: Tensor, products: Tensor, squares: Tensor) -> None:
        """Add the moments of other tokens."""
        w, (n, before) = self.width_x, (self.count, self.mean)
        others = (n, before[w:], self.squares), (count, mean[w:], squares)
        _, _, self.squares = merge_moments(*others)
        self.count, self.mean, self.products = merge_moments(
            (n, before, self.products), (count, mean, products)
        )

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of source ``[I]`` and target ``[O]``."""
        return self.mean[: self.width_x], self.mean[self.width_x :]

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Covariance of the source, ``[I, I]``, and of source and target, ``[I, O]``.

        Raises:
            ConfigError: no token has been added.
        """
        if self.count == 0:
            raise ConfigError(
                "projection.init: no token of the pilot is covered by the teacher; raise "
                "projection.pilot_batches"
            )
        xx, xy = self.products[:, : self.width_x], self.products[:, self.width_x :]
        return xx / self.count, xy / self.count

    def explained(self, weight_IO: Tensor, bias_O: Tensor) -> float:
        """Share of the target's variance that ``x W + b`` explains: 1 − error / variance."""
        xx, xy = self.covariances()
        mean_x, mean_y = self.means()
        variance = self.squares.sum() / self.count
        error = variance - 2 * (weight_IO * xy).sum() + (weight_IO * (xx @ weight_IO)).sum()
        error = error + (mean_x @ weight_IO + bias_O - mean_y).square().sum()
        return 1 - float(error / variance.clamp_min(1e-12))


class PilotMoments:
    """Moments of one layer over the texts that a map is fitted to, and over those held out."""

    def __init__(self, width_x: int, width_y: int, device: torch.device | str = "cpu") -> None:
        self.fitted, self.held_out = (Moments(width_x, width_y, device) for _ in range(2))

    @staticmethod
    def size_bytes(width_x: int, width_y: int) -> int:
        """Memory of one layer's moments, nearly all of it products."""
        return 2 * 8 * width_x * (width_x + width_y)

    def add(self, x_NI: Tensor, y_NO: Tensor, held_out_N: Tensor) -> None:
        """Add N aligned tokens; ``held_out_N`` is True for those of texts that are held out."""
        self.fitted.add(x_NI[~held_out_N], y_NO[~held_out_N])
        self.held_out.add(x_NI[held_out_N], y_NO[held_out_N])

    def standardise(self, mean_I: Tensor, scale_I: Tensor) -> None:
        """Turn the moments, in place, into those of the source ``(x − mean) · scale``."""
        for part in (self.fitted, self.held_out):
            w, scale = part.width_x, scale_I.to(part.mean)
            part.mean[:w] = (part.mean[:w] - mean_I.to(part.mean)) * scale
            part.products *= scale[:, None]
            part.products[:, :w] *= scale


@torch.no_grad()
def fit_layer(
    projection: Map,
    row: int,
    moments: PilotMoments,
    init: Literal["pca", "ridge"],
) -> float | None:
    """Set the map of one layer in closed form, in place, from all texts of the pilot.

    A ``LinearProjection`` cannot represent every joint map. For ``ridge`` it takes the nearest one
    it can (``nearest_two_step``); for ``pca`` its dims whiten the covariance pooled over heads, its
    heads stay grouped means, and one factor restores unit variance.

    Returns:
        For ``ridge``, the share of the target's variance on the held-out texts that a map fitted
        to the others explains; the penalty is the one with the largest. None without such texts,
        and for ``pca``, which has no target.

    Raises:
        ConfigError: the pilot is empty.
    """
    fitted, held_out, best = moments.fitted, moments.held_out, None
    penalty = PENALTY
    if init == "ridge" and fitted.count and held_out.count:
        shares = {}
        for candidate in PENALTIES:
            weight = _representable(projection, ridge(fitted, candidate))
            shares[candidate] = held_out.explained(_joint(weight), _bias(fitted, weight))
        penalty = max(shares, key=lambda candidate: shares[candidate])
        best = shares[penalty]
    fitted.merge(held_out.count, held_out.mean, held_out.products, held_out.squares)
    if init == "pca":
        weight = _whitening(projection, fitted)
        bias = -fitted.means()[0] @ _joint(weight)
    else:
        weight = _representable(projection, ridge(fitted, penalty))
        bias = _bias(fitted, weight)
    _set(projection, row, weight, bias)
    if isinstance(projection, SpaceAdapter):
        _set_way_back(projection, row, _joint(weight), bias, fitted)
    return best


Steps = tuple[Tensor, Tensor]
"""Heads ``[H, G]`` and dims ``[D, E]`` of a two-step map."""


def _joint(weight: Tensor | Steps) -> Tensor:
    """The joint map ``[I, O]``."""
    return torch.kron(*weight) if isinstance(weight, tuple) else weight


def _bias(moments: Moments, weight: Tensor | Steps) -> Tensor:
    """The bias ``[O]`` under which a map's mean is the target's."""
    mean_x, mean_y = moments.means()
    return mean_y - mean_x @ _joint(weight)


def _representable(projection: Map, weight_IO: Tensor) -> Tensor | Steps:
    if isinstance(projection, LinearProjection):
        return nearest_two_step(projection, weight_IO)
    return weight_IO


def _set(projection: Map, row: int, weight: Tensor | Steps, bias_O: Tensor) -> None:
    if isinstance(projection, JointMap):
        projection.weight_LIO[row].copy_(_joint(weight))
        projection.bias_LO[row].copy_(bias_O)
    elif isinstance(projection, SpaceAdapter):
        projection.to_LIO[row].copy_(_joint(weight))
        projection.to_bias_LO[row].copy_(bias_O)
    else:
        heads, dims = weight
        projection.head_LHG[row].copy_(heads)
        projection.dim_LDE[row].copy_(dims)
        projection.bias_LGE[row].copy_(bias_O.view(projection.target))


def _set_way_back(
    adapter: SpaceAdapter, row: int, weight_IO: Tensor, bias_O: Tensor, moments: Moments
) -> None:
    """Regress the model's KV on its image ``z = x W + b`` in the space."""
    covariance, mean = moments.covariances()[0], moments.means()[0]
    cross_OI = weight_IO.mT @ covariance
    back_OI = torch.linalg.pinv(cross_OI @ weight_IO, hermitian=True) @ cross_OI
    adapter.back_LOI[row].copy_(back_OI)
    adapter.back_bias_LI[row].copy_(mean - (mean @ weight_IO + bias_O) @ back_OI)


def whitened_pca(covariance_II: Tensor, width: int) -> Tensor:
    """``[I, width]`` float64 whose image of the source has unit variance per channel.

    A source narrower than ``width`` is spread over all channels by an orthogonal map, so that no
    target channel is identically zero.
    """
    values, vectors = torch.linalg.eigh(covariance_II)
    kept = min(width, len(covariance_II))
    values, vectors = values[-kept:].flip(-1), vectors[:, -kept:].flip(-1)
    floor = EIGENVALUE_FLOOR * values[:1].clamp_min(torch.finfo(torch.float32).tiny)
    white: Tensor = vectors * torch.maximum(values, floor).rsqrt()
    white = white.masked_fill(values <= floor, 0.0)
    if width > kept:
        white = white @ orthogonal(kept, width).to(white) * (width / kept) ** 0.5
    return white


def standardised_pca(covariance_II: Tensor, width: int) -> Tensor:
    """``[I, width]`` float64: leading principal components of the source's standardised channels.

    One factor gives them a mean variance of 1. Unlike whitening, it leaves small components small:
    a squared error here weighs them as one of the standardised channels would.
    """
    variance = covariance_II.diagonal()
    floor = EIGENVALUE_FLOOR * variance.max().clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.maximum(variance, floor).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * covariance_II * scale)
    kept = min(width, len(variance))
    components: Tensor = scale[:, None] * vectors[:, -kept:].flip(-1)
    components *= (width / values[-kept:].sum().clamp_min(1e-12)).sqrt()
    return components @ orthogonal(kept, width).to(components) if width > kept else components


def ridge(moments: Moments, penalty: float) -> Tensor:
    """Regression of the centred target on the centred source: ``[I, O]``.

    ``penalty`` is a share of the source's mean variance.

    Raises:
        ConfigError: the pilot is empty.
    """
    covariance, cross = moments.covariances()
    covariance.diagonal().add_(penalty * covariance.diagonal().mean().clamp_min(1e-12))
    weight: Tensor = torch.linalg.solve(covariance, cross)
    return weight


def nearest_two_step(projection: LinearProjection, weight_IO: Tensor) -> Steps:
    """Heads ``[H, G]`` and dims ``[D, E]`` whose joint map is nearest to ``weight_IO``.

    The joint map of two steps is a Kronecker product; the nearest one is the leading singular pair
    of the rearranged weights (Van Loan and Pitsianis, *Approximation with Kronecker Products*,
    1993).
    """
    (h, d), (g, e) = projection.source, projection.target
    blocks = weight_IO.view(h, d, g, e).permute(0, 2, 1, 3).reshape(h * g, d * e)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    root = s[0].sqrt()
    return (u[:, 0] * root).view(h, g), (vh[0] * root).view(d, e)


def _whitening(projection: Map, moments: Moments) -> Tensor | Steps:
    """Whitening of the source, joint or of two steps for all heads alike, or its shared space."""
    covariance, _ = moments.covariances()
    if isinstance(projection, SpaceAdapter):
        return standardised_pca(covariance, projection.target.width)
    if isinstance(projection, JointMap):
        return whitened_pca(covariance, projection.target.width)
    (h, d), (g, e) = projection.source, projection.target
    blocks = covariance.view(h, d, h, d)
    dims = whitened_pca(torch.einsum("hdhf->df", blocks) / h, e)
    heads = grouped_mean(h, g).to(dims)
    variance = torch.einsum("hg,de,hdif,ig,fe->ge", heads, dims, blocks, heads, dims)
    return heads, dims * variance.mean().clamp_min(1e-12).rsqrt()
