"""One tiny random model per family, as keyword arguments of its config."""

from __future__ import annotations

from typing import Any

from tests.extract.models import BASE

_B: dict[str, Any] = {**BASE, "vocab_size": 64}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_MLA = {
    **_B,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 3,
    "mlp_layer_types": ["dense"] * 3,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_LINEAR = {
    **_B,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 64}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _B),
    "llama, MQA": ("llama", {**_B, "num_key_value_heads": 1}),
    "mistral, sliding": ("mistral", {**_B, "sliding_window": 4}),
    "qwen2": ("qwen2", _B),
    "qwen3": ("qwen3", {**_B, "head_dim": 16}),
    "gemma": ("gemma", {**_B, "head_dim": 16}),
    "gemma2, sliding": ("gemma2", {**_B, "head_dim": 16, "sliding_window": 4}),
    "gemma3, sliding": (
        "gemma3_text",
        {
            **_B,
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3, fused": ("phi3", _B),
    "phi, partial rotary": ("phi", _B),
    "gpt2, fused": ("gpt2", _GPT),
    "opt, scaled queries": (
        "opt",
        {
            **{k: _B[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{"ffn_dim": 48, "vocab_size": 64, "max_position_embeddings": 128},
            "word_embed_proj_dim": 32,
        },
    ),
    "pythia, partial rotary": ("gpt_neox", {**_B, "rotary_pct": 0.25}),
    "gptj, interleaved": ("gptj", {**_GPT, "rotary_dim": 4}),
    "cohere, interleaved": ("cohere", _B),
    "falcon, MQA": ("falcon", {**_FALCON, "multi_query": True}),
    "falcon, grouped": (
        "falcon",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon, alibi": ("falcon", {**_FALCON, "multi_query": False, "alibi": True}),
    "mixtral, MoE": ("mixtral", {**_B, "num_local_experts": 4}),
    "olmoe, MoE": ("olmoe", {**_B, **_MOE}),
    "olmo2": ("olmo2", _B),
    "smollm3, layers without rotary": ("smollm3", {**_B, "no_rope_layers": [1, 0, 1]}),
    "granite": ("granite", {**_B, "attention_multiplier": 0.3}),
    "lfm2, hybrid": ("lfm2", {**_B, "layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_next, hybrid": (
        "qwen3_next",
        {**_LINEAR, **_MOE, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_5, hybrid": ("qwen3_5_text", _LINEAR),
    "olmo_hybrid": (
        "olmo_hybrid",
        {name: value for name, value in _LINEAR.items() if name != "head_dim"},
    ),
    "jamba, hybrid": (
        "jamba",
        {
            **_B,
            **_MOE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "granite, hybrid": (
        "granitemoehybrid",
        {
            **_B,
            **_MAMBA,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
        },
    ),
    "bamba, hybrid": ("bamba", {**_B, **_MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1, hybrid": (
        "falcon_h1",
        {**_B, **_MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 8},
    ),
    "nemotron_h, hybrid": (
        "nemotron_h",
        {
            **_B,
            "head_dim": 8,
            "layers_block_type": ["mamba", "attention", "mamba"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
    ),
    "minimax, hybrid": (
        "minimax",
        {
            **_B,
            "head_dim": 16,
            "num_local_experts": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "deepseek_v2, latent": ("deepseek_v2", _MLA),
    "deepseek_v3, latent": ("deepseek_v3", _MLA),
    "deepseek_v3, latent, whole queries": (
        "deepseek_v3",
        {**_MLA, "q_lora_rank": None, "rope_interleave": False},
    ),
    "deepseek_v32, latent, sparse": ("deepseek_v32", _MLA),
    "minicpm3, latent": ("minicpm3", _MLA),
    "glm4_moe_lite, latent": ("glm4_moe_lite", _MLA),
    "kimi_linear, latent, hybrid": (
        "kimi_linear",
        {
            **_MLA,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_heads": 2,
            "linear_head_dim": 8,
        },
    ),
    "llama4, norm after rotary": (
        "llama4_text",
        {
            **_B,
            "head_dim": 16,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 0, 1],
            "floor_scale": 4,
        },
    ),
    "nanochat, norm after a reversed rotary": ("nanochat", {**_B, "head_dim": 8}),
    "mimo, narrow scaled values": (
        "mimo_v2_flash",
        {
            **_B,
            **_MOE,
            "n_routed_experts": 4,
            "head_dim": 8,
            "v_head_dim": 6,
            "attention_value_scale": 0.7,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "gpt_oss, sinks": (
        "gpt_oss",
        {
            **_B,
            "head_dim": 16,
            "num_local_experts": 4,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2_vl, text": (
        "qwen2_vl_text",
        {
            **_B,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            },
        },
    ),
    "gpt_neo, windows": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "vocab_size": 64,
            "max_position_embeddings": 128,
        },
    ),
    "gemma3n, shared layers": (
        "gemma3n_text",
        {
            **_B,
            "head_dim": 16,
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0] * 3,
            "sliding_window": 4,
        },
    ),
    "llama, scaled rotary": (
        "llama",
        {
            **_B,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
}
_NOPE = {**_B, "head_dim": 16}
# Families that share an adapter with one above, or are served by a verified fit: only in the table.
MORE_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("afmoe", {**_NOPE, **_MOE, "num_local_experts": 4, "sliding_window": 4}),
    "apertus": ("apertus", _B),
    "arcee": ("arcee", _B),
    "cohere, q/k norms by a flag": ("cohere", {**_B, "use_qk_norm": True}),
    "cohere2, sliding": ("cohere2", {**_B, "sliding_window": 4}),
    "diffllama, two maps": ("diffllama", _B),
    "doge, data-dependent mask": ("doge", _B),
    "dots1, MoE": ("dots1", {**_NOPE, **_MOE, "n_routed_experts": 4, "first_k_dense_replace": 3}),
    "ernie4_5": ("ernie4_5", {**_B, "head_dim": 8}),
    "exaone4": ("exaone4", {**_B, "sliding_window": 4}),
    "glm": ("glm", _NOPE),
    "glm4": ("glm4", _NOPE),
    "glm4_moe, q/k norms by a flag": (
        "glm4_moe",
        {**_NOPE, **_MOE, "use_qk_norm": True, "first_k_dense_replace": 3},
    ),
    "granite_swa, sinks": ("granite_swa", {**_B, "sliding_window": 4}),
    "granitemoe": ("granitemoe", {**_B, "num_local_experts": 4}),
    "helium": ("helium", {**_B, "head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _NOPE),
    "lfm2_moe, hybrid": (
        "lfm2_moe",
        {**_B, **_MOE, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 3},
    ),
    "ministral, sliding": ("ministral", {**_B, "head_dim": 8, "sliding_window": 4}),
    "nemotron": ("nemotron", _B),
    "olmo": ("olmo", _B),
    "olmo3, sliding": ("olmo3", {**_B, "sliding_window": 4}),
    "phi, q/k norms by a flag": ("phi", {**_B, "qk_layernorm": True}),
    "phi3, longrope": (
        "phi3",
        {
            **_B,
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 8,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0, 3.0, 4.0, 5.0],
            },
        },
    ),
    "phimoe, MoE": ("phimoe", {**_B, "num_local_experts": 4}),
    "qwen2_moe, MoE": ("qwen2_moe", {**_B, **_MOE, "shared_expert_intermediate_size": 16}),
    "qwen3_moe, MoE": ("qwen3_moe", {**_NOPE, **_MOE}),
    "seed_oss": ("seed_oss", {**_B, "head_dim": 8}),
    "stablelm, partial rotary": ("stablelm", {**_B, "partial_rotary_factor": 0.25}),
    "stablelm, q/k norms by a flag": ("stablelm", {**_B, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {**_B, "sliding_window": 4}),
    "vaultgemma": ("vaultgemma", {**_NOPE, "sliding_window": 4}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _B),
    "roberta": ("roberta", _B),
    "distilbert": (
        "distilbert",
        {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": 64},
    ),
    "modernbert, sliding": (
        "modernbert",
        {
            **{k: v for k, v in _B.items() if k != "num_key_value_heads"},
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "local_attention": 4,
        },
    ),
}
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "t5",
        {
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 48,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "vocab_size": 64,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("bart", _SEQ2SEQ),
    "marian": ("marian", _SEQ2SEQ),
}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_QWEN_VISION = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "patch_size": 14,
    "num_position_embeddings": 16,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN = {
    "text_config": {**_B, "rope_parameters": _SECTIONS},
    "vision_config": _QWEN_VISION,
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**DECODERS["gemma3, sliding"][1], "model_type": "gemma3_text"},
        "vision_config": _VISION,
        "mm_tokens_per_image": 1,
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "mistral3": {
        "text_config": {**_B, "head_dim": 8, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "pixtral"},
        "image_token_index": 60,
    },
    "llava": {
        "text_config": {**_B, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
        "image_token_index": 60,
    },
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": {**_QWEN, "text_config": {**_B, "head_dim": 8, "rope_parameters": _SECTIONS}},
    "llama4": {
        "text_config": DECODERS["llama4, norm after rotary"][1],
        "vision_config": {
            **_VISION,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        "image_token_index": 60,
    },
}
"""Models with a language model inside; their type, as the key, and arguments of their config."""
