"""Where each family of models computes the queries, keys and values of a layer, before rotation.

An adapter is data: the path of the layers, of the attention module in a layer, of the modules
whose outputs are tapped, and how to cut these outputs into heads. Teachers and the student are
read through the same table. No adapter is trusted: it is verified on the model in hand before it
is used (``attention/verification.py``), so a model type that is not in the table is tried with
every adapter that fits its module names.

Keys are tapped *after* a key norm and *before* the rotation: un-rotating a cached bfloat16 key is
inexact (errors up to 0.18 on SmolLM2), a tap is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kvdistill.attention.geometry import Heads
from kvdistill.errors import AdapterError
from kvdistill.types import Stream


class QKV(NamedTuple):
    """Queries ``[B, HQ, T, D]``, keys and values ``[B, H, T, D]``, all of them unrotated."""

    query: Tensor
    key: Tensor
    value: Tensor


class LayerStates(NamedTuple):
    """``QKV``, and the layer's output ``[B, 1, T, E]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor


TeacherKind = Literal["decoder", "encoder", "encoder_decoder"]

Cut = Callable[[tuple[Tensor, ...], Heads], QKV]
"""From the tapped outputs of a layer to its heads: views wherever the layout allows, so that
writing into a cut of a tapped output changes the output (``KVCapture.rewriting``)."""


@dataclass(frozen=True)
class Adapter:
    """Where one family computes Q, K and V."""

    name: str
    layers: str
    """Path of the list of layers, from the base model."""
    attention: str
    """Path of the attention module, from a layer. A layer without it has no keys."""
    taps: tuple[str, ...]
    """Modules whose outputs hold Q, K and V, from the attention module; ``a|b``: a, or else b."""
    cut: Cut
    key_norm: bool = False
    """Whether the tapped keys have passed a norm."""
    has_key_per_query: bool = False
    """A key/value head per query head, whatever a config holds."""
    can_rewrite: bool = True
    """Whether cuts are views, or a copy of which nothing can be written back."""
    finish: Callable[[nn.Module, QKV], QKV] | None = None
    """What an attention module does to its heads and a rotation commutes with."""
    stream: Stream = "self"
    kind: TeacherKind = "decoder"

    @property
    def is_causal(self) -> bool:
        """Whether attention of this family and stream is causal."""
        return self.kind == "decoder" or self.stream == "decoder"


def separate(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """Three modules, ``[B, T, H·D]`` or already split ``[B, T, H, D]``."""
    dims = heads.head_dim, heads.head_dim, heads.value_head_dim
    return QKV(*(_split(x, dim) for x, dim in zip(outputs, dims, strict=True)))


def separate_heads_first(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """As ``separate``, but an output of four axes is ``[B, H, T, D]`` already (Gemma 3)."""
    dims = heads.head_dim, heads.head_dim, heads.value_head_dim
    split = (x if x.ndim == 4 else _split(x, d) for x, d in zip(outputs, dims, strict=True))
    return QKV(*split)


def fused(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """One module, ``[all Q | all K | all V]`` (GPT-2, Phi-3, ModernBERT)."""
    (qkv,) = outputs
    numbers = heads.num_query, heads.num_key_value, heads.num_key_value
    dims = heads.head_dim, heads.head_dim, heads.value_head_dim
    ends = accumulate(n * dim for n, dim in zip(numbers, dims, strict=True))
    # Slices rather than torch.split, whose views cannot be written to in place.
    parts = (qkv[..., start:end] for start, end in pairwise([0, *ends]))
    return QKV(*(_split(x, dim) for x, dim in zip(parts, dims, strict=True)))


def fused_per_head(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """One module, ``q k v`` of head 0, then of head 1, … (GPT-NeoX)."""
    (qkv,) = outputs
    split = _unflatten(qkv, heads.num_query, 3, heads.head_dim)
    return QKV(*(split[..., i, :].transpose(1, 2) for i in range(3)))


def fused_per_group(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """One module, per key/value head its queries, its key, its value (Falcon).

    Multi-head Falcons have one query per group, multi-query Falcons a single group.
    """
    (qkv,) = outputs
    groups = heads.num_key_value
    width = heads.num_query // groups + 2
    split = _unflatten(qkv, groups, width, heads.head_dim)
    query = split[..., :-2, :].flatten(2, 3)
    return QKV(*(x.transpose(1, 2) for x in (query, split[..., -2, :], split[..., -1, :])))


def latent(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """Queries; latent and shared rotary key; up-projected ``k v`` per head (DeepSeek V2).

    A head's key is its own part and then the rotary part, which all heads share.
    """
    query, compressed, up_projected = outputs
    up_projected = up_projected.reshape(*compressed.shape[:2], heads.num_key_value, -1)
    own = up_projected.transpose(1, 2)
    own_dim = own.shape[-1] - heads.value_head_dim
    shared = compressed[:, None, :, own_dim - heads.head_dim :]
    key = torch.cat([own[..., :own_dim], shared.expand(-1, heads.num_key_value, -1, -1)], dim=-1)
    return QKV(_split(query, heads.head_dim), key, own[..., own_dim:])


def latent_interleaved(outputs: tuple[Tensor, ...], heads: Heads) -> QKV:
    """As ``latent``, with rotary channels brought from pairs to halves first (DeepSeek V3)."""
    query, key, value = latent(outputs, heads)
    own_dim = outputs[2].shape[-1] // heads.num_key_value - heads.value_head_dim

    def halved(x: Tensor) -> Tensor:
        turning = x[..., own_dim:]
        return torch.cat([x[..., :own_dim], turning[..., ::2], turning[..., 1::2]], dim=-1)

    return QKV(halved(query), halved(key), value)


def _behind_rotation(attention: nn.Module, qkv: QKV) -> QKV:
    """What some families do to heads after the rotation, which it commutes with.

    Norms without weights (Llama 4, NanoChat), a factor on queries that grows with their position
    (Llama 4), a factor on values (MiMo). Norms with weights do not commute: they fail verification.
    """
    module: Any = attention
    query, key, value = qkv
    shared = getattr(module, "qk_norm", None)
    norms: list[Any] = [getattr(module, name, shared) for name in ("q_norm", "k_norm")]
    if None not in norms:
        query, key = norms[0](query), norms[1](key)
    if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
        position = torch.arange(1, query.shape[2] + 1, device=query.device).float()
        growth = torch.log1p((position / module.floor_scale).floor()) * module.attn_scale + 1
        query = (query * growth[:, None]).to(query.dtype)
    return QKV(query, key, value * getattr(module, "v_scale", 1.0))


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
ALL_NORMED: Final = replace(
    NORMED, name="separate projections, q/k/v norms", taps=("q_norm", "k_norm", "v_norm")
)
LAYERNORMED: Final = replace(
    NORMED,
    name="separate projections, q/k layernorms",
    taps=("q_layernorm", "k_layernorm", "v_proj"),
)
LAYERNORMED_HEADS_FIRST: Final = replace(
    LAYERNORMED,
    name="separate projections, q/k layernorms after the heads",
    cut=separate_heads_first,
)
FUSED: Final = Adapter("fused qkv", "layers", "self_attn", ("qkv_proj",), fused)
GPT2: Final = Adapter("GPT-2", "h", "attn", ("c_attn",), fused)
SCALED: Final = replace(
    PLAIN, name="separate projections, scaled behind the rotation", finish=_behind_rotation
)
MIXER: Final = replace(PLAIN, name="Nemotron-H", attention="mixer")
LATENT: Final = Adapter(
    "multi-head latent attention",
    "layers",
    "self_attn",
    ("q_b_proj|q_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    latent,
    has_key_per_query=True,
    can_rewrite=False,
)
LATENT_INTERLEAVED: Final = replace(
    LATENT, name="multi-head latent attention, interleaved", cut=latent_interleaved
)
GPTJ: Final = replace(PLAIN, name="GPT-J", layers="h", attention="attn")
GPT_NEO: Final = replace(PLAIN, name="GPT-Neo", layers="h", attention="attn.attention")
GPT_NEOX: Final = Adapter(
    "GPT-NeoX", "layers", "attention", ("query_key_value",), fused_per_head, has_key_per_query=True
)
FALCON: Final = Adapter("Falcon", "h", "self_attention", ("query_key_value",), fused_per_group)
OPT: Final = replace(PLAIN, name="OPT", layers="decoder.layers")

BERT: Final = Adapter(
    "BERT", "encoder.layer", "attention.self", ("query", "key", "value"), separate, kind="encoder"
)
DISTILBERT: Final = replace(
    BERT,
    name="DistilBERT",
    layers="transformer.layer",
    attention="attention",
    taps=("q_lin", "k_lin", "v_lin"),
)
MODERNBERT: Final = Adapter("ModernBERT", "layers", "attn", ("Wqkv",), fused, kind="encoder")

_BART = replace(PLAIN, kind="encoder_decoder")
_BART_DECODER = replace(_BART, name="BART decoder", layers="decoder.layers", stream="decoder")
BART: Final = (
    replace(_BART, name="BART encoder", layers="encoder.layers", stream="encoder"),
    _BART_DECODER,
    replace(_BART_DECODER, name="BART cross", attention="encoder_attn", stream="cross"),
)
T5GEMMA_CROSS: Final = replace(BART[2], name="T5Gemma cross", attention="cross_attn")

_T5 = replace(_BART, attention="layer.0.SelfAttention", taps=("q", "k", "v"))
_T5_DECODER = replace(_T5, name="T5 decoder", layers="decoder.block", stream="decoder")
T5: Final = (
    replace(_T5, name="T5 encoder", layers="encoder.block", stream="encoder"),
    _T5_DECODER,
    replace(_T5_DECODER, name="T5 cross", attention="layer.1.EncDecAttention", stream="cross"),
)

# fmt: off
ADAPTERS: Final[dict[str, tuple[Adapter, ...]]] = {
    **dict.fromkeys((
        "llama", "mistral", "ministral", "qwen2", "qwen2_moe", "mixtral", "gemma", "gemma2",
        "granite", "granitemoe", "starcoder2", "smollm3", "phi", "phimoe", "stablelm", "olmo",
        "cohere", "cohere2", "glm", "glm4", "helium", "arcee", "gpt_oss", "jamba", "minimax",
        "granitemoehybrid", "bamba", "falcon_h1", "qwen2_vl_text", "qwen2_5_vl_text",
    ), (PLAIN,)),
    **dict.fromkeys(
        ("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_vl_text",
         "qwen3_vl_moe_text", "olmo2", "olmo3", "olmoe", "olmo_hybrid"), (NORMED,)
    ),
    **dict.fromkeys(("gemma3", "gemma3_text"), (NORMED_HEADS_FIRST,)),
    **dict.fromkeys(("lfm2", "lfm2_moe"), (LAYERNORMED,)),
    **dict.fromkeys((
        "deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "kimi_linear", "glm4_moe_lite",
        "glm_moe_dsa", "mistral4", "youtu", "axk1",
    ), (LATENT, LATENT_INTERLEAVED)),
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), (ALL_NORMED,)),
    **dict.fromkeys(("llama4_text", "nanochat", "mimo_v2_flash"), (SCALED,)),
    "nemotron_h": (MIXER,), "gpt_neo": (GPT_NEO,),
    "phi3": (FUSED,), "gpt2": (GPT2,), "gptj": (GPTJ,), "gpt_neox": (GPT_NEOX,),
    "falcon": (FALCON,), "opt": (OPT,),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"), (BERT,)),
    "distilbert": (DISTILBERT,), "modernbert": (MODERNBERT,),
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "blenderbot", "m2m_100"), BART),
}
# fmt: on
"""Adapter of every known ``model_type``; an encoder-decoder has one per stream."""

STRANGERS: Final[list[Adapter]] = sorted(
    {a for known in ADAPTERS.values() for a in known if a.stream == "self"}
    | {LAYERNORMED_HEADS_FIRST},
    key=lambda a: (not a.key_norm, a.finish is not None, a.name),
)
"""Adapters to try on an unknown model type; those with key norms first, since a plain adapter
fits the same modules and fails verification."""


def known_adapters(model: Any) -> tuple[Adapter, ...]:
    """Adapters of a model's type in the table; none for an unknown type."""
    text_type = model.config.get_text_config().model_type
    return ADAPTERS.get(model.config.model_type, ADAPTERS.get(text_type, ()))


def adapters_for(model: Any, stream: Stream | None = None) -> list[Adapter]:
    """Candidate adapters of a model, likeliest first.

    The table's adapter of a known type is followed by all others of its kind: a flag of the config
    (``use_qk_norm``, ``qk_layernorm``) can add norms that the type does not have by default.

    Raises:
        AdapterError: the model is an encoder-decoder and the stream is not chosen, or has no
            streams to choose from.
    """
    model_type = model.config.get_text_config().model_type
    known = known_adapters(model)
    if not known and model.config.is_encoder_decoder:
        known = (*BART, T5GEMMA_CROSS, *T5)
    streams = dict.fromkeys(adapter.stream for adapter in known)
    if "self" in streams or not known:
        if stream is not None:
            raise AdapterError(
                f"model type {model_type!r} has one stream of tokens; leave out `stream`, which "
                "chooses among those of an encoder-decoder"
            )
        kinds = {adapter.kind for adapter in known or STRANGERS}
        return [*known, *(a for a in STRANGERS if a.kind in kinds and a not in known)]
    if stream not in streams:
        raise AdapterError(
            f"model type {model_type!r} is an encoder-decoder; set its `stream` to one of "
            f"{', '.join(streams)}"
        )
    return [adapter for adapter in known if adapter.stream == stream]
