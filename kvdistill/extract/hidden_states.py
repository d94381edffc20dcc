"""Hidden states that are kept besides keys and values: at the answer's cue, and in summary.

``hidden_at_cue`` is every kept layer's *input* and the model's final output at the last token
before the answer, as transformers counts ``hidden_states``: the target of CODI's loss (CODI:
Compressing Chain-of-Thought into Continuous Space via Self-Distillation, arXiv 2502.21074).
``hidden_summary`` is the mean over a sample's text and its first token, of the final output;
router prototypes are made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvdistill.attention.hooks import Site, attached
from kvdistill.types import SEGMENT_IDS, SEGMENT_SPECIAL


def cue(segment: NDArray[np.int8]) -> int:
    """Position of the last token before the answer; of the last text token without an answer.

    A sample without any text: 0.
    """
    answer = np.flatnonzero(segment == SEGMENT_IDS["answer"])
    if answer.size:
        return max(int(answer[0]) - 1, 0)
    text = np.flatnonzero(segment != SEGMENT_SPECIAL)
    return int(text[-1]) if text.size else 0


@contextmanager
def layer_inputs_at(
    sites: Sequence[Site], positions_B: Tensor, out_LBE: list[Tensor]
) -> Iterator[None]:
    """While active, append ``[B, E]`` for every site: its layer's input at ``positions_B``."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_BTE = args[0] if args else kwargs["hidden_states"]
        out_LBE.append(take(hidden_BTE, positions_B))

    with attached(site.layer.register_forward_pre_hook(hook, with_kwargs=True) for site in sites):
        yield


def take(hidden_BTE: Tensor, positions_B: Tensor) -> Tensor:
    """``[B, T, E]`` at one position per sample → float32 ``[B, E]``."""
    rows = torch.arange(hidden_BTE.shape[0], device=hidden_BTE.device)
    return hidden_BTE[rows, positions_B.to(hidden_BTE.device)].float()


def summarise_hidden(hidden_BTE: Tensor, text_mask_BT: Tensor, real_mask_BT: Tensor) -> Tensor:
    """Mean over the text and first token: float32 ``[2, B, E]``.

    A sample of special tokens only: the mean over these.
    """
    none = ~text_mask_BT.any(dim=1, keepdim=True)
    mask = text_mask_BT | (none & real_mask_BT)
    weight = mask.float() / mask.sum(dim=1, keepdim=True).clamp_min(1)
    mean = torch.einsum("bte,bt->be", hidden_BTE.float(), weight.to(hidden_BTE.device))
    return torch.stack([mean, hidden_BTE[:, 0].float()])
