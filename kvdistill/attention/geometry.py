"""The two numbers that describe one kind of one layer group, and the door that checks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from kvdistill.errors import GeometryError, StudentError
from kvdistill.store.manifest import RotarySpec


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


@dataclass(frozen=True)
class StudentGeometry:
    """Layers and key/value heads of the student."""

    num_layers: int
    heads: HeadShape
    hidden_size: int


def student_geometry(student: Any) -> StudentGeometry:
    """Layers, key/value heads and hidden size, from the student's config."""
    config = student.config.get_text_config()
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.num_attention_heads % num_heads:
        raise StudentError(
            f"the student has {config.num_attention_heads} query heads for {num_heads} key/value "
            "heads; the first must be a multiple of the second"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return StudentGeometry(
        config.num_hidden_layers, HeadShape(num_heads, head_dim), config.hidden_size
    )


@dataclass(frozen=True, eq=False)
class VerifiedLayer:
    """One layer, as measured on the model in hand."""

    layer_idx: int
    num_key_value_heads: int
    key_head_dim: int
    value_head_dim: int
    rotary: RotarySpec | None
    scaling: float
    """Factor between ``q · k`` of the tapped queries and keys and the attention's scores."""
    error: float
    """Largest difference to the attention's own inputs, relative to their largest entry."""
    softcap: float | None = None
    """What the model's attention scores are soft-capped at (Gemma 2)."""
