"""The two numbers that describe one kind of one layer group, and the door that checks them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvdistill.errors import GeometryError


class HeadShape(NamedTuple):
    """Key/value heads (``num_key_value_heads``, never query heads) and their dim."""

    num_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of all heads together."""
        return self.num_heads * self.head_dim


def check_kv(x_BLHTD: Tensor, num_layers: int, shape: HeadShape, what: str) -> None:
    """Refuse a tensor that is not ``[B, num_layers, num_heads, T, head_dim]``.

    Raises:
        GeometryError: with a hint where the head axis looks like query heads.
    """
    got = tuple(x_BLHTD.shape)
    if len(got) == 5 and got[1:3] + got[4:] == (num_layers, *shape):
        return
    hint = ""
    if len(got) == 5 and got[2] > shape.num_heads and got[2] % shape.num_heads == 0:
        hint = (
            f"; {got[2]} is {got[2] // shape.num_heads} × {shape.num_heads}, so these look like "
            "query heads (num_attention_heads): pass keys and values per KV head "
            "(num_key_value_heads), before they are repeated"
        )
    raise GeometryError(
        f"{what}: expected [B, {num_layers}, {shape.num_heads}, T, {shape.head_dim}] "
        f"(samples, layers, KV heads, tokens, head dim), got {list(got)}{hint}"
    )
