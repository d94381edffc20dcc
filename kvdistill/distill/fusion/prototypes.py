"""One or a few vectors that stand for a teacher.

``mean`` over all tokens, ``cls`` (the first token of every sample, averaged), or ``kmeans``: the
centres of k clusters, of which the nearest counts when a text is compared with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdistill.errors import ConfigError

ITERATIONS = 50


def mean_prototype(x_BTE: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of all valid tokens: ``[B, T, E]`` to ``[1, E]`` float32."""
    mask = mask_BT.unsqueeze(-1)
    total = torch.where(mask, x_BTE.float(), 0.0).sum((0, 1))
    return (total / mask.sum().clamp_min(1)).unsqueeze(0)


def cls_prototype(x_BTE: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of every sample's first valid token: ``[B, T, E]`` to ``[1, E]`` float32."""
    first = mask_BT.int().argmax(1)
    x_BE = x_BTE[torch.arange(len(first), device=first.device), first].float()
    return mean_prototype(x_BE.unsqueeze(1), mask_BT.any(1, keepdim=True))


def kmeans_prototypes(x_NE: Tensor, num_centres: int, seed: int = 0) -> Tensor:
    """Centres of k-means: ``[N, E]`` to ``[num_centres, E]`` float32.

    Lloyd's iteration from k-means++ seeds. A centre that loses all its points stays where it is.

    Raises:
        ConfigError: fewer points than centres.
    """
    if num_centres < 1 or len(x_NE) < num_centres:
        raise ConfigError(f"fusion.prototypes: {num_centres} centres from {len(x_NE)} vectors")
    x_NE = x_NE.float()
    centres = _spread_seeds(x_NE, num_centres, seed)
    nearest = None
    for _ in range(ITERATIONS):
        previous, nearest = nearest, torch.cdist(x_NE, centres).argmin(1)
        if previous is not None and torch.equal(previous, nearest):
            break
        counts = torch.bincount(nearest, minlength=num_centres).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x_NE)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


def _spread_seeds(x_NE: Tensor, num_centres: int, seed: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): far points are likelier to be seeds."""
    generator = torch.Generator().manual_seed(seed)
    picked = [int(torch.randint(len(x_NE), (1,), generator=generator))]
    distance = torch.full((len(x_NE),), torch.inf)
    for _ in range(num_centres - 1):
        to_last = (x_NE - x_NE[picked[-1]]).square().sum(1).cpu()
        distance = torch.minimum(distance, to_last)
        # All points coincide with a seed: any of them will do.
        chances = distance if float(distance.sum()) > 0 else torch.ones_like(distance)
        picked.append(int(torch.multinomial(chances, 1, generator=generator)))
    return x_NE[picked].clone()
