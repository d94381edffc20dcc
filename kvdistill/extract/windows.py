"""Texts longer than a teacher's positions, read in overlapping windows and stitched together.

    text     p a b c d e f g h i      p: special tokens at the beginning (BOS)
    windows  p a b c d                limit 5, overlap 2
             p     c d e f
             p           f g h i      the last one ends with the text
    from     0 0 0 0 0 1 1 2 2 2

Every window begins with the text's special tokens, which models expect there, and is read at
positions from 0; keys are stored before rotation, so those of all windows are alike. A token comes
from the first window that holds it, where it has at least ``overlap`` tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvdistill.attention.adapters import QKV
from kvdistill.attention.hooks import OnLayer
from kvdistill.errors import TeacherError
from kvdistill.extract.tokenise import TeacherBatch, TokenisedSample
from kvdistill.types import SEGMENT_SPECIAL


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of one text, and where each of its tokens is taken from."""

    batch: TeacherBatch
    """All windows, equally long, as samples of one batch."""
    row_T: Tensor
    place_T: Tensor

    @staticmethod
    def of(sample: TokenisedSample, limit: int, overlap: int, device: torch.device) -> Windows:
        """Cut a text of more than ``limit`` tokens.

        Raises:
            TeacherError: special tokens and ``overlap`` leave no room for others.
        """
        num_first = int(np.argmax(np.append(sample.segment != SEGMENT_SPECIAL, True)))
        size, body = limit - num_first, sample.num_tokens - num_first
        if size <= overlap:
            raise TeacherError(
                f"windows of {limit} tokens begin with {num_first} special tokens and overlap by "
                f"{overlap}, which leaves none to advance by; lower extraction.window_overlap"
            )
        starts = np.append(np.arange(0, body - size, size - overlap), body - size)
        place_WT = np.concatenate(
            [
                np.broadcast_to(np.arange(num_first), (len(starts), num_first)),
                num_first + starts[:, None] + np.arange(size),
            ],
            axis=1,
        )
        row_T = np.zeros(sample.num_tokens, np.int64)
        row_T[num_first:] = np.searchsorted(starts + size, np.arange(body), side="right")
        place_T = np.arange(sample.num_tokens) - starts[row_T]
        place_T[:num_first] = np.arange(num_first)
        ids = torch.from_numpy(sample.token_ids[place_WT].astype(np.int64))
        batch = TeacherBatch(tuple(range(len(ids))), (limit,) * len(ids), ids.to(device))
        return Windows(batch, torch.from_numpy(row_T), torch.from_numpy(place_T))

    def stitch(self, x_WTE: Tensor) -> Tensor:
        """``[windows, limit, …]`` → ``[1, T, …]``."""
        rows, places = self.row_T.to(x_WTE.device), self.place_T.to(x_WTE.device)
        return x_WTE[rows, places][None]

    def find(self, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Window, and place in it, of some of the text's tokens."""
        return self.row_T[positions_B], self.place_T[positions_B]

    def run(self, model: Callable[[TeacherBatch, OnLayer], Tensor], on_layer: OnLayer) -> Tensor:
        """One pass over all windows, as if it were one over the text: final hidden ``[1, T, E]``.

        ``on_layer`` receives queries, keys and values ``[1, H, T, D]``.
        """

        def stitched(layer_idx: int, qkv: QKV) -> None:
            on_layer(layer_idx, QKV(*[self.stitch(x.transpose(1, 2)).transpose(1, 2) for x in qkv]))

        return self.stitch(model(self.batch, stitched))
