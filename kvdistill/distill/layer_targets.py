"""A teacher's standardised KV at the student's layers and tokens, one layer at a time.

All layers at once would be several float32 copies of everything that a teacher has at a batch
(decoded, standardised, placed); one layer's stay in the processor's cache, and their memory is
used again for the next. A band and a layer map act on different axes, so a stored layer is brought
to the student's tokens once and then mixed with its neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvdistill.distill.alignment import Bags, LayerMap

Read = Callable[[Mapping[str, Tensor], int], Tensor]
"""Stored parts of one layer ``[B, H, T_t, …]``, and its row → standardised ``[B, H, T_t, D]``."""


class LayerTargets:
    """One group of one teacher and kind, called with rows of ``mapping``; cheapest in order."""

    def __init__(
        self, read: Read, parts: Mapping[str, Tensor], mapping: LayerMap, bags: Bags
    ) -> None:
        self._read, self._parts, self._mapping, self._bags = read, parts, mapping, bags
        self._stored = mapping.needed
        self._placed: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._mapping.lower)

    @torch.no_grad()
    def __call__(self, row: int) -> Tensor:
        """The target of one student layer, ``[B, H_t, T_s, D_t]`` float32; not to be changed."""
        lower, upper = self._mapping.lower[row], self._mapping.upper[row]
        fraction = self._mapping.fraction[row]
        wanted = (lower, upper) if fraction else (lower,)
        self._placed = {
            layer: self._placed[layer] if layer in self._placed else self._place(layer)
            for layer in wanted
        }
        if not fraction:
            return self._placed[lower]
        return torch.lerp(self._placed[lower], self._placed[upper], fraction)

    def whole(self) -> Tensor:
        """All student layers, ``[B, L, H_t, T_s, D_t]``."""
        return torch.stack([self(row) for row in range(len(self))], dim=1)

    def _place(self, layer: int) -> Tensor:
        row = self._stored.index(layer)
        parts = {suffix: x[:, row] for suffix, x in self._parts.items()}
        return self._bags.sum(self._read(parts, row))
