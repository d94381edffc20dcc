"""Any text model of the installed transformers, shrunk generically: small sizes by name of setting.

A config class does not say which of its numbers are sizes; their names do, in almost all types.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto import modeling_auto as auto

VOCAB = 320
MAX_PARAMETERS = 8_000_000
WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 4, 2, 8, 4

_NAMES = (
    (WIDTH, "hidden_size d_model n_embd dim emb_dim embedding_size embed_dim word_embed_proj_dim"),
    (WIDTH, "hidden_dim d_embed hidden_size_per_layer_input encoder_hidden_size d_proj conv_dim"),
    (
        48,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner n_inner dim_ff dff",
    ),
    (48, "ffn_hidden_size intermediate_size_mlp shared_intermediate_size ffn_intermediate_size"),
    (48, "dense_intermediate_size mamba_d_ssm expert_ffn_hidden_size"),
    (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads"),
    (HEADS, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    (HEADS, "linear_num_value_heads linear_num_heads swa_num_attention_heads n_mamba_heads"),
    (HEADS, "num_linear_attention_heads"),
    (2 * HEADS, "mamba_n_heads mamba_num_heads"),
    (KV_HEADS, "num_key_value_heads num_kv_heads linear_num_key_heads multi_query_group_num"),
    (KV_HEADS, "swa_num_key_value_heads num_global_key_value_heads"),
    (HEAD_DIM, "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels"),
    (HEAD_DIM, "linear_key_head_dim linear_value_head_dim mamba_head_dim d_head swa_head_dim"),
    (HEAD_DIM, "swa_v_head_dim mamba_d_state ssm_state_size state_size dim_head qk_head_dim"),
    (HEAD_DIM, "mamba_d_head mamba_dt_rank index_head_dim attention_key_size time_step_rank"),
    (2 * HEAD_DIM, "global_head_dim attention_head_dim mamba_headdim"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    (LAYERS, "num_encoder_layers num_decoder_layers"),
    (
        4,
        "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num rotary_dim",
    ),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k index_n_heads kv_shared_layers"),
    (2, "num_kv_shared_layers"),
    (1, "n_shared_experts num_shared_experts n_group topk_group mamba_n_groups n_groups"),
    (1, "moe_num_shared_experts num_nextn_predict_layers first_k_dense_replace mtp_num_layers"),
    (16, "q_lora_rank kv_lora_rank moe_intermediate_size laurel_rank o_lora_rank index_topk"),
    (128, "max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len"),
    (128, "max_encoder_position_embeddings max_decoder_position_embeddings seq_length"),
    (64, "original_max_position_embeddings"),
    (VOCAB, "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size n_vocab"),
)
SIZES = {name: size for size, names in _NAMES for name in names.split()}
"""Small value of every setting that is a size."""

NOT_TEXT = (
    "audio", "vision", "whisper", "speech", "musicgen", "moshi", "trocr", "git", "asr", "voxtral",
    "encoder-decoder", "seamless", "moss_", "perceiver", "tapas", "layoutlm", "luke",
)  # fmt: skip


def text_types() -> list[str]:
    """Model types with a causal, masked or sequence-to-sequence language model, and text models."""
    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    every = set(auto.MODEL_MAPPING_NAMES)
    found = {name for mapping in mappings for name in mapping} & every
    found |= {name for name in every if name.endswith("_text")} | {"mistral4", "splinter"}
    return sorted(name for name in found if not any(part in name for part in NOT_TEXT))


def tiny_config(model_type: str, **options: Any) -> Any:
    """A config of this type with every size shrunk; ``options`` win."""
    default = AutoConfig.for_model(model_type)
    config = type(default)(**{**_shrunk(default), **options})
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def _shrunk(config: Any) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None) if isinstance(value, dict) else None
        if hasattr(inner, "to_dict"):
            small[name] = type(inner)(**_shrunk(inner))
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            num = int(HEAD_DIM * value.get("partial_rotary_factor", 1.0)) // 2
            small[name] = {
                **value,
                "mrope_section": [num - num // 2, num // 4, num // 2 - num // 4],
            }
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(SIZES[name], value) if value > 0 else value
        elif name.endswith("token_id") and isinstance(value, int):
            small[name] = min(value, 2)
        elif ("layer_types" in name and value) or name in ("layers_block_type", "block_types"):
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
        elif isinstance(value, list) and len(value) in _lengths(config):
            small[name] = value[:LAYERS]
    return small


def _lengths(config: Any) -> set[int]:
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
    return {getattr(config, name, None) for name in names} - {None}


_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_MROPE_TYPES = (
    "glm4v_text", "glm_image_text", "glm_ocr_text", "qwen2_vl_text", "qwen2_5_vl_text",
)  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    **{name: {"rope_parameters": _MROPE} for name in _MROPE_TYPES},
    "glm4v_moe_text": {
        "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    },
    "hunyuan_vl_text": {"head_dim": HEAD_DIM, "rope_parameters": _MROPE},
    "bailing_hybrid": {"num_key_value_heads": HEADS, "num_experts": 8, "n_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "deepseek_v2": {"num_key_value_heads": HEADS, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "esmc": {"num_key_value_heads": HEADS, "vocab_size": VOCAB},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "funnel": {"block_sizes": [2, 2], "n_head": HEADS, "d_head": HEAD_DIM},
    "gemma4_text": {"global_head_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 16, "num_key_value_heads": HEADS},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "neomme": {"head_dim": 16},
    "mistral4": {"num_key_value_heads": HEADS, "head_dim": 16, "qk_head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {
        **{"pronunciation_vocab_size": 16, "pronunciation_embed_dim": 8},
        **{"shape_vocab_size": 16, "shape_embed_dim": 8},
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
"""Settings of single types, tried first."""

_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": HEADS},
    {"head_dim": HEAD_DIM},
    {"num_key_value_heads": HEADS, "head_dim": HEAD_DIM},
)
"""Settings beyond sizes that some types need: tried until a model runs."""


def scatter(model: torch.nn.Module) -> None:
    """Give parameters that start as constants (norms, biases, gates) random values."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.data += 0.1 * torch.randn_like(parameter)


def small_model(model_type: str) -> tuple[Any, Any]:
    """A random base model in float32, and one with a causal head where the type has it.

    ``(None, why not)`` for a type that cannot be built small.
    """
    problem = ""
    for variant in (OVERRIDES.get(model_type, {}), *_VARIANTS):
        try:
            config = tiny_config(model_type, **variant)
            torch.manual_seed(0)
            base = AutoModel.from_config(config, dtype=torch.float32).eval()
            if sum(p.numel() for p in base.parameters()) > MAX_PARAMETERS:
                return None, "too many parameters when small"
            scatter(base)
            ids = torch.arange(3, 16)[None]
            is_pair = config.is_encoder_decoder
            with torch.no_grad():
                base(input_ids=ids, **({"decoder_input_ids": ids} if is_pair else {}))
            headed = None
            if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_pair:
                torch.manual_seed(0)
                headed = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
                scatter(headed)
        except Exception as error:
            problem = problem or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        return base.requires_grad_(False), headed
    return None, problem
