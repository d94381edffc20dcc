"""What a model does with the tokens it is given, measured on the model in hand.

Whether later tokens move earlier keys (a decoder or an encoder), whether key ``j`` is that of token
``j``, whether keys depend on positions where values do not (a tap behind the rotation), and whether
a text is read the same alone and in a padded batch. No table and no config entry describes that for
all models: a Llama with ``is_causal: false`` is an encoder, and an encoder-decoder that shifts its
tokens by itself reads other tokens than it is given.

Readings are compared token by token: the norm of the difference of two keys, relative to the key's.
In half precision only the first two layers count, since rounding grows from layer to layer and a
mixture of experts routes near ties differently after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from kvdistill.errors import AdapterError

MOVED: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Relative movement of a token's key or value that rounding does not explain."""
CUT: Final = 7
"""First token that is changed in order to see which keys move."""
SHORT: Final = 5
SHIFT: Final = 7
"""Positions that a text is shifted by."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Unrotated keys and values ``[B, H, T, D]`` by captured layer, and the final hidden state."""

    keys: list[Tensor]
    values: list[Tensor]
    hidden_BTE: Tensor

    def compared(self, part: slice) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of layers that are compared, of some rows."""
        pairs = list(zip(self.keys, self.values, strict=True))
        chosen = pairs if self.keys[0].dtype == torch.float32 else pairs[:2]
        return [(key[part], value[part]) for key, value in chosen]


Read = Callable[..., Reading]
"""``read(ids, mask=None, source=None, position=0)``: one pass over right-padded ids, all
real without a mask. ``source`` is the encoder's input where ``ids`` are a decoder's; without
it, the same ids."""


@dataclass(frozen=True)
class Behaviour:
    """How a model reads its tokens."""

    causal: bool
    """No key depends on a later token."""
    absolute_positions: bool
    """Values, and keys with them, depend on the absolute position of their token."""


@dataclass(frozen=True)
class BatchRule:
    """Which texts may share a batch without changing one another's keys and values."""

    padded_to: int | None = None
    """Longest text that may be padded, or stand beside padded ones; None if any may."""
    alone: bool = False
    """Every text is a batch of its own."""


UNLIMITED: Final = BatchRule()


def token_movement(one_BHTD: Tensor, other_BHTD: Tensor) -> Tensor:
    """Norm of the difference, relative to the norm, of every token: float32 ``[T]``; worst row."""
    one, other = (x.float().transpose(1, 2).flatten(2) for x in (one_BHTD, other_BHTD))
    moved: Tensor = (one - other).norm(dim=2) / one.norm(dim=2).clamp_min(1e-30)
    return moved.nan_to_num(torch.inf).amax(dim=0)


def measure_behaviour(read: Read, layers: Sequence[int], ids_1T: Tensor, shifts: bool) -> Behaviour:
    """Direction and positions of a model, from ids that differ from those ``CUT`` places before.

    Args:
        read: runs the model and captures ``layers``.
        layers: indices of the captured layers.
        ids_1T: the probe, of more than ``CUT`` tokens.
        shifts: whether ``read`` can start at another position.

    Raises:
        AdapterError: keys are not those of the tokens that were given, or are captured behind the
            rotation.
    """
    changed = ids_1T.clone()
    changed[:, CUT:] = ids_1T[:, : ids_1T.shape[1] - CUT]
    base, other = read(ids_1T, source=ids_1T), read(changed, source=ids_1T)
    first, limit = base.keys[0], MOVED[base.keys[0].dtype]
    moved = token_movement(first, other.keys[0])
    if first.shape[2] != ids_1T.shape[1] or not moved[CUT] > limit:
        read_others = "reads other tokens than it is given, as one does that shifts its input"
        why = read_others if bool((moved > limit).any()) else "has keys that no token changes"
        raise AdapterError(
            f"layer {layers[0]}: key {CUT} of {first.shape[2]} does not depend on token {CUT} of "
            f"{ids_1T.shape[1]}; the model {why}"
        )
    every = zip(base.compared(slice(None)), other.compared(slice(None)), strict=True)
    later = [(here[0], there[0]) for here, there in every][1:]
    # A model of one captured layer shows in its final state alone what it attends to.
    later = later or [(base.hidden_BTE[:, None], other.hidden_BTE[:, None])]
    causal = all(bool((token_movement(*pair)[:CUT] <= limit).all()) for pair in later)
    return Behaviour(causal, _reads_positions(read, layers, base, ids_1T, shifts))


def _reads_positions(
    read: Read, layers: Sequence[int], base: Reading, ids_1T: Tensor, shifts: bool
) -> bool:
    """Whether values depend on absolute positions.

    One repeated token is the same input at all places of the first layer, so its unrotated keys are
    equal. Behind layers with a state (Mamba) they are not, and the text is shifted instead.
    """
    if layers[0] == 0:
        there = read(ids_1T[:, :1].expand_as(ids_1T), source=ids_1T)
        keys, values = ([x[:, :, :1].expand_as(x) for x in y] for y in (there.keys, there.values))
        here = Reading(keys, values, there.hidden_BTE)
    elif shifts:
        here, there = base, read(ids_1T, position=SHIFT)
    else:
        return False
    limit, every = MOVED[base.keys[0].dtype], slice(None)
    by_layer = []
    for pair in zip(here.compared(every), there.compared(every), strict=True):
        by_layer.append([float(token_movement(*kind).max()) for kind in zip(*pair, strict=True)])
    for layer_idx, (key, value) in zip(layers, by_layer, strict=False):
        # A rotation moves keys by about their own size.
        if key > 10 * limit and value <= limit:
            raise AdapterError(
                f"layer {layer_idx}: keys of one token differ by {key:.0e} (relative) between "
                "positions although its values do not: they are captured behind the rotation"
            )
    return by_layer[0][1] > limit


def measure_batching(read: Read, ids_1T: Tensor) -> BatchRule:
    """Whether a short text is read the same alone, padded beside a longer one, and unpadded.

    Raises:
        AdapterError: the model reads the same text differently each time.
    """
    short_1T = ids_1T[:, :SHORT]
    alone = read(short_1T)
    if not _is_same(alone, read(short_1T)):
        raise AdapterError("keys and values of the same text differ from one pass to the next")
    padded = torch.cat([F.pad(short_1T, (0, ids_1T.shape[1] - SHORT)), ids_1T.flip(1)])
    mask = torch.ones_like(padded)
    mask[0, SHORT:] = 0
    if _is_same(alone, read(padded, mask)):
        return BatchRule()
    beside = torch.cat([short_1T, ids_1T[:, SHORT : 2 * SHORT]])
    return BatchRule(padded_to=0, alone=not _is_same(alone, read(beside)))


def _is_same(alone: Reading, batch: Reading) -> bool:
    is_exact, limit = alone.keys[0].dtype == torch.float32, MOVED[alone.keys[0].dtype]
    for pair in zip(alone.compared(slice(1)), batch.compared(slice(1)), strict=True):
        for one, other in zip(*pair, strict=True):
            moved = token_movement(one, other[:, :, : one.shape[2]])
            if not bool((moved.max() if is_exact else moved.median()) <= limit):
                return False
    return True
