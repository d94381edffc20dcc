"""From errors per token to the loss of a step: reduction over tokens, weights and annealing.

A loss on text is a sum over valid tokens divided by their *global* number, over accumulation steps
and ranks. A loss against teachers is a weighted sum over served pairs of a layer and a token,
divided by their global number: what no teacher serves is in neither. Both are independent of how a
step is cut into batches; a mean of means is not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvdistill.config.distill import ANNEALED_LOSSES, LossConfig


def reduce_tokens(
    map_BT: Tensor, mask_BT: Tensor, num_valid: Tensor | float | None = None
) -> Tensor:
    """Sum over valid tokens divided by their number: a float32 scalar, 0 where none is valid.

    Args:
        map_BT: a loss per token.
        mask_BT: True where a token counts; values elsewhere are not read, NaN included.
        num_valid: valid tokens of all micro-batches and ranks; this batch's if None.
    """
    total = torch.where(mask_BT, map_BT.float(), 0.0).sum()
    count = mask_BT.sum() if num_valid is None else torch.as_tensor(num_valid, device=total.device)
    return total / count.clamp_min(1)


def sum_served(map_BLT: Tensor, weight_BLT: Tensor) -> Tensor:
    """Weighted sum over layers and tokens: a float32 scalar.

    Args:
        map_BLT: a loss per layer and token.
        weight_BLT: weight and mask in one; where it is 0 the loss is not read, NaN included.
    """
    return torch.where(weight_BLT > 0, weight_BLT * map_BLT.float(), 0.0).sum()


def weighted_sum(
    parts: Mapping[str, Tensor], losses: LossConfig, kv_scale: float
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the share of it that compares the student with teachers.

    Args:
        parts: each loss by its name in the config, float32 scalars before weighting.
        losses: the weights.
        kv_scale: factor on the ``ANNEALED_LOSSES``; see ``annealed_scale``.

    Returns:
        Two float32 scalars: the sum of all weighted parts, and of those that ``kv_scale`` scales.
    """
    weight = losses.weights()
    of_teachers = [name for name in parts if name in ANNEALED_LOSSES]
    weight |= {name: kv_scale * weight[name] for name in of_teachers}
    weighted = {name: weight[name] * value for name, value in parts.items()}
    kv = [weighted[name] for name in of_teachers] or [torch.zeros_like(parts["cross_entropy"])]
    return torch.stack(list(weighted.values())).sum(), torch.stack(kv).sum()


def annealed_scale(step: int, num_steps: int, anneal_by: float | None) -> float:
    """Factor on the losses against teachers at a step, from 1 down to 0.

    Linear from 1 at step 0 to 0 at ``anneal_by · num_steps``; always 1 where ``anneal_by`` is
    None. Teacher annealing: *BAM! Born-Again Multi-Task Networks for Natural Language
    Understanding*, arXiv 1907.04829, section 3.2.
    """
    if anneal_by is None:
        return 1.0
    return max(0.0, 1 - step / (anneal_by * num_steps))
