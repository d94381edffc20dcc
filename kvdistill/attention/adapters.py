"""Where each family of models has the queries, keys and values of a layer, before any rotation.

Teachers (``extract``) and the student (``distill``) are read in the same places, so this lies
below both. An adapter is data: the path of the layers, of the attention module inside one, of
the modules whose outputs are tapped, and how to cut these outputs into heads. Nothing here is
trusted: an adapter is verified on the teacher in hand before it is used (``extract/verify.py``),
so a model that is not in the table can be tried with every adapter that fits its module names.

Keys are tapped *after* a key norm and *before* the rotation: un-rotating a cached bfloat16 key
is inexact (errors up to 0.18 on SmolLM2), a tap is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Final, Literal, NamedTuple

from torch import Tensor

from kvdistill.errors import TeacherError
from kvdistill.types import Stream


class QKV(NamedTuple):
    """Queries ``[B, HQ, T, D]``, keys and values ``[B, H, T, D]``, none of them rotated."""

    query: Tensor
    key: Tensor
    value: Tensor


class Heads(NamedTuple):
    """What the cuts need to know: query heads, key/value heads, head dim."""

    num_query: int
    num_key_value: int
    head_dim: int


TeacherKind = Literal["decoder", "encoder", "encoder_decoder"]


Cut = Callable[[tuple[Tensor, ...], Heads], QKV]


@dataclass(frozen=True)
class Adapter:
    """Where one family keeps Q, K and V."""

    name: str
    layers: str
    """Path of the list of layers, from the base model."""
    attention: str
    """Path of the attention module, from a layer. A layer without it has no keys."""
    taps: tuple[str, ...]
    """Modules whose outputs hold Q, K and V, from the attention module."""
    cut: Cut
    key_norm: bool = False
    """Whether a norm is applied to keys before the tap."""
    stream: Stream = "self"
    kind: TeacherKind = "decoder"


def separate(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """Three modules, ``[B, T, H·D]`` or already split ``[B, T, H, D]``."""
    query, key, value = (_split(x, heads.head_dim) for x in outputs)
    return QKV(query, key, value)


def separate_heads_first(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """As ``separate``, but a module that splits heads gives ``[B, H, T, D]`` (Gemma 3)."""
    query, key, value = (x if x.ndim == 4 else _split(x, heads.head_dim) for x in outputs)
    return QKV(query, key, value)


def fused(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """One module, ``[all Q | all K | all V]`` (GPT-2, Phi-3, ModernBERT)."""
    (qkv,) = outputs
    widths = [heads.num_query, heads.num_key_value, heads.num_key_value]
    ends = list(accumulate(n * heads.head_dim for n in widths))
    # Slices, not torch.split: whoever rewrites a key writes through its view.
    parts = (qkv[..., start:end] for start, end in pairwise([0, *ends]))
    return QKV(*(_split(x, heads.head_dim) for x in parts))


def fused_per_head(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """One module, ``q k v`` of head 0, then of head 1, … (GPT-NeoX)."""
    (qkv,) = outputs
    split = _unflatten(qkv, heads.num_query, 3, heads.head_dim)
    return QKV(*(split[..., i, :].transpose(1, 2) for i in range(3)))


def fused_per_group(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """One module, per key/value head its queries, its key, its value (Falcon).

    Falcon's plain multi-head form is one query per group, its multi-query form one group.
    """
    (qkv,) = outputs
    groups = heads.num_key_value
    width = heads.num_query // groups + 2
    split = _unflatten(qkv, groups, width, heads.head_dim)
    query = split[..., :-2, :].flatten(2, 3)
    return QKV(*(x.transpose(1, 2) for x in (query, split[..., -2, :], split[..., -1, :])))


def _split(x: Tensor, head_dim: int) -> Tensor:
    """``[B, T, H·D]`` or ``[B, T, H, D]`` → ``[B, H, T, D]``."""
    if x.ndim == 3:
        x = _unflatten(x, -1, head_dim)
    return x.transpose(1, 2)


def _unflatten(x: Tensor, *sizes: int) -> Tensor:
    return x.reshape(*x.shape[:-1], *sizes)


PLAIN: Final = Adapter(
    "separate projections", "layers", "self_attn", ("q_proj", "k_proj", "v_proj"), separate
)


NORMED: Final = replace(
    PLAIN,
    name="separate projections, q/k norms",
    taps=("q_norm", "k_norm", "v_proj"),
    key_norm=True,
)


NORMED_HEADS_FIRST: Final = replace(
    NORMED, name="separate projections, q/k norms after the heads", cut=separate_heads_first
)


LAYERNORMED: Final = replace(
    NORMED,
    name="separate projections, q/k layernorms",
    taps=("q_layernorm", "k_layernorm", "v_proj"),
)


FUSED: Final = Adapter("fused qkv", "layers", "self_attn", ("qkv_proj",), fused)


GPT2: Final = Adapter("GPT-2", "h", "attn", ("c_attn",), fused)


GPTJ: Final = replace(PLAIN, name="GPT-J", layers="h", attention="attn")


GPT_NEOX: Final = Adapter("GPT-NeoX", "layers", "attention", ("query_key_value",), fused_per_head)


FALCON: Final = Adapter("Falcon", "h", "self_attention", ("query_key_value",), fused_per_group)


OPT: Final = replace(PLAIN, name="OPT", layers="decoder.layers")


BERT: Final = Adapter(
    "BERT", "encoder.layer", "attention.self", ("query", "key", "value"), separate, kind="encoder"
)


DISTILBERT: Final = Adapter(
    "DistilBERT",
    "transformer.layer",
    "attention",
    ("q_lin", "k_lin", "v_lin"),
    separate,
    kind="encoder",
)


MODERNBERT: Final = Adapter("ModernBERT", "layers", "attn", ("Wqkv",), fused, kind="encoder")


_BART = replace(PLAIN, kind="encoder_decoder")


BART: Final[dict[Stream, Adapter]] = {
    "encoder": replace(_BART, name="BART encoder", layers="encoder.layers", stream="encoder"),
    "decoder": replace(_BART, name="BART decoder", layers="decoder.layers", stream="decoder"),
    "cross": replace(
        _BART, name="BART cross", layers="decoder.layers", attention="encoder_attn", stream="cross"
    ),
}


_T5 = Adapter(
    "T5",
    "encoder.block",
    "layer.0.SelfAttention",
    ("q", "k", "v"),
    separate,
    kind="encoder_decoder",
)


T5: Final[dict[Stream, Adapter]] = {
    "encoder": replace(_T5, name="T5 encoder", stream="encoder"),
    "decoder": replace(_T5, name="T5 decoder", layers="decoder.block", stream="decoder"),
    "cross": replace(
        _T5,
        name="T5 cross",
        layers="decoder.block",
        attention="layer.1.EncDecAttention",
        stream="cross",
    ),
}


DECODERS: Final[dict[str, Adapter]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "ministral",
            "qwen2",
            "qwen2_moe",
            "mixtral",
            "gemma",
            "gemma2",
            "granite",
            "granitemoe",
            "starcoder2",
            "smollm3",
            "phi",
            "phimoe",
            "stablelm",
            "olmo",
            "cohere",
            "cohere2",
            "glm",
            "glm4",
            "helium",
            "arcee",
        ),
        PLAIN,
    ),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen3_next", "olmo2", "olmo3", "olmoe"), NORMED),
    **dict.fromkeys(("gemma3", "gemma3_text"), NORMED_HEADS_FIRST),
    **dict.fromkeys(("lfm2", "lfm2_moe"), LAYERNORMED),
    "phi3": FUSED,
    "gpt2": GPT2,
    "gptj": GPTJ,
    "gpt_neox": GPT_NEOX,
    "falcon": FALCON,
    "opt": OPT,
}


ENCODERS: Final[dict[str, Adapter]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"), BERT),
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
}


ENCODER_DECODERS: Final[dict[str, dict[Stream, Adapter]]] = {
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "blenderbot", "m2m_100"), BART),
}


REFUSED: Final[dict[str, str]] = dict.fromkeys(
    ("deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "kimi_linear", "longcat_flash"),
    "multi-head latent attention: a key is a latent and a shared rotary part, and one stored "
    "key per head would have its rotary channels at the end, which the store cannot describe",
)


STRANGERS: Final[tuple[Adapter, ...]] = tuple(
    sorted({*DECODERS.values(), *ENCODERS.values()}, key=lambda a: (not a.key_norm, a.name))
)
"""Adapters to try on an unknown architecture, those that know about key norms first."""


def adapters_for(name: str, model: Any, stream: Stream | None = None) -> list[Adapter]:
    """Candidates for a model, likeliest first.

    Raises:
        TeacherError: the architecture is known to have no keys that the store can hold, or is
            an encoder-decoder and the stream is not chosen.
    """
    model_type = model.config.get_text_config().model_type
    if model_type in REFUSED:
        raise TeacherError(f"teacher {name!r} ({model_type}) cannot be read: {REFUSED[model_type]}")
    if model.config.model_type in ENCODER_DECODERS:
        streams = ENCODER_DECODERS[model.config.model_type]
        if stream not in streams:
            raise TeacherError(
                f"teacher {name!r} is an encoder-decoder; set teachers.{name}.stream to one of "
                f"{', '.join(streams)}"
            )
        return [streams[stream]]
    if stream is not None:
        raise TeacherError(
            f"teacher {name!r} ({model_type}) has one stream of tokens; leave out "
            f"teachers.{name}.stream, which chooses among those of an encoder-decoder"
        )
    if model_type in DECODERS:
        return [DECODERS[model_type]]
    if model_type in ENCODERS:
        return [ENCODERS[model_type]]
    return list(STRANGERS)


def is_known(model: Any) -> bool:
    """Whether the architecture has an adapter of its own."""
    model_type = model.config.get_text_config().model_type
    return model_type in {*DECODERS, *ENCODERS, *ENCODER_DECODERS}


# MERGED-DOC extract.families
# Which adapters to try on a model: its own family's, or for a stranger every one that might fit.
#
# Trying is safe because every adapter is verified on the model in hand before it is used.
