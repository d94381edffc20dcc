"""The one place where per-token maps become a number.

Dividing by the *global* number of valid tokens, over accumulation steps and ranks, makes a loss
independent of how a batch was cut; a mean of means is not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reduce_tokens(
    map_BT: Tensor, mask_BT: Tensor, num_valid: Tensor | float | None = None
) -> Tensor:
    """Sum over valid tokens divided by their number: a float32 scalar, 0 where none is valid.

    Args:
        map_BT: a loss per token.
        mask_BT: True where a token counts.
        num_valid: valid tokens of all micro-batches and ranks; this batch's if not given.
    """
    total = torch.where(mask_BT, map_BT.float(), 0.0).sum()
    count = mask_BT.sum() if num_valid is None else torch.as_tensor(num_valid, device=total.device)
    return total / count.clamp_min(1)
