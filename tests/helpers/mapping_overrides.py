"""What a model type's config needs on top of the values that families share, under its type.

The parts of a config (its vision model, its decoder) have a type and an entry of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mapping_configs import HEADS, LAYERS, VOCAB, WIDTH

_FULL_HEADS = {"num_key_value_heads": HEADS}  # latent attention has no groups of queries
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING_AND_FULL = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_INKLING = {
    "swa_num_attention_heads": 3,
    "swa_num_key_value_heads": 3,
    "swa_head_dim": 10,
    "d_rel": 4,
    "rel_extent": 8,
    "unpadded_vocab_size": VOCAB - 4,
}
_CONV_AND_ATTENTION = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
# The shared block is tied between two layers at least.
_ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_key_value_heads": HEADS,
    "attention_hidden_size": None,  # twice the width
    "n_mamba_heads": 2,
}
_QWEN4 = {
    "hc_count": 3,
    "hc_lowrank": 5,
    "ple_layer_ids": [1],
    "ple_embed_dim": 8,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 12,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}

OVERRIDES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "axk1": _FULL_HEADS,
        "axk2": {**_FULL_HEADS, "gated_norm_rank": 5},
        "bailing_hybrid": {**_FULL_HEADS, "pad_token_id": 2},
        "bamba": {"attn_layer_indices": [1]},
        "big_bird": {"attention_type": "original_full"},  # blocks do not work causally
        "bigbird_pegasus": {"attention_type": "original_full"},
        "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [2, 3]},
        "bros": {"hidden_size": 64},
        "cohere2_moe": {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
        "cohere_compass_text": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        },
        "cpmant": {"prompt_length": 3, "prompt_types": 4, "segment_types": 4},
        "dbrx": {
            # The attention reads this field, which its config lacks.
            "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 1.5},
            "ffn_config": {
                "hidden_size": WIDTH,
                "ffn_hidden_size": 24,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
        "deepseek_v2": _FULL_HEADS,
        "deepseek_v3": _FULL_HEADS,
        "deepseek_v32": _FULL_HEADS,
        "deepseek_v4": {
            "num_key_value_heads": 1,
            "o_groups": 2,
            "o_lora_rank": 6,
            "hc_mult": 3,
            "compress_rates": {
                "compressed_sparse_attention": 2,
                "heavily_compressed_attention": 3,
            },
        },
        "dots3_note_text": {
            **_FULL_HEADS,
            "swa_num_attention_heads": 3,
            "swa_num_key_value_heads": 3,
            "swa_q_lora_rank": 9,
            "swa_kv_lora_rank": 11,
            "swa_head_dim": 10,
            "swa_qk_nope_head_dim": 6,
            "swa_v_head_dim": 8,
            "shared_experts_intermediate_size": 40,
        },
        "dots3_note_vision_encoder": {
            "adapter_in_dim": WIDTH,
            "adapter_out_dim": WIDTH,
            "mlp_layer_types": ["dense"] * LAYERS,
        },
        "dots3_note_audio_encoder": {
            "adapter_input_size": WIDTH,
            "adapter_out_dim": WIDTH,
            "downsample_hidden_size": 8,
            "num_key_value_heads": HEADS,
        },
        "electra": {"embedding_size": 20},
        "ernie4_5_moe": {"num_hidden_layers": LAYERS, "moe_layer_end_index": LAYERS - 1},
        "esmc": {**_FULL_HEADS, "head_dim": WIDTH // HEADS},
        "falcon_h1": {"mamba_d_ssm": 64},
        "gemma3n_text": {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0, 0.0, 0.0],
            "laurel_rank": 4,
            "altup_num_inputs": 3,
        },
        "gemma4_text": {**_SLIDING_AND_FULL, "global_head_dim": 16},
        "gemma4_unified_text": {**_SLIDING_AND_FULL, "global_head_dim": 16},
        "gemma4_vision": {"position_embedding_size": 16, "patch_size": 4},
        "gemma4_audio": {"subsampling_conv_channels": [8, 4], "output_proj_dims": 8},
        "gemma4_unified_vision": {
            "patch_size": 2,
            "mm_embed_dim": 8,
            "mm_posemb_size": 8,
            "output_proj_dims": 8,
        },
        "gemma4_unified_audio": {"audio_embed_dim": 8},
        "glm4_moe_lite": _FULL_HEADS,
        "glm_moe_dsa": _FULL_HEADS,
        "got_ocr2_vision": {
            "output_channels": 8,
            "mlp_dim": 8,
            "image_size": 32,
            "global_attn_indexes": [1],
        },
        "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
        "granitemoehybrid": {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_hidden_layers": LAYERS,
        },
        "helium": {"head_dim": WIDTH // HEADS},  # its projection is square
        "hy_v4": _FULL_HEADS,
        "inkling_text": {
            **_INKLING,
            "layer_types": ["hybrid_sliding", "hybrid"] * 2,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        },
        "inkling2_text": {**_INKLING, "n_layers_per_attn_res_block": 2},
        "jamba": {
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
        },
        "jetmoe": {"kv_channels": 12},
        "kimi_linear": _FULL_HEADS,
        "laguna": {**_SLIDING_AND_FULL, "num_attention_heads_per_layer": [4, 2, 2, 4]},
        "layoutlmv3": {"coordinate_size": 5, "shape_size": 6, "visual_embed": False},
        "lilt": {"hidden_size": 24, "channel_shrink_ratio": 2},  # six parts of a box
        "lfm2": {**_CONV_AND_ATTENTION, "num_hidden_layers": 4},
        "lfm2_moe": {**_CONV_AND_ATTENTION, "num_hidden_layers": 4, "num_dense_layers": 2},
        "llama4_text": {
            "num_hidden_layers": 4,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
            "moe_layers": [2, 3],
        },
        "longcat_flash": {
            **_FULL_HEADS,
            "num_layers": 2,
            "head_dim": 4,
            "expert_ffn_hidden_size": 24,
            "zero_expert_num": 2,
        },
        "mamba2": {"num_heads": 8, "head_dim": 8},
        "mellum": _SLIDING_AND_FULL,
        "minicpm3": _FULL_HEADS,
        "mistral4": _FULL_HEADS,
        "mobilebert": {"embedding_size": 20, "intra_bottleneck_size": 16},
        "minimax": {
            "full_attn_alpha_factor": 1.3,
            "full_attn_beta_factor": 0.7,
            "linear_attn_alpha_factor": 0.8,
            "linear_attn_beta_factor": 1.2,
            "mlp_alpha_factor": 1.4,
            "mlp_beta_factor": 0.6,
        },
        "ministral": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
        "mllama_text_model": {"cross_attention_layers": [1]},  # left out where there is no image
        "moshi": _FULL_HEADS,
        "musicgen_decoder": {"num_codebooks": 1},  # so that ids are plain [batch, position]
        "musicgen_melody_decoder": {"num_codebooks": 1},
        "neomme": {"head_dim": 16},
        "nemotron_h": {
            "num_hidden_layers": 4,
            "ssm_state_size": 6,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "moe_shared_expert_intermediate_size": 40,
        },
        "phi4_multimodal_audio": {
            "num_blocks": 1,
            "ext_pw_out_channel": 8,
            "depthwise_separable_out_channel": 8,
            "nemo_conv_channels": 8,
            "bias_max_distance": 8,
        },
        "phi4_multimodal_vision": {"num_hidden_layers": 2},
        "qwen2_moe": {"mlp_only_layers": [1]},
        "qwen3_moe": {"mlp_only_layers": [1]},
        "qwen3_next": {"mlp_only_layers": [1]},
        "qwen4_exp_text": _QWEN4,
        "reformer": {
            "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [12, 20],
            "attn_layers": ["local", "lsh", "local"],
            "attention_head_size": 8,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
            "hash_seed": 0,
        },
        "rembert": {"input_embedding_size": 20, "output_embedding_size": 28},
        "roc_bert": {
            "pronunciation_embed_dim": 8,
            "pronunciation_vocab_size": VOCAB,
            "shape_embed_dim": 8,
            "shape_vocab_size": VOCAB,
        },
        "roformer": {"embedding_size": 20},
        "squeezebert": {"embedding_size": WIDTH},
        "rwkv": {"rescale_every": 2},
        "sarvam_mla": _FULL_HEADS,
        "xlm": {"causal": True},
        "xlnet": {"attn_type": "uni"},
        "xlstm": {
            "hidden_size": 64,
            "embedding_dim": 64,
            "num_blocks": LAYERS,
            "qk_dim_factor": 1.0,
        },
        "xmod": {"default_language": "en_XX"},
        "youtu": _FULL_HEADS,
        "zamba": {**_ZAMBA, "attention_head_dim": None, "attn_layer_period": 2},
        "zamba2": {key: _ZAMBA[key] for key in _ZAMBA if key != "attention_hidden_size"},
        "zaya": {
            "num_experts_per_tok": 1,
            "num_hidden_layers": LAYERS,
            "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
            "router_hidden_size": 10,
        },
    }
)

# What these compute partly in float32, or mask with its smallest value, breaks in float64.
FLOAT32_ONLY: frozenset[str] = frozenset(
    {"canine", "inkling2", "inkling2_text", "kosmos-2", "mra", "xglm", "xlnet"}
)

# What takes more than ids to run
NEEDS_MORE: Mapping[str, str] = MappingProxyType(
    {
        "gemma4_assistant": "drafts from another model's embeddings and key-value states",
        "gemma4_unified_assistant": "drafts from another model's embeddings and key-value states",
    }
)

# Its config lacks what its cache asks for.
NO_CACHE: frozenset[str] = frozenset({"blt"})
