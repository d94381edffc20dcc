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


def annealed_scale(step: int, num_steps: int, anneal_by: float | None) -> float:
    """How much of their weights the losses against teachers have at a step, 1 down to 0.

    Linear from 1 at step 0 to 0 at ``anneal_by · num_steps``, as in teacher annealing (*BAM!
    Born-Again Multi-Task Networks for Natural Language Understanding*, arXiv 1907.04829, section
    3.2); always 1 where ``anneal_by`` is None. A student first learns what the teacher sees in a
    text, and in the end only what the text says.
    """
    if anneal_by is None:
        return 1.0
    return max(0.0, 1 - step / (anneal_by * num_steps))


# MERGED-DOC distill.losses.fading
# Losses against teachers that give way to the text as training goes on.
