"""The shape of attention: heads of a layer, geometry of a model, and what was measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from kvdistill.attention.attention_rule import AttentionRule
from kvdistill.errors import GeometryError
from kvdistill.types import Kind


class HeadShape(NamedTuple):
    """Key/value heads (``num_key_value_heads``, never query heads) and their dim."""

    num_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of all heads together."""
        return self.num_heads * self.head_dim


class Heads(NamedTuple):
    """Query heads, key/value heads, and dims of one attention module's queries/keys and values."""

    num_query: int
    num_key_value: int
    head_dim: int
    value_head_dim: int


def read_heads(attention: nn.Module, config: Any) -> Heads:
    """Heads of an attention module: its own attributes first, the model's text config second.

    A module is the more exact source: Falcon's config, for one, gives another number of key/value
    heads than its multi-query modules have, and BART's describes its encoder alone.
    """

    def first(*names: str) -> int | None:
        places = (attention, getattr(attention, "config", None), config)
        found = (getattr(place, name, None) for place in places for name in names)
        return next((value for value in found if isinstance(value, int)), None)

    num_query = first("num_attention_heads", "num_heads", "n_heads")
    if num_query is None:
        raise GeometryError(f"{type(attention).__name__} has no num_attention_heads")
    groups = getattr(attention, "num_key_value_groups", None)
    found = num_query // groups if groups else first("num_kv_heads", "num_key_value_heads")
    num_key_value = found or num_query
    head_dim = first(
        "qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim"
    )
    head_dim = head_dim or config.hidden_size // num_query
    return Heads(num_query, num_key_value, head_dim, first("v_head_dim") or head_dim)


def text_model(model: Any) -> Any:
    """The layers that read text: a causal LM without its head, and without an image tower.

    Multimodal models keep a whole language model inside them, sometimes with a head of its own
    (Llama 4).
    """
    from transformers import PreTrainedModel

    found: Any = model
    while True:
        names = ("language_model", found.base_model_prefix, "model")
        inner = (getattr(found, name, None) for name in names if name)
        deeper = next((x for x in inner if isinstance(x, PreTrainedModel) and x is not found), None)
        if deeper is None:
            return found
        found = deeper


def quantisation(config: Any) -> str | None:
    """How a checkpoint's weights are quantised, by its config: ``fp8``, ``gptq`` and others."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    options = found if isinstance(found, dict) else found.to_dict()
    method = options.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


@dataclass(frozen=True)
class StudentGeometry:
    """Layers, key/value heads and hidden size of the student.

    Layers are those with attention: of a hybrid student, layer maps and losses number these alone.
    """

    num_layers: int
    shapes: Mapping[Kind, HeadShape]
    hidden_size: int


@dataclass(frozen=True, eq=False)
class VerifiedLayer(AttentionRule):
    """What one layer's attention computes, as measured on the model in hand."""

    layer_idx: int
    num_key_value_heads: int
    key_head_dim: int
    value_head_dim: int
    error: float
    """Largest difference from the attention's own inputs, relative to their largest entry."""


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


def position_limit(model: Any) -> int | None:
    """Tokens that a model has positions for in a table, learned or computed beforehand.

    None where every length is computed (rotary embeddings, ALiBi), whatever the length in training.
    """
    config = model.config.get_text_config()
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    tables = {
        name: (module.weight, module.padding_idx)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    growing = [n for n, m in model.named_modules() if hasattr(m, "make_weights")]  # XGLM
    for name, buffer in model.named_buffers():
        if not name.startswith(tuple(growing) or "."):
            tables[name] = (buffer, None)
    for name, (table, padding_idx) in tables.items():
        sized = any(positions <= size <= positions + 2 for size in table.shape)
        if sized and ("pos" in name or name.endswith("wpe")):
            # RoBERTa counts positions from after the padding's.
            late = name.endswith("embeddings.position_embeddings")
            return positions if not late or padding_idx is None else positions - padding_idx - 1
    return None
