"""Next-token prediction, and the numbers that the losses of a step are divided by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.distill.data.collate import IGNORED_LABEL, Batch
from kvdistill.distill.losses.weighting import reduce_tokens


def cross_entropy(logits: Tensor, labels: Tensor, num_labels: Tensor | None) -> Tensor:
    """Next-token cross-entropy ``[B, T, V]`` against ``[B, T]``, over labels that count."""
    # Labels are shifted, not logits: this copies no [B, T, V], and softmax is contiguous.
    wanted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    errors = F.cross_entropy(
        logits.flatten(0, 1).float(),
        wanted.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    ).view_as(wanted)
    return reduce_tokens(errors, wanted != IGNORED_LABEL, num_labels)


def num_predicted(labels: Tensor) -> Tensor:
    """Labels ``[B, T]`` that a token before them predicts."""
    return (labels[:, 1:] != IGNORED_LABEL).sum()


def num_covered(batch: Batch) -> Tensor:
    """Tokens that any teacher covers."""
    covered = [teacher["covered"] for teacher in batch["teachers"].values()]
    return torch.stack(covered).any(0).sum() if covered else batch["labels"].new_zeros(())
