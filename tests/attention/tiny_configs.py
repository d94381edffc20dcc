"""Any text model of the installed transformers, shrunk generically: small sizes by name of setting.

A config class does not say which of its numbers are sizes; their names do, in almost all types.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.models.auto import modeling_auto as auto

VOCAB = 320
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
    """Model types with a causal, masked or sequence-to-sequence language model."""
    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    found = {name for mapping in mappings for name in mapping} & set(auto.MODEL_MAPPING_NAMES)
    return sorted(name for name in found if not any(part in name for part in NOT_TEXT))


def tiny_config(model_type: str, **options: Any) -> Any:
    """A config of this type with every size shrunk; ``options`` win."""
    default = AutoConfig.for_model(model_type)
    return type(default)(**{**_shrunk(default), **options})


def _shrunk(config: Any) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None)
        if hasattr(inner, "to_dict"):
            small[name] = type(inner)(**_shrunk(inner))
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(SIZES[name], value) if value > 0 else value
        elif name.endswith("token_id") and isinstance(value, int):
            small[name] = min(value, 2)
        elif (
            name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types") and value
        ):
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
        elif (
            isinstance(value, list)
            and "window" not in name
            and len(value) == getattr(config, "num_hidden_layers", -1)
        ):
            small[name] = value[:LAYERS]
    return small
